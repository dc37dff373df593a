"""The rules of the two answers, on results made up for the purpose."""

import json
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
DECAY = 0.3 * 0.5 ** np.arange(6)
EVEN = np.full(6, 0.02)


def result(seeds=3, short=FALL, long=FLAT, drift=STEP, control_drift=EVEN, captured=0.97, chain="two-scale"):
    """A saved result in which every view of a run has the same curve, and controls keep the rank."""
    shape = (1, 2, seeds, len(STAGES), len(VIEWS))
    rank = np.empty((*shape, 7))
    rank[:] = FLAT
    rank[0, 0, :, 0], rank[0, 1, :, 0] = short, long
    rank *= 1 + 0.001 * np.arange(seeds)[:, None, None, None]
    rank[..., VIEWS.index("masked"), 0] = 0
    drifts = np.broadcast_to(control_drift, (*shape, 6)).copy()
    drifts[:, :, :, 0] = drift
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


def with_survival(dataset, slow=0.93, fast=0.5, control_slow=0.95, control_fast=0.98, posterior=0.99):
    """Mode survival in the last layer: trained stacks at the short ξ, controls, masked rows."""
    stages = dataset.sizes["stage"]
    values = np.ones((1, 2, dataset.sizes["seed"], stages, 2, 2, 7))
    values[..., 0, 0, -1], values[..., 0, 1, -1] = control_slow, control_fast
    values[:, 0, :, 0, 0, 0, -1], values[:, 0, :, 0, 0, 1, -1] = slow, fast
    values[..., 1, :, -1] = posterior
    dims = ("chain", "xi", "seed", "stage", "process", "mode", "layer")
    return dataset.assign_coords(process=["visible", "masked"], mode=[0, 1]).assign(survival=(dims, values))


def judged(dataset, chain="two-scale", **bars):
    return {v.key: v for v in judge(dataset, chain, Thresholds(**bars))}


def words(dataset, chain="two-scale", **bars):
    """Both words of every finding."""
    return {
        key: (v.as_stated.status, v.reading.status if v.reading else None)
        for key, v in judged(dataset, chain, **bars).items()
    }


def put(dataset, values, variable="effective_rank", **where):
    """``values`` at a place of the dataset."""
    dataset[variable].loc[where] = values
    return dataset


def test_the_papers_picture_is_reproduced_and_its_reading_supported():
    found = words(with_survival(result()))
    assert found == {
        "valid": ("valid", None),
        "i": ("reproduced", "supported"),
        "ii": ("reproduced", "supported"),
        "iii": ("reproduced", "supported"),
        "iii-long": ("reported", "reported"),
        "concentration": ("reproduced", "undecided"),
    }


def test_no_fall_is_not_reproduced_and_leaves_nothing_to_read():
    found = words(with_survival(result(short=FLAT)))
    assert found["i"] == ("not reproduced", "not supported")
    assert found["concentration"][0] == found["ii"][0] == "not reproduced"


def test_a_fall_at_both_lengths_is_not_selective():
    found = words(with_survival(result(long=FALL)))
    assert found["i"][0] == "reproduced"
    assert found["ii"][0] == "not reproduced"


@pytest.mark.parametrize("view", ["visible", "masked", "pooled", "mean_pooled", "flattened"])
def test_the_view_position_decides_and_the_others_stand_beside_it(view):
    dataset = put(result(), FLAT, stage="trained", xi=1.0, view=view)
    found = judged(dataset)
    assert found["i"].status == found["ii"].status == "reproduced"
    assert f"{view.replace('_', '-')}{' from layer 1' if view == 'masked' else ''} 1.0" in found["i"].beside
    assert found["i"].quantity(f"R, {view}").pooled.mean > 1
    other = judged(put(result(), FLAT, stage="trained", xi=1.0, view="position"))
    assert other["i"].status == other["ii"].status == "not reproduced"
    with pytest.raises(ValueError, match="must have the view 'position', got visible, masked"):
        judge(dataset.sel(view=["visible", "masked"]))


