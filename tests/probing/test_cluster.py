"""The plan from numbers alone: what it counts is what is measured, and it names the option to take."""

import json
import re
import sys

import pytest
from launch import HERE, needs_gloo, printed_by

import rgfast
from rgfast.cli import main
from rgfast.probing.plan import make_plan

LARGE = {"layers": 81, "width": 8192, "tokens": 1e6}


@pytest.fixture(scope="module")
def found():
    # What is freed is given back.
    return printed_by("planned_in_forks.py", MALLOC_MMAP_THRESHOLD_="65536")


@needs_gloo
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("what", ["state", "peak", "network", "through"])
def test_bytes_are_those_that_are_measured(found, what):
    assert len(found) >= 4
    for case, figures in found.items():
        measured, *said = figures[what]  # by the plan, and by the run's own note
        assert measured > 1 << 23
        assert len(said) == (1 if what == "state" or (case, what) == ("shared out", "through") else 2)
        for number in said:
            assert 0.75 <= number / measured <= 1.25, (case, measured, said)


def test_state_and_operations_of_a_large_model():
    found = rgfast.plan_cluster(**LARGE, ranks=8, memory="96GiB")
    names = [option.call for option in found.options]
    pooled, alone = found.options[1], found.options[-1]
    assert names == [
        "default views",
        "views=['pooled']",
        "default views, owner='layers'",
        "views=['pooled'], owner='layers'",
        "views=['pooled'], measures= of rank only",
    ]
    moments = 8 * (161 * 8194**2 + 81 * 8192)
    assert moments < pooled.state_bytes <= moments + (256 << 20) + 10**6
    assert 2 * 7 * moments <= pooled.network_bytes < 1.05 * 2 * 7 * moments
    assert pooled.through_bytes == pytest.approx(6 * moments, rel=0.05)
    assert alone.state_bytes == pytest.approx(8 * 81 * 8194**2, rel=0.01)
    assert pooled.operations["moments"] == pytest.approx(2 * 161 * 8194**2 * 125_000, rel=1e-3)
    assert pooled.operations["spectra"] == pytest.approx(2 * 81 * 4 / 3 * 8192**3)
    assert pooled.operations["forward"] == 2 * 12 * 80 * 8192**2 * 125_000
    shared = found.options[3]
    part = 8 * (23 * 8194**2 + 12 * 8192)  # 11 layers and the next one
    assert shared.state_bytes == pytest.approx(part + 3 * (256 << 20), rel=0.01)
    # Of sequences of 2,048 tokens: 76 layers go out, and 12 come from each of the others and did before.
    rows = 2 * 2048 * 8192 * (76 + 2 * 7 * 12)
    assert shared.peak_bytes == pytest.approx(part + (256 << 20) + rows, rel=0.02)
    longer = rgfast.plan_cluster(**LARGE, ranks=8, memory="96GiB", length=8192).options[3]
    assert longer.peak_bytes == pytest.approx(part + (256 << 20) + 4 * rows, rel=0.02)
    assert shared.network_bytes == pytest.approx(2 * 7 * 125_000 * 88 * 8192, rel=0.01)
    assert shared.operations["spectra"] == pytest.approx(2 * 12 * 4 / 3 * 8192**3)
    assert shared.operations["moments"] == pytest.approx(2 * 23 * 8194**2 * 10**6, rel=1e-3)
    assert found.best is found.options[2]
    assert found.rows_bytes == 4 * 10**6 * 81 * 8192


def test_seconds_follow_from_operations_and_rates():
    rates = {"forward": 1e12, "products": 2e12, "network": 1e9, "weights": 1e10, "eigenvalues": 100.0}
    found = rgfast.plan_cluster(**LARGE, ranks=8, memory="96GiB", sharded=True, rates=rates)
    pooled = found.options[1]
    assert pooled.seconds["forward"] == pooled.operations["forward"] / 1e12
    assert pooled.seconds["moments"] == pooled.operations["moments"] / 2e12
    assert pooled.seconds["network"] == pooled.through_bytes / 1e9
    assert pooled.seconds["spectra"] == pytest.approx(2 * 81 * 8**3 / 100)
    assert found.gathered_bytes == found.forwards * 2 * found.parameters * 7 // 8
    assert pooled.seconds["weights"] == found.gathered_bytes / 1e10
    assert found.weight_bytes == 2 * found.parameters // 8
    assert pooled.total_seconds == sum(pooled.seconds.values())
    # Where few rows come, reading and writing the moments binds.
    slow = rgfast.plan_cluster(**LARGE, memory="96GiB", rates={"copies": 1e9}).options[1]
    moments = slow.network_bytes or 8 * 161 * 8194**2
    assert slow.seconds["moments"] == pytest.approx(2 * moments * 977 / 1e9, rel=1e-3)


def test_rates_are_those_that_were_measured():
    assert rgfast.ClusterRates().solving(1024) == pytest.approx(2.2e-3)
    assert rgfast.ClusterRates().solving(512) == pytest.approx(351e-6, rel=0.01)
    assert rgfast.ClusterRates().solving(2048) == pytest.approx(8 * 2.2e-3)


def test_one_rank_has_no_network():
    for option in rgfast.plan_cluster(layers=5, width=64, tokens=4096).options:
        assert (option.network_bytes, option.through_bytes, option.seconds["network"]) == (0, 0, 0)
        assert option.peak_bytes > option.state_bytes


