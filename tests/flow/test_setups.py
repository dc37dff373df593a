import json
import math

import numpy as np
import pytest

from rgfast.files import as_json
from rgfast.flow.setups import SetupRun, judge_arm

XI = (1.2, 6.7)


def run(
    xi, seed, rank=(15.0, 18.0, 20.0), masked=(0.0, 12.0, 9.0), captured=0.95, start=1.0, drift=(0.3, 0.1)
):
    """A run whose other views and conventions are those of all rows."""
    views = {"position": list(rank), "visible": list(rank), "masked": list(masked), "mean_pooled": list(rank)}
    moved = {view: list(drift) for view in views}
    untrained = {view: [10.0, 10.0, 10.0 * start] for view in views}
    return SetupRun(
        xi,
        seed,
        16,
        {
            stage: {
                "effective_rank": ranks,
                "effective_rank_uncentred": ranks,
                "kernel_drift": moved,
                "captured": captured,
            }
            for stage, ranks in (("trained", views), ("untrained", untrained))
        },
    )


def arm(short, long, seeds=range(5), null=False, **options):
    """Runs that end at these multiples of the first rank."""
    runs = []
    for seed in seeds:
        for xi, ratio in zip(XI, (short[seed], long[seed]), strict=True):
            runs.append(run(xi, seed, rank=(10.0, 10 * (1 + ratio) / 2, 10 * ratio), **options))
    return judge_arm("arm", runs, XI, 2 * len(seeds), null)


FALLING = [0.60, 0.65, 0.62, 0.70, 0.58]
STAYING = [1.00, 1.02, 0.98, 1.01, 0.99]


def test_a_fall_at_the_short_length_alone_is_both_statements():
    found = arm(FALLING, STAYING)
    assert found.answers["i"].status == found.answers["ii"].status == "reproduced"
    gap = np.subtract(STAYING, FALLING)
    half = 2.7764451 * gap.std(ddof=1) / 5**0.5  # t(0.975, 4)
    interval = found.gaps["position"]
    assert interval.low == pytest.approx(gap.mean() - half, rel=1e-6)
    assert interval.high == pytest.approx(gap.mean() + half, rel=1e-6)
    assert set(found.gaps) == {
        "position", "position, uncentered", "visible", "mean-pooled", "mean-pooled, uncentered"
    }  # fmt: skip
    assert found.together == ["i", "ii"]
    assert (found.seeds, found.missing) == ((0, 1, 2, 3, 4), 0)


def test_a_fall_at_both_lengths_is_the_first_statement_alone():
    found = arm(FALLING, [r + 0.02 for r in FALLING])
    assert found.answers["i"].status == "reproduced"
    # Above 0 in every seed and with an interval, but far from the bar.
    assert found.answers["ii"].status == "partial"


def test_a_gap_of_either_sign_is_not_selective():
    found = arm(FALLING, [r + d for r, d in zip(FALLING, (0.3, -0.1, 0.2, 0.2, 0.2), strict=True)])
    assert found.answers["ii"].status == "not reproduced"


def test_a_fall_that_is_there_untrained_is_not_after_training():
    found = arm(FALLING, STAYING, start=0.5)
    assert found.answers["i"].status == "partial"
    assert any(c.name == "R − untrained R" and not c.holds for c in found.answers["i"].checks)


def test_below_five_seeds_there_is_no_interval():
    found = arm(FALLING, STAYING, seeds=range(4), null=True)
    assert found.answers["ii"].status == "partial"
    assert found.answers["null"].status == "undecided"
    assert math.isnan(found.gaps["position"].low)


@pytest.mark.parametrize(
    ("gaps", "word"),
    [
        ([0.01, -0.02, 0.015, -0.005, 0.004], "valid"),
        ([0.10, 0.12, 0.11, 0.09, 0.10], "refuted"),
        ([-0.10, -0.12, -0.11, -0.09, -0.10], "refuted"),
    ],
)
def test_the_null_asks_for_0_in_the_interval(gaps, word):
    found = arm(FALLING, [r + gap for r, gap in zip(FALLING, gaps, strict=True)], null=True)
    assert found.answers["null"].status == word


def test_rows_that_are_all_alike_see_no_neighbor():
    deaf = {"masked": (0.0, 0.0, 0.0), "captured": -0.001}
    assert arm(FALLING, STAYING, **deaf).answers["neighbors"].status == "not reproduced"
    assert arm(FALLING, STAYING).answers["neighbors"].status == "reproduced"
    # One of the two signs is partial: they should agree.
    assert arm(FALLING, STAYING, masked=(0, 0, 0)).answers["neighbors"].status == "partial"


def test_lifted_is_above_v_after_the_first_block():
    def judged(first):
        runs = [run(xi, s, rank=(15.0, first(xi), 14.0)) for s in range(2) for xi in XI]
        return judge_arm("arm", runs, XI, 4, False).answers["lifted"].status

    assert judged(lambda xi: 16.5) == "reproduced"
    assert judged(lambda xi: 16.0) == "not reproduced"
    assert judged(lambda xi: 14 + xi) == "partial"


def test_drift_needs_a_plateau():
    def judged(drift):
        runs = [run(xi, s, drift=drift) for s in range(5) for xi in XI]
        return judge_arm("arm", runs, XI, 10, False).answers["iii"].status

    assert judged((0.5, 0.3, 0.01, 0.01, 0.01, 0.01)) == "reproduced"
    assert judged((0.5, 0.5, 0.07, 0.07, 0.07, 0.07)) == "partial"
    assert judged((0.3, 0.2, 0.2, 0.2, 0.2, 0.2)) == "not reproduced"


def test_a_study_that_is_not_finished_says_what_is_missing():
    runs = [run(1.2, 0), run(6.7, 0), run(1.2, 1)]
    found = judge_arm("arm", runs, XI, 10, True)
    assert (found.seeds, found.missing) == ((0,), 7)
    nothing = judge_arm("arm", runs[2:], XI, 10, True)
    assert {answer.status for answer in nothing.answers.values()} == {"not measured"}
    assert nothing.together == []
    json.loads(as_json(nothing.to_dict()), parse_constant=pytest.fail)