def test_one_seed_above_the_bar_makes_a_fall_partial():
    verdict = judged(put(result(), FALL + 30, stage="trained", xi=1.0, seed=1, view="position"))["i"]
    assert verdict.status == "partial"
    assert [(c.name, c.seed) for c in verdict.as_stated.checks if not c.holds] == [("R", 1)]


def test_an_upward_step_of_the_mean_curve_makes_the_fall_partial():
    bumpy = FALL.copy()
    bumpy[4] += 0.7
    verdict = judged(result(short=bumpy))["i"]
    assert verdict.status == "partial"
    assert [c.name for c in verdict.as_stated.checks if not c.holds] == [
        "largest upward step of the mean curve"
    ]
    small = FALL.copy()
    small[4] += 0.6
    assert judged(result(short=small))["i"].status == "reproduced"


def test_r_and_monotonicity_are_given_from_the_input_and_from_layer_one():
    rising = FALL.copy()
    rising[0] = 9
    verdict = judged(result(short=rising))["i"]
    assert verdict.quantity("R").pooled.mean == pytest.approx(7.1 / 9)
    assert verdict.quantity("R from layer 1").pooled.mean == pytest.approx(0.71)
    assert verdict.details["mean_curve"]["largest_rise"] == pytest.approx(1, rel=0.01)
    assert verdict.details["mean_curve_from_layer_1"]["largest_rise"] == 0
    assert "from layer 1 R = 0.71 (0.71 to 0.71), no upward step" in verdict.as_stated.summary
    assert judged(result())["concentration"].quantity("R").pooled.mean == pytest.approx(0.71)


def test_below_captured_the_numbers_are_judged_and_the_readings_are_not():
    verdicts = judged(with_survival(result(captured=0.85)))
    assert verdicts["valid"].status == "undertrained"
    for key in ("i", "ii", "iii"):
        assert verdicts[key].status == "reproduced"
        assert "all 3 seeds did not learn the task" in verdicts[key].as_stated.summary
        assert verdicts[key].reading.status == "undecided"
        assert verdicts[key].reading.summary == "all 3 seeds did not learn the task"
    assert words(with_survival(result(captured=0.85)), captured=0.8)["i"] == ("reproduced", "supported")


def test_a_stack_that_sees_no_neighbor_cannot_learn():
    dataset = result(captured=-0.01)
    dataset.attrs["config"] = json.dumps({"mixing": "none"})
    verdicts = judged(dataset)
    assert "cannot learn the task without mixing" in verdicts["i"].as_stated.summary
    assert "without mixing a stack cannot learn the task" in verdicts["valid"].as_stated.summary


def test_one_seed_that_did_not_learn_is_left_out_of_the_reading_alone():
    dataset = put(with_survival(result()), 0.5, "captured", seed=1, xi=1.0, stage="trained")
    verdict = judged(dataset)["i"]
    assert list(verdict.quantity("R").by_seed) == ["0", "1", "2"]
    assert {c.seed for c in verdict.reading.checks} == {0, 2}
    assert "left out: seed 1 did not learn the task" in verdict.reading.summary


@pytest.mark.parametrize(
    ("modes", "status"),
    [
        ({}, "supported"),
        ({"fast": 0.8}, "not supported"),  # D = 0.16
        ({"control_fast": 0.4}, "not supported"),
        ({"slow": 0.5, "fast": 0.5}, "not supported"),  # all modes are lost alike
        (None, "undecided"),
    ],
)
def test_where_a_control_falls_as_far_the_modes_decide(modes, status):
    dataset = put(result(), FALL * np.linspace(1, 0.5, 7), stage="control_iid", xi=1.0, view="position")
    dataset["stable_rank"] = dataset.effective_rank / 5
    dataset.stable_rank.loc[{"stage": "control_iid", "xi": 1.0, "view": "position"}] = 1.1
    if modes is not None:
        dataset = with_survival(dataset, **modes)
    verdict = judged(dataset)["i"]
    assert verdict.status == "reproduced"  # what the numbers are does not depend on controls
    assert verdict.reading.status == status
    assert "i.i.d. falls as far (R 0.30" in verdict.reading.summary
    (note,) = verdict.notes
    assert "a stack trained on i.i.d. tokens falls as far, with stable rank 1.10 at the last layer" in note
    assert "(trained: 1.42)" in note
    assert "controls: i.i.d. 0.30" in verdict.as_stated.summary
    if status == "supported":
        assert all(check.holds for check in verdict.reading.checks)


