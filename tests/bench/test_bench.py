import json
import math
import os

import pytest
import torch

import rgfast
from rgfast import cli
from rgfast.bench import suite
from rgfast.bench.timing import Absent, Checked, Contest, WrongResult, ratio, run_contest, turns
from rgfast.commands import errors
from rgfast.runtime.environment import versions


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checks():
    """The whole gate, and which ops ran in it."""
    with rgfast.record() as log:
        found = {name: list(module.gate("cpu")) for name, module in suite.BENCHMARKS.items()}
    return found, {entry.op for entry in log}


def test_the_gate_is_green_and_holds_every_op(checks):
    found, ran = checks
    assert all(check.good for each in found.values() for check in each), found
    assert ran == set(rgfast.dispatch.registered())


# What to break, and the first benchmark whose gate must see it.
BREAKS = {
    "eigvalsh": "spectrum",
    "effective_rank": "spectrum",
    "singular_values": "spectrum",
    "participation_ratio": "spectrum",
    "stable_rank": "spectrum",
    "rank_measures_from_moment": "spectrum",
    "cka_matrix": "cka",
    "kernel_drift": "cka",
    "cka": "cka",
    "residual_mlp": "residual_mlp",
    "residual_stack": "residual_mlp",
}


def slightly_wrong(function):
    def call(*args, **kwargs):
        found = function(*args, **kwargs)
        if not isinstance(found, torch.Tensor):
            return type("Off", (), {"effective_rank": found.effective_rank * (1 + 1e-5)})
        return found * (1 + 1e-5)

    return call


@pytest.mark.parametrize("name", BREAKS)
def test_the_gate_sees_an_error_of_a_hundred_thousandth(name, monkeypatch):
    monkeypatch.setattr(rgfast, name, slightly_wrong(getattr(rgfast, name)))
    assert not all(check.good for check in suite.BENCHMARKS[BREAKS[name]].gate("cpu"))


def test_the_gate_sees_a_wrong_probe(monkeypatch):
    from rgfast.bench import probe

    def off(case):
        found = original(case)
        found.dataset["effective_rank"] *= 1.001
        found.dataset["cka_biased"] *= 0.999
        return found

    original = probe.probed
    monkeypatch.setattr(probe, "probed", off)
    assert not any(check.good for check in probe.gate("cpu"))


def test_the_gate_and_the_cases_see_a_wrong_sample_route(monkeypatch):
    from rgfast.bench import probe
    from rgfast.probing.estimators import row_measures

    original = row_measures.of_spectra

    def off(*args):
        values, bounds = original(*args)
        return values | {"effective_rank": values["effective_rank"] * (1 + 3e-4)}, bounds

    monkeypatch.setattr(row_measures, "of_spectra", off)
    assert [check.good for check in probe.gate("cpu")] == [True] * 4 + [False, True] * 2
    contest = next(probe.contests("cpu", "tiny"))
    case = contest.data()
    assert contest.check(case, "auto").good
    case.options["route"] = "samples"
    assert not contest.check(case, "auto").good
    assert contest.ours(case, "auto")().dataset.attrs["route"] == "samples"


@pytest.mark.parametrize(
    ("name", "function"),
    [("residual_mlp", "residual_mlp"), ("spectrum", "eigvalsh"), ("spectrum", "effective_rank")],
)
def test_every_case_sees_what_is_wrong_on_its_own_size_only(name, function, monkeypatch):
    """Which implementation runs turns on the number of rows or matrices, and on gradients being asked."""
    original = getattr(rgfast, function)
    least = 300 if name == "residual_mlp" else 5

    def off(x, *args, **options):
        found = original(x, *args, **options)
        return found * (1 + 1e-5) if len(x) >= least else found

    monkeypatch.setattr(rgfast, function, off)
    contests = suite.BENCHMARKS[name].contests("cpu", "quick")
    word = {"residual_mlp": "forward", "eigvalsh": "eigvalsh", "effective_rank": "effective_rank"}[function]
    cases = [contest for contest in contests if contest.case.startswith(word)][:2]
    assert [contest.check(contest.data(), "auto").good for contest in cases] == [False, False]


def test_nothing_is_timed_on_a_red_gate(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rgfast, "residual_stack", slightly_wrong(rgfast.residual_stack))
    monkeypatch.setattr(suite, "run", lambda *_, **__: pytest.fail("something was timed"))
    (tmp_path / "bench.md").write_text("the table of an earlier run\n")
    words = ["bench", "--quick", "--only", "residual_mlp", "--out", str(tmp_path)]
    assert cli.main(words) == errors.FAILED
    told = capsys.readouterr()
    assert told.out == ""
    assert "RED residual_mlp on cpu: residual_stack" in told.err
    assert "the correctness gate is red" in told.err.splitlines()[-1]
    document = json.loads((tmp_path / "bench.json").read_text(), parse_constant=pytest.fail)
    assert document["green"] is False
    assert document["rows"] == []
    assert not (tmp_path / "bench.md").exists()


def plain(impl, check=None):
    """A call that runs one implementation whatever is asked for, and its check."""
    x = torch.ones(4, 20, 3)
    return (
        lambda _, asked: lambda: rgfast.effective_rank(x, impl=impl),
        lambda _, asked: check or Checked("plain", 0.0, 1.0),
    )


