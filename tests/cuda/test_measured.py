"""Rows that say where kernels were measured: what they allow, and that nothing else is believed."""

import functools
import json
import types

import pytest
import torch

import rgfast
from rgfast import cli
from rgfast.bench import saving, suite
from rgfast.bench.timing import Checked, Contest, WrongResult
from rgfast.commands import errors
from rgfast.dispatch import Impl, Op, register
from rgfast.ops.spectrum.impl import cuda as spectrum_kernels
from rgfast.ops.spectrum.selection import EIGVALSH, SPECTRUM
from rgfast.runtime import measured
from rgfast.runtime.measured import Measured, refusal, save, saved, user_file
from rgfast.version import __version__

ROW = Measured(
    "toy",
    "cuda",
    "sm_90",
    "Fake GPU",
    "400 of d=16",
    "library",
    2.0,
    1.9,
    2.1,
    1e-3,
    2e-3,
    __version__,
    "2.13",
)


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """A user's empty folder for configurations, and no rows in the package."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(measured, "_ROOMS", tmp_path / "ops")
    measured._standing.cache_clear()
    yield tmp_path
    measured._standing.cache_clear()


def shipped(home, *rows, room="toy"):
    path = home / "ops" / room / "measured.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"format": "rgfast.measured/1", "rows": [row._asdict() for row in rows]}))
    measured._standing.cache_clear()


def test_a_kernel_is_taken_only_where_a_row_stands(package, here, home):
    package()
    nothing = "it was not measured on sm_90 (rgfast bench --device cuda --save does that)"
    assert refusal("toy", "cuda", here) == nothing
    shipped(home, ROW._replace(rgfast="0.0.1"))  # the package's own rows are of this version
    assert refusal("toy", "cuda", here) is None
    assert refusal("toy", "triton", here) == nothing
    assert refusal("other", "cuda", here) == nothing


def test_another_architecture_is_another_row(fake, package, here, home):
    package()
    shipped(home, ROW)
    fake.set(minor=3)
    assert "it was not measured on sm_93" in refusal("toy", "cuda", here)


def test_what_is_no_gpu_was_not_measured(package):
    package()
    assert refusal("toy", "cuda", torch.device("meta")) == "nothing was measured on meta"
    if not torch.cuda.is_available():
        assert refusal("toy", "cuda", torch.device("cuda", 0)) == "nothing was measured on cuda"


def test_a_loss_speaks_against_a_kernel_unless_it_is_within_the_spread(package, here, home):
    package()
    slow = ROW._replace(case="400 of d=64", times_faster=0.8, low=0.7, high=0.9)
    shipped(home, ROW, slow)
    assert (
        refusal("toy", "cuda", here)
        == "library was 1.25 times as fast where it was measured on sm_90 (400 of d=64)"
    )
    save([ROW, slow._replace(high=1.01)])
    assert refusal("toy", "cuda", here) is None


def test_a_loss_speaks_against_calls_of_its_size_alone(package, here, home):
    package()
    lost = {"times_faster": 0.8, "low": 0.7, "high": 0.9}
    shipped(
        home,
        ROW._replace(size=16),
        ROW._replace(size=128, case="400 of d=128", **lost),
        ROW._replace(size=128, case="40 of d=128"),
        ROW._replace(size=512, case="400 of d=512"),
    )
    loss = "library was 1.25 times as fast where it was measured on sm_90 (400 of d=128)"
    for size in (1, 16, 45, 257, 512, 4000):
        assert refusal("toy", "cuda", here, size) is None, size
    for size in (46, 128, 255, 256):  # 256 is as near to 128 as to 512
        assert refusal("toy", "cuda", here, size) == loss, size
    assert refusal("toy", "cuda", here) == loss
    save([ROW._replace(case="two layers", **lost), ROW._replace(size=16)])
    for size in (16, 512, None):  # what has no size speaks of all
        assert "(two layers)" in refusal("toy", "cuda", here, size)


def test_auto_takes_a_kernel_at_the_sizes_where_it_was_faster(fake, emulated_gpu, home, monkeypatch):
    """By the implementations themselves, which say what the size of a call is."""
    emulated_gpu.admit(EIGVALSH, SPECTRUM)
    monkeypatch.setattr(measured, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(spectrum_kernels, "_unproven", lambda side, dtype, device: None)
    for op in ("eigvalsh", "spectrum"):
        won, lost = (ROW._replace(op=op, size=d, case=f"d={d}") for d in (8, 60))
        save([won, lost._replace(times_faster=0.5, low=0.5, high=0.5)])
    for d, reason in (
        (8, None),
        (60, "library was 2.00 times as fast where it was measured on sm_90 (d=60)"),
    ):
        x = torch.randn(3, 200, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
        assert dict(rgfast.explain(rgfast.eigvalsh, x.mT @ x).candidates)["cuda"] == reason
        assert dict(rgfast.explain(rgfast.singular_values, x).candidates)["cuda"] == reason


def test_a_users_rows_take_the_place_of_the_packages(package, here, home):
    package()
    shipped(home, ROW)
    assert save([ROW._replace(times_faster=0.5, low=0.5, high=0.5)]) == user_file()
    assert "library was 2.00 times as fast" in refusal("toy", "cuda", here)


def test_rows_of_another_version_do_not_count_and_are_dropped(package, here):
    package()
    save([ROW._replace(rgfast="0.0.1"), ROW._replace(rgfast="0.0.1", op="other")])
    assert "it was not measured" in refusal("toy", "cuda", here)
    assert saved() == []
    save([ROW])
    assert [row["op"] for row in json.loads(user_file().read_text())["rows"]] == ["toy"]


def test_saving_keeps_what_was_measured_of_others():
    one, two, three = (
        ROW._replace(case="old"),
        ROW._replace(impl="triton"),
        ROW._replace(architecture="sm_89"),
    )
    save([one, two, three])
    save([ROW])
    assert sorted(saved()) == sorted([ROW, two, three])


def test_the_table_is_the_users_own(monkeypatch, tmp_path):
    assert user_file() == tmp_path / "config" / "rgfast" / "measured.json"
    monkeypatch.setenv("HOME", str(tmp_path))
    for home in ("", "relative"):
        monkeypatch.setenv("XDG_CONFIG_HOME", home)
        assert user_file() == tmp_path / ".config" / "rgfast" / "measured.json"


def document(**changes):
    return json.dumps({"format": "rgfast.measured/1", "rows": [ROW._asdict() | changes]})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "must be JSON"),
        ("\x80\x04K\x00.", "must be JSON"),
        ("[]", "must be a table of the format 'rgfast.measured/1'"),
        ('{"format": "rgfast.measured/1", "rows": 3}', "rows must be a list, got int"),
        ('{"format": "rgfast.measured/1", "rows": [3]}', r"rows\[0\] must have the fields op, .*, got int"),
        (document(more=1), r"rows\[0\] must have the fields op, impl, architecture, .*, more"),
        (document(op=3), r"rows\[0\]: op must be a string, got 3"),
        (document(times_faster="2"), r"rows\[0\]: times_faster must be a positive number, got '2'"),
        (document(high=True), r"rows\[0\]: high must be a positive number, got True"),
        (document(low=float("nan")), r"rows\[0\]: low must be a positive number, got nan"),
        (document(seconds=0), r"rows\[0\]: seconds must be a positive number, got 0"),
        (document(size=0), r"rows\[0\]: size must be a positive whole number or null, got 0"),
        (document(size=8.0), r"rows\[0\]: size must be a positive whole number or null, got 8.0"),
    ],
)
def test_a_table_that_is_not_valid_is_refused_or_ignored_with_a_warning(package, here, home, text, why):
    package()
    user_file().parent.mkdir(parents=True)
    user_file().write_bytes(text.encode("latin-1"))
    for call in (saved, lambda: save([ROW])):
        with pytest.raises(ValueError, match=f"measured.json.*{why}"):
            call()
    shipped(home, ROW)
    with pytest.warns(RuntimeWarning, match=f"the measured times of kernels are ignored: .*{why}"):
        assert refusal("toy", "cuda", here) is None
    assert refusal("toy", "triton", here) is not None  # and warns once


def test_a_table_that_cannot_be_read_is_ignored_with_a_warning(package, here):
    package()
    user_file().mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="the measured times of kernels are ignored: .*measured.json"):
        assert refusal("toy", "cuda", here) is not None


@pytest.fixture
def contests(monkeypatch):
    """A benchmark with an op of three implementations; a wrong one if ``wrong`` names it."""
    wrong = []

    def refused(call):
        return "it is too wide" if len(call.x) > 4 else None

    class Call:
        def __init__(self, x):
            self.x, self.device = x, x.device

        def shape_class(self):
            return len(self.x)

    op = Op(
        "toy",
        [
            Impl(
                "cuda", lambda call: call.x + 1, refused, devices=("cpu",),
                by_name_only=lambda call: refusal("toy", "cuda", call.device),
            ),
            Impl("library", lambda call: call.x + 1, cost=lambda call: 1.0),
            Impl("reference", lambda call: call.x + 1, cost=lambda call: 2.0),
        ],
    )  # fmt: skip

    def toy(x, impl="auto"):
        return op(impl, Call(x))

    def check(x, impl):
        toy(x, impl)
        return Checked("toy", float(impl in wrong), 0.0)

    def made(device, size):
        for n in (3, 5):
            yield Contest(
                f"n={n}", lambda n=n: torch.ones(n), lambda x, impl: lambda: toy(x, impl), check, {}, "toy",
                size=n,
            )  # fmt: skip
        yield Contest(
            "no op", lambda: 1, lambda x, impl: lambda: 1, lambda x, impl: Checked("none", 0.0, 0.0), {}
        )

    monkeypatch.setattr("rgfast.dispatch.explaining._OPS", {})
    monkeypatch.setattr("rgfast.dispatch.explaining._FUNCTIONS", {})
    register(op, toy)
    room = types.SimpleNamespace(contests=made, gate=lambda device: [check(torch.ones(1), "library")])
    monkeypatch.setitem(suite.BENCHMARKS, "spectrum", room)
    return types.SimpleNamespace(wrong=wrong, toy=toy)


SPENT = {"cuda": [2.0, 1.0, 4.0], "library": [3.0, 3.0, 3.0], "reference": [5.0, 9.0, 8.0]}


@pytest.fixture
def clock(monkeypatch):
    """Times as they would come from calls, which are made once."""

    def turns(calls, seconds, *, device):
        for call in calls.values():
            call()
        return {name: SPENT[name] for name in calls}

    monkeypatch.setattr(saving, "turns", turns)


def test_kernels_are_timed_against_the_fastest_other_and_then_taken(package, contests, clock, here):
    package()
    told = []
    with rgfast.record() as log:
        contests.toy(torch.ones(3))
    assert [entry.impl for entry in log] == ["library"]
    (row,) = saving.measured(["spectrum"], seconds=0.01, size="tiny", tell=told.append, device="cpu")
    assert row == Measured(
        "toy",
        "cuda",
        "sm_90",
        "cpu",
        "n=3",
        "library",
        1.5,
        1.125,
        2.25,
        2.0,
        3.0,
        __version__,
        torch.__version__,
        3,
    )
    assert told == ["skipped: n=5: toy: impl='cuda' cannot run this input: it is too wide"]
    save([row])
    with rgfast.record() as log:
        contests.toy(torch.ones(4))
    assert [entry.impl for entry in log] == ["cuda"]


@pytest.fixture
def bench(package, contests, clock, home, monkeypatch, capsys):
    """``rgfast bench --device cuda --save`` with the CPU in place of a GPU, and what it prints."""
    package()
    monkeypatch.setattr(suite, "devices", lambda asked: ["cpu"])
    monkeypatch.setattr(saving, "measured", functools.partial(saving.measured, device="cpu"))

    def run():
        words = ["bench", "--device", "cuda", "--save", "--quick", "--only", "spectrum", "--seconds", "0.01"]
        return cli.main([*words, "--out", str(home / "out")]), capsys.readouterr().err

    return run


def test_the_command_saves_what_it_measured(bench, home):
    code, told = bench()
    assert code == errors.DONE
    assert "cuda of toy, n=3: 1.50 times as fast as library" in told
    assert f"saved to {user_file()}" in told
    assert [row.case for row in saved()] == ["n=3"]
    assert json.loads((home / "out" / "bench.json").read_text())["command"].startswith(
        "rgfast bench --quick --only spectrum --device cuda --save"
    )


def test_the_command_saves_nothing_if_a_kernel_is_wrong(bench, contests):
    contests.wrong.append("cuda")
    code, told = bench()
    assert code == errors.FAILED
    assert "the correctness gate is red" in told
    assert not user_file().exists()


def test_the_command_says_if_no_kernel_ran(bench, monkeypatch):
    monkeypatch.setattr(saving, "KERNELS", ("triton",))
    assert "nothing was saved: no kernel for GPUs ran" in bench()[1]
    assert not user_file().exists()


def test_the_command_refuses_a_table_that_is_not_valid_before_it_measures(bench, monkeypatch):
    user_file().parent.mkdir(parents=True)
    user_file().write_text("[]")
    monkeypatch.setattr(suite, "check_all", lambda *_: pytest.fail("something was measured"))
    code, told = bench()
    assert code == errors.WRONG
    assert "must be a table of the format" in told


@pytest.mark.parametrize("words", [["--save"], ["--save", "--device", "cpu"]])
def test_the_command_saves_for_gpus_alone(words, capsys):
    assert cli.main(["bench", *words]) == errors.WRONG
    assert "rgfast: save must come with device cuda: what is saved are times" in capsys.readouterr().err


@pytest.mark.parametrize("impl", ["cuda", "library"])
def test_a_wrong_value_is_not_timed(package, contests, impl):
    package()
    contests.wrong.append(impl)
    with pytest.raises(WrongResult):
        list(saving.measured(["spectrum"], seconds=0.01, size="tiny", tell=print, device="cpu"))


def test_where_there_is_no_gpu_nothing_is_measured(package):
    package(there=False)
    with pytest.raises(ValueError, match="device must be a GPU, got 'cpu'"):
        list(saving.measured(["spectrum"], seconds=0.01, size="tiny", tell=print, device="cpu"))