def test_modes_are_measured_by_their_difference_from_both_controls():
    verdict = judged(with_survival(result()))["i"]
    assert verdict.quantity("D, control_iid").pooled.mean == pytest.approx((0.98 - 0.5) - (0.95 - 0.93))
    assert verdict.quantity("R² slow").pooled.mean == 0.93
    assert verdict.quantity("R² fast, control_permuted").pooled.mean == 0.98


def test_without_both_controls_readings_are_undecided():
    dataset = with_survival(result()).sel(stage=["trained", "control_iid"])
    found = words(dataset)
    assert found["i"] == found["ii"] == found["iii"] == ("reproduced", "undecided")


@pytest.mark.parametrize(
    ("attrs", "chain", "status"),
    [
        ({}, "two-scale", "partial"),
        ({"setup": "default"}, "two-scale", "partial"),
        ({"setup": "other"}, "two-scale", "reproduced"),
        ({"setup": "default"}, "ring-heat", "reproduced"),
    ],
)
def test_a_smaller_gap_is_enough_in_another_set_up(attrs, chain, status):
    dataset = result(short=FLAT * np.linspace(1, 0.8, 7), chain=chain).assign_attrs(attrs)
    assert 0.15 < judged(dataset, chain)["ii"].quantity("R_long − R_short").pooled.mean < 0.25
    assert words(dataset, chain)["ii"][0] == status


def test_a_rank_that_falls_at_the_long_length_too_is_partly_selective():
    verdict = judged(result(long=FLAT * np.linspace(1, 0.85, 7)))["ii"]
    assert verdict.status == "partial"
    assert {c.name for c in verdict.as_stated.checks if not c.holds} == {"R_long"}


def test_intervals_come_with_five_seeds_and_must_exclude_zero():
    assert math.isnan(judged(result(3))["ii"].quantity("R_long − R_short").pooled.low)
    dataset = result(5)
    for seed, last in enumerate((7, 7, 7, 7, 12)):
        curve = np.linspace(12, last, 7)
        put(dataset, curve, stage="trained", xi=1.0, seed=seed, view="position")
    verdict = judged(dataset)["ii"]
    assert verdict.status == "reproduced"
    name = "95% interval of R_long − R_short, lower end"
    assert next(c for c in verdict.as_stated.checks if c.name == name).holds
    for seed, last in enumerate((2, 12.5, 12.5, 12.5, 12.5)):
        put(dataset, np.linspace(12, last, 7), stage="trained", xi=1.0, seed=seed, view="position")
    verdict = judged(dataset, gap=0.15)["ii"]
    assert verdict.status == "partial"
    assert [c.name for c in verdict.as_stated.checks if not c.holds and c.seed is None] == [name]


@pytest.mark.parametrize(
    ("modes", "status"),
    [({}, "supported"), ({"posterior": 0.96}, "not supported"), ({"fast": 0.8}, "not supported")],
)
def test_what_the_task_needs_survives_as_far_as_captured(modes, status):
    assert words(with_survival(result(), **modes))["ii"] == ("reproduced", status)


def test_one_eigenspace_leaves_the_modes_undecided():
    dataset = with_survival(result()).isel(mode=[0])
    assert words(dataset)["ii"] == ("reproduced", "undecided")
    assert words(dataset)["i"] == ("reproduced", "supported")  # falls more than both controls anyway


