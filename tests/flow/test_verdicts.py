import math

import numpy as np
import pytest
import xarray as xr

from rgfast.flow import Thresholds, judge

STAGES = ["trained", "control_iid", "control_permuted", "untrained"]
VIEWS = ["visible", "masked", "position", "pooled", "mean_pooled", "flattened"]
FALL = np.array([12, 10, 8.5, 7.8, 7.4, 7.2, 7.1])
FLAT = np.array([12, 12.3, 12.5, 12.5, 12.6, 12.6, 12.6])
STEP = np.array([0.3, 0.012, 0.011, 0.012, 0.011, 0.012])
DECAY = 0.3 * 0.6 ** np.arange(6)


def result(seeds=3, short=FALL, long=FLAT, drift=STEP, captured=0.97, chain="two-scale"):
    """A saved result in which every view of a run has the same curve."""
    shape = (1, 2, seeds, len(STAGES), len(VIEWS))
    rank = np.empty((*shape, 7))
    rank[:] = FLAT
    rank[0, 0, :, 0], rank[0, 1, :, 0] = short, long
    rank *= 1 + 0.001 * np.arange(seeds)[:, None, None, None]
    rank[..., VIEWS.index("masked"), 0] = 0
    drifts = np.broadcast_to(drift, (*shape, 6)).copy()
    drifts *= np.exp(0.02 * np.random.default_rng(0).standard_normal(drifts.shape))
    drifts[..., VIEWS.index("masked"), 0] = math.nan
    dims = ("chain", "xi", "seed", "stage", "view")
    return xr.Dataset(
        {
            "effective_rank": ((*dims, "layer"), rank),
            "kernel_drift": ((*dims, "transition"), drifts),
            "kernel_change": ((*dims, "transition"), 2 * drifts),
            "captured": (dims[:4], np.full(shape[:4], captured)),
        },
        coords={
            "chain": [chain],
            "xi": [1.0, 7.0],
            "seed": np.arange(seeds),
            "stage": STAGES,
            "view": VIEWS,
            "layer": np.arange(7),
            "transition": np.arange(6),
        },
    )


def statuses(dataset, chain="two-scale", **bars):
    return {v.key: v.status for v in judge(dataset, chain, Thresholds(**bars))}


def test_the_papers_picture_is_reproduced():
    found = statuses(result())
    assert found["valid"] == "valid"
    assert found["i"] == found["i-masked"] == found["ii"] == found["iii-visible"] == "reproduced"
    assert found["iii-visible-long"] == found["iii-masked-long"] == "reported"


def test_no_collapse_is_not_reproduced():
    found = statuses(result(short=FLAT))
    assert found["i"] == found["i-masked"] == found["ii"] == "not reproduced"


def test_collapse_at_both_lengths_is_not_selective():
    found = statuses(result(long=FALL))
    assert found["i"] == "reproduced"
    assert found["ii"] == "not reproduced"


def test_a_weak_selection_is_partial():
    found = statuses(result(long=FLAT * np.linspace(1, 0.8, 7)))
    assert found["ii"] == "partial"


def test_an_upward_step_makes_the_fall_partial():
    bumpy = FALL.copy()
    bumpy[4] += 1.0
    verdict = next(v for v in judge(result(short=bumpy), "two-scale") if v.key == "i")
    assert verdict.status == "partial"
    missed = [c for c in verdict.checks if not c.holds]
    assert [c.name for c in missed] == ["largest upward step of the mean"]


def test_undertrained_runs_get_no_verdict():
    found = statuses(result(captured=0.85))
    assert found["valid"] == found["i"] == found["ii"] == found["iii-visible"] == "undertrained"
    assert statuses(result(captured=0.85), captured=0.8)["i"] == "reproduced"


def test_one_undertrained_seed_is_left_out_of_the_others():
    dataset = result()
    dataset.captured.loc[{"seed": 1, "xi": 1.0, "stage": "trained"}] = 0.5
    verdicts = {v.key: v for v in judge(dataset, "two-scale")}
    assert verdicts["valid"].status == "undertrained"
    assert [row["seed"] for row in verdicts["i"].per_seed] == [0, 2]


def test_a_control_that_collapses_too_spoils_the_finding():
    dataset = result()
    where = {"stage": "control_iid", "view": "visible", "xi": 1.0}
    dataset.effective_rank.loc[where] = FALL * np.linspace(1, 0.5, 7)
    dataset["stable_rank"] = dataset.effective_rank / 5
    dataset.stable_rank.loc[where] = 1.1
    verdict = next(v for v in judge(dataset, "two-scale") if v.key == "i")
    assert verdict.status == "partial"
    assert len(verdict.notes) == 1
    assert (
        "control_iid falls as far, with stable rank 1.10 at the last layer (trained: 1.42)"
        in verdict.notes[0]
    )