def test_runs_over_some_layers_are_as_few_as_fit():
    found = rgfast.plan_cluster(**LARGE, memory="31GiB")
    whole, runs = found.options[1:3]
    assert (whole.fits, runs.fits, runs.runs) == (False, True, 3)
    assert found.best is runs
    assert runs.call == "views=['pooled'], layers= 28 at a time"  # 27, and the first of the next run
    assert runs.seconds["forward"] == pytest.approx(3 * whole.seconds["forward"])
    plan = make_plan(
        list(map(str, range(28))), [8192] * 28, 2048, positions="auto", views=["pooled"], pairs="adjacent",
        groups=1, memory=31 << 30, masked=False, refine=False, launched=True,
    )  # fmt: skip
    assert runs.state_bytes == plan.state_bytes <= 31 << 30
    with pytest.raises(ValueError, match="memory: the views of 42 layers need"):
        make_plan(
            list(map(str, range(42))), [8192] * 42, 2048, positions="auto", views=["pooled"],
            pairs="adjacent", groups=1, memory=31 << 30, masked=False, refine=False, launched=True,
        )  # fmt: skip


def test_runs_over_two_layers_are_one_for_each_pair():
    found = rgfast.plan_cluster(layers=12, width=48, tokens=4096, views=["pooled"], memory="100KiB")
    runs = next(one for one in found.options if "at a time" in one.call)
    assert (runs.call, runs.runs) == ("views=['pooled'], layers= 2 at a time", 11)


def test_all_that_was_asked_is_taken_where_it_fits():
    found = rgfast.plan_cluster(layers=7, width=64, tokens=1e5, length=128)
    assert found.best is found.options[0]
    assert found.best.kept == "position, pooled, mean_pooled, 128 of 128 positions"
    some = rgfast.plan_cluster(
        layers=7, width=64, tokens=1e5, length=128, views=["position", "pooled"], positions=[0, 5]
    ).best
    assert some.call == "views=['position', 'pooled'], positions=[0, 5]"
    assert some.kept == "position, pooled, 2 of 128 positions"


def test_layers_are_shared_out_without_pairs_too():
    calls = [option.call for option in rgfast.plan_cluster(**LARGE, ranks=8, pairs=[]).options]
    assert calls[2:] == ["default views, owner='layers'", "views=['pooled'], owner='layers'"]


def test_groups_are_shared_out_with_the_layers():
    single, double = (
        next(one for one in found.options if one.call == "views=['pooled'], owner='layers'")
        for found in (rgfast.plan_cluster(**LARGE, ranks=8, groups=groups) for groups in (1, 2))
    )
    assert double.state_bytes == pytest.approx(2 * single.state_bytes, rel=0.05)
    assert double.operations["spectra"] == pytest.approx(3 * single.operations["spectra"])


def test_nothing_fits():
    found = rgfast.plan_cluster(**LARGE, ranks=8, memory="1MiB")
    assert found.best is None
    assert "nothing fits: memory= must be at least" in str(found)


def test_the_command_prints_the_same(capsys):
    words = ["plan", "--layers", "81", "--width", "8192", "--tokens", "1e6", "--ranks", "8"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert text == f"{rgfast.plan_cluster(**LARGE, ranks=8)}\n"
    assert "take 3: default views, owner='layers'" in text
    assert "predictions" in text
    assert text.endswith("not run on a GPU\n")
    more = ["--memory", "56GiB", "--sharded", "--rate", "network=5e9", "copies=1e12", "--json"]
    assert main([*words, *more, "--views", "pooled", "--length", "512", "--parameters", "7e10"]) == 0
    document = json.loads(capsys.readouterr().out)
    same = rgfast.plan_cluster(
        **LARGE, ranks=8, memory="56GiB", sharded=True, rates={"network": 5e9, "copies": 1e12},
        views=["pooled"], length=512, parameters=7e10,
    )  # fmt: skip
    assert document == json.loads(json.dumps(same.to_json()))
    assert document["best"] == same.best.call
    assert document["rates"]["network"] == 5e9


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"layers": 0}, ValueError, "layers must be at least 1, got 0"),
        ({"width": 2.5}, TypeError, "width must be a whole number, got 2.5"),
        ({"tokens": 0.5}, ValueError, "tokens must be a whole number of at least 1, got 0.5"),
        ({"tokens": float("inf")}, ValueError, "tokens must be a whole number of at least 1, got inf"),
        ({"ranks": 0}, ValueError, "ranks must be at least 1"),
        ({"device": "tpu"}, ValueError, "device must be one of 'cuda', 'cpu', got 'tpu'"),
        ({"rates": {"speed": 1.0}}, ValueError, "rates must be among forward, products, .* got 'speed'"),
        ({"rates": {"network": 0}}, ValueError, r"rates\['network'\] must be a finite number > 0, got 0"),
        ({"views": ["masked"]}, ValueError, "views must be those of sequences without a mask, got masked"),
        ({"views": ["pool"]}, ValueError, "views must be among"),
        ({"positions": [4096]}, ValueError, "positions must be indices from 0 to 2047"),
        ({"memory": "much"}, ValueError, "memory must be bytes or text"),
    ],
)
def test_wrong_numbers(asked, error, message):
    with pytest.raises(error, match=message):
        rgfast.plan_cluster(**{**LARGE, **asked})


def test_the_page_shows_what_the_command_prints(capsys):
    page = (HERE.parents[1] / "docs" / "howto" / "large_models.md").read_text(encoding="utf-8")
    sessions = re.findall(r"```text\n\$ rgfast (plan [^\n]*)\n(.*?)```", page, re.DOTALL)
    assert len(sessions) >= 2
    for words, shown in sessions:
        assert main(words.split()) == 0
        assert capsys.readouterr().out == shown


def test_wrong_words(capsys):
    words = ["plan", "--layers", "8", "--width", "64", "--tokens", "1e4"]
    assert main([*words, "--rate", "network"]) == 2
    assert "rate must be NAME=VALUE such as network=5e9, got network" in capsys.readouterr().err