def test_a_step_is_named_with_its_transitions_by_seed():
    drift = np.array([0.01, 0.012, 0.3, 0.011, 0.2, 0.012])
    verdict = judged(result(drift=drift))["iii"]
    assert verdict.status == "reproduced"
    assert verdict.reading.status == "supported"
    assert "largest at 2→3 and 4→5 in 3 of 3" in verdict.as_stated.summary
    assert verdict.details["largest_transitions"] == {"0": [2, 4], "1": [2, 4], "2": [2, 4]}
    assert verdict.details["shapes"]["0"]["step_at"] == (2, 4)


def test_a_decay_is_concentrated_and_no_step():
    verdict = judged(result(drift=DECAY))["iii"]
    assert verdict.status == "reproduced"  # the median of the others is 9% of the largest, and 0.028
    assert verdict.reading.status == "not supported"
    assert "geometric decay, rate 0.5" in verdict.reading.summary
    assert "decay over step by" in verdict.reading.summary
    assert verdict.details["decay_rate"] == pytest.approx(0.5, rel=0.02)


def test_concentration_is_asked_against_broken_sticks_of_as_many_seeds():
    one, five = (judged(result(n, drift=DECAY * [1, 1.2, 1, 1.3, 1, 1]))["iii"] for n in (1, 5))
    assert one.quantity("top-2 share").pooled.mean == pytest.approx(0.75, abs=0.01)
    assert one.details["top2_null"] == pytest.approx(0.826, abs=0.002)
    assert five.details["top2_null"] == pytest.approx(0.726, abs=0.002)
    assert (one.status, five.status) == ("not reproduced", "partial")


def test_a_plateau_is_low_and_not_only_lower():
    verdict = judged(result(drift=10 * STEP))["iii"]
    assert verdict.status == "partial"
    assert [c.name for c in verdict.as_stated.checks if not c.holds] == ["median of the others"]


@pytest.mark.parametrize("stage", ["control_iid", "control_permuted"])
def test_a_control_as_concentrated_takes_the_reading_away(stage):
    dataset = put(result(), STEP * [2, 1, 1, 1, 1, 1], "kernel_drift", stage=stage, view="position")
    verdict = judged(dataset)["iii"]
    assert verdict.status == "reproduced"
    assert verdict.reading.status == "not supported"
    assert "is at least as concentrated" in verdict.reading.summary
    assert "step over decay" in verdict.reading.summary


def test_an_even_drift_is_flat():
    verdict = judged(result(drift=EVEN, control_drift=EVEN))["iii"]
    assert verdict.status == "not reproduced"
    assert "flat: ΔBIC over flat" in verdict.reading.summary
    assert verdict.details["shape"] == "flat"


def test_five_transitions_leave_the_shape_undecided():
    dataset = result().isel(transition=slice(5), layer=slice(6))
    verdict = judged(dataset)["iii"]
    assert verdict.reading.status == "undecided"
    assert "shape not judged: 5 transitions, and it takes 6" in verdict.reading.summary
    two = judged(result().isel(transition=slice(2), layer=slice(3)))["iii"]
    assert two.status == "not measured"
    still = judged(put(result(), 0.0, "kernel_drift", view="position", stage="trained"))["iii"]
    assert still.status == "not measured"


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
    assert words(result(chain=chain, short=short, long=long), chain)["control"] == (status, None)


def test_one_correlation_length_has_no_selectivity():
    assert set(words(result().isel(xi=[0]))) == {"valid", "i", "iii", "concentration"}


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"chain must be one of .*two-scale.*, got 'ring'"):
        judge(result(), "ring")
    with pytest.raises(ValueError, match="variable 'captured'"):
        judge(result().drop_vars("captured"), "two-scale")
    verdict = judged(result())["i"]
    with pytest.raises(KeyError, match="name must be one of R, R from layer 1"):
        verdict.quantity("nothing")