def test_a_decaying_drift_is_named_a_relaxation_with_its_rate():
    verdict = next(v for v in judge(result(drift=DECAY), "two-scale") if v.key == "iii-visible")
    assert verdict.status == "not reproduced"
    assert "relaxation to a fixed point (up to scale), rate 0.60" in verdict.summary
    assert verdict.pooled["decay_rate"] == pytest.approx(0.6, rel=0.02)
    assert verdict.pooled["top2_null"] == pytest.approx(0.65)


def test_the_masked_process_starts_at_layer_one():
    verdict = next(v for v in judge(result(), "two-scale") if v.key == "i-masked")
    assert verdict.per_seed[0]["first"] == pytest.approx(10)


def test_intervals_come_with_five_seeds():
    three = next(v for v in judge(result(3), "two-scale") if v.key == "ii").pooled["gap_visible"]
    five = next(v for v in judge(result(5), "two-scale") if v.key == "ii").pooled["gap_visible"]
    assert math.isnan(three["low"])
    assert five["low"] < five["mean"] < five["high"]


def test_a_mean_pooled_picture_that_differs_is_printed():
    dataset = result()
    dataset.effective_rank.loc[{"view": "mean_pooled", "xi": 7.0, "stage": "trained"}] = FALL * 0.9
    verdict = next(v for v in judge(dataset, "two-scale") if v.key == "ii")
    assert any("mean_pooled says otherwise" in note for note in verdict.notes)


@pytest.mark.parametrize(
    ("chain", "short", "long", "status"),
    [
        ("lazy", FLAT, FLAT, "reproduced"),
        ("lazy", FALL, FALL, "not reproduced"),
        ("two-scale:r=30", FALL, FALL, "reproduced"),
        ("two-scale:r=30", FALL, FLAT, "not reproduced"),
    ],
)
def test_control_chains(chain, short, long, status):
    assert statuses(result(chain=chain, short=short, long=long), chain)["control"] == status


def test_one_correlation_length_has_no_selectivity():
    assert "ii" not in statuses(result().isel(xi=[0]))


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"chain must be one of .*two-scale.*, got 'ring'"):
        judge(result(), "ring")
    with pytest.raises(ValueError, match="variable 'captured'"):
        judge(result().drop_vars("captured"), "two-scale")


def with_survival(dataset, slow=0.93, fast=0.5, control_fast=0.98):
    """Mode survival added: the trained stack's last layer as given, everything else intact."""
    stages = dataset.sizes["stage"]
    values = np.ones((1, 2, dataset.sizes["seed"], stages, 2, 2, 7))
    values[..., 1, -1] = control_fast
    values[:, 0, :, 0, 0, 0, -1], values[:, 0, :, 0, 0, 1, -1] = slow, fast
    dims = ("chain", "xi", "seed", "stage", "process", "mode", "layer")
    return dataset.assign_coords(process=["visible", "masked"], mode=[0, 1]).assign(survival=(dims, values))


@pytest.mark.parametrize(
    ("numbers", "status"),
    [
        ({}, "reproduced"),
        ({"slow": 0.6}, "partial"),
        ({"fast": 0.8}, "partial"),
        ({"control_fast": 0.4}, "partial"),
        ({"slow": 0.5, "fast": 0.9}, "not reproduced"),
    ],
)
def test_mode_survival_is_judged_against_its_bars_and_controls(numbers, status):
    found = {v.key: v for v in judge(with_survival(result(), **numbers), "two-scale")}
    assert found["ii-b"].status == status
    assert found["ii-b-long"].status == "reported"


def test_mode_survival_shows_the_controls_and_an_interval_from_five_seeds():
    few = {v.key: v for v in judge(with_survival(result()), "two-scale")}["ii-b"]
    many = {v.key: v for v in judge(with_survival(result(seeds=5)), "two-scale")}["ii-b"]
    assert "control_iid 1.00 and 0.98" in many.summary
    assert math.isnan(few.pooled["gap"]["low"])
    assert many.pooled["gap"]["low"] == pytest.approx(0.43)


def test_mode_survival_needs_two_eigenspaces():
    one = with_survival(result()).isel(mode=[0])
    assert statuses(one)["ii-b"] == "not measured"