@pytest.fixture
def small(monkeypatch):
    """Two cases of a millisecond in place of the benchmarks', behind the true gate of one."""

    def absent(x):
        raise Absent("is not installed")

    def contests(device, size):
        assert (device, size) in (("cpu", "quick"), ("cpu", "full"))
        yield Contest(
            "small",
            lambda: torch.randn(4, 20, 3, generator=torch.Generator().manual_seed(0)),
            lambda x, impl: lambda: rgfast.effective_rank(x, impl=impl),
            lambda x, impl: Checked("small", 0.0, 1.0),
            {"one": lambda x: x.sum, "missing": absent, "two": lambda x: x.mean},
            one_thread=True,
        )
        yield Contest("again", lambda: None, *plain("reference"), {"one": lambda _: int})

    monkeypatch.setattr(suite.BENCHMARKS["spectrum"], "contests", contests)


def test_the_table_and_the_document(small, tmp_path, capsys, monkeypatch):
    words = ["bench", "--quick", "--only", "spectrum", "--seconds", "0.01", "--threads", "1"]
    assert cli.main([*words, "--out", str(tmp_path / "a" / "b")]) == errors.DONE
    told = capsys.readouterr()
    table = (tmp_path / "a" / "b" / "bench.md").read_text()
    lines = told.out.splitlines()
    assert lines == table.splitlines()[: len(lines)]
    assert "`rgfast bench --quick --only spectrum --threads 1 --seconds 0.01`" in lines[0]
    assert [line.split(" | ")[1:5] for line in lines[4:]] == [
        ["small", "cpu", rows, name] for rows, name in (("native", "one"), ("native", "two"))
    ] + [["again", "cpu", "reference", "one"]]
    assert table.endswith("- skipped: missing is not installed\n")
    assert "skipped: missing is not installed" in told.err
    document = json.loads((tmp_path / "a" / "b" / "bench.json").read_text(), parse_constant=pytest.fail)
    assert document["green"] is True
    assert document["machine"]["threads"] == 1
    assert document["machine"]["native"]["active"] == rgfast.runtime.native.active_isa()
    assert document["machine"]["versions"] == versions()
    for row in document["rows"]:
        assert 0 < row["low"] <= row["high"]
        assert math.isclose(row["times_faster"], row["rival_seconds"] / row["seconds"])


def test_one_device_is_asked_for(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert suite.devices() == ["cpu", "cuda"]
    assert suite.devices("cuda") == ["cuda"]
    words = ["bench", "--only", "spectrum", "--seconds", "0.01", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(words) == errors.DONE
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["devices"] == ["cpu"]
    assert {row["device"] for row in document["rows"]} == {"cpu"}
    assert "--device cpu" in document["command"]


def test_json_is_all_that_is_printed(small, tmp_path, capsys):
    words = ["bench", "--only", "spectrum", "--seconds", "0.01", "--json", "--out", str(tmp_path)]
    assert cli.main(words) == errors.DONE
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed == json.loads((tmp_path / "bench.json").read_text())


def test_a_value_that_is_wrong_on_the_case_itself_ends_it(tmp_path, capsys, monkeypatch):
    def contests(device, size):
        wrong = Checked("the case", math.nan, 1.0)
        yield Contest("bad", lambda: None, *plain("auto", wrong), {"one": lambda _: int})
        pytest.fail("it went on")

    monkeypatch.setattr(suite.BENCHMARKS["cka"], "contests", contests)
    words = ["bench", "--only", "cka", "--seconds", "0.01", "--out", str(tmp_path)]
    assert cli.main(words) == errors.FAILED
    assert "the case: error nan is more than 1e+00" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--threads", "999999"], f"threads must be at most {os.cpu_count()}, got 999999"),
        (["--seconds", "-1"], "seconds must lie between 0 and 3600, got -1"),
        (["--seconds", "nan"], "seconds must lie between 0 and 3600, got nan"),
        (
            ["--device", "cuda"],
            f"device must be cpu, got 'cuda': torch {torch.__version__} finds no GPU here",
        ),
    ],
)
def test_wrong_options(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", *words, "--out", str(tmp_path / "out")]) == errors.WRONG
    assert capsys.readouterr().err == f"rgfast: {message}\n"
    assert not (tmp_path / "out").exists()


def test_wrong_folder_and_name(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["bench", "--out", str(tmp_path / "file")]) == errors.WRONG
    assert "out must be a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["bench", "--only", "spectra"])
    assert "(did you mean spectrum?)" in capsys.readouterr().err


def test_turns_are_balanced_and_ratios_are_theirs_over_ours():
    order = []
    spent = turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0, least=4)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b", "b", "a"]
    assert {name: len(each) for name, each in spent.items()} == {"a": 4, "b": 4}
    assert ratio([2.0, 4.0, 6.0], [1.0, 1.0, 2.0]) == (4.0, 2.5, 3.5)
    wrong = Checked("x", 2.0, 1.0)
    contest = Contest("x", lambda: None, *plain("auto", wrong), {"y": lambda _: pytest.fail("timed")})
    with pytest.raises(WrongResult, match="nothing is timed"):
        run_contest("x", contest, 0.0)
