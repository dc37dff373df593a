"""What the set-up of the papers can have been: the rules, fixed before any run.

An arm is one set-up at two correlation lengths over seeds. Every arm is asked the same, by the view
``position`` (all rows at each position):

- does it *see its neighbors*: captured above 0.01 in every run, and masked rows that differ (a rank of 1 or
  more from layer 1 on)? Without mixing both are impossible;
- *lifted*: the effective rank after the first block lies above V in every run (*partial*: in some). At a
  fixed position V tokens and MASK span at most V centered directions, so that a rank above V excludes
  position-wise blocks;
- (i) R ≤ 0.85 at the short ξ and below the untrained R in every seed, no upward step of the mean curve beyond
  5% of its drop (*partial*: mean R ≤ 0.85);
- (ii) R_long − R_short > 0 in every seed with mean ≥ 0.15, R_long ≥ 0.95 in every seed, and a paired 95%
  interval above 0 (*partial*: above 0 in every seed, and the interval, if there is one);
- (iii) at the short ξ the mean share of the two largest transitions exceeds the 95% quantile of broken
  sticks, and the median of the others is at most 10% of the largest and at most 0.05 (*partial*: without the
  latter);
- *null*, of the arm that is one: *valid* if the paired 95% interval of R_long − R_short contains 0, *refuted*
  if it does not.

Below five seeds (ii) is at best *partial* and the null *undecided*, since there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rgfast.flow.answers import Answer, Check, Status, Thresholds, spread
from rgfast.flow.curves import Interval, descent, paired_interval, top_share
from rgfast.flow.findings import stated
from rgfast.flow.saved import VIEW
from rgfast.flow.shapes import rest_of, top_share_quantile

__all__ = ["GAPS", "NEIGHBORS", "ArmVerdict", "SetupRun", "judge_arm"]

# Captured above it is more than a finite sample of the posterior gives a model that knows π alone.
NEIGHBORS = 0.01
# The gap R_long − R_short in other conventions than the one that decides: name -> (measure, view).
GAPS = {
    "position": ("effective_rank", VIEW),
    "position, uncentered": ("effective_rank_uncentred", VIEW),
    "visible": ("effective_rank", "visible"),
    "mean-pooled": ("effective_rank", "mean_pooled"),
    "mean-pooled, uncentered": ("effective_rank_uncentred", "mean_pooled"),
}
_BARS = Thresholds()
Array = NDArray[np.float64]


@dataclass(frozen=True)
class SetupRun:
    """One run: its numbers by stage (``trained``, ``untrained``), measure, view and layer, as points have."""

    xi: float
    seed: int
    states: int
    numbers: Mapping[str, Any]

    def curve(self, measure: str = "effective_rank", view: str = VIEW, stage: str = "trained") -> Array:
        """A measure by layer, or by transition."""
        return np.asarray(self.numbers[stage][measure][view], dtype=float)

    def ratio(self, measure: str = "effective_rank", view: str = VIEW, stage: str = "trained") -> float:
        """R: last over first layer; NaN if the first is 0."""
        rank = self.curve(measure, view, stage)
        return float(rank[-1] / rank[0]) if rank[0] > 0 else math.nan

    @property
    def captured(self) -> float:
        """The captured fraction of the trained stack."""
        return float(self.numbers["trained"]["captured"])

    @property
    def masked_rank(self) -> float:
        """The largest rank of masked rows from layer 1 on."""
        return float(self.curve(view="masked")[1:].max())

    @property
    def highest_rank(self) -> float:
        """The largest rank at a fixed position from layer 1 on."""
        return float(self.curve()[1:].max())


@dataclass(frozen=True)
class ArmVerdict:
    """What one arm shows. ``answers`` by statement, ``gaps`` R_long − R_short by convention.

    ``seeds`` are those with both correlation lengths; ``missing`` counts the runs that are not there yet.
    """

    arm: str
    seeds: tuple[int, ...]
    missing: int
    answers: dict[str, Answer]
    gaps: dict[str, Interval]

    @property
    def together(self) -> list[str]:
        """The statements of the papers that hold in this arm."""
        return [name for name in ("lifted", "i", "ii", "iii") if self.answers[name].status == "reproduced"]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "together": self.together}


def judge_arm(
    arm: str, runs: Sequence[SetupRun], xi: tuple[float, float], asked: int, null: bool
) -> ArmVerdict:
    """The :class:`ArmVerdict` of the ``runs`` of an arm, of which ``asked`` were planned.

    ``xi``: the short and the long correlation length. ``null``: whether the arm is an exact null. Statements
    that need both lengths are judged on the seeds that have both, and *not measured* without any.
    """
    by_cell = {(run.xi, run.seed): run for run in runs}
    short, long = xi
    seeds = tuple(sorted({s for x, s in by_cell if x == short} & {s for x, s in by_cell if x == long}))
    pairs = [(by_cell[short, seed], by_cell[long, seed]) for seed in seeds]
    gaps = {
        name: paired_interval([late.ratio(*which) - early.ratio(*which) for early, late in pairs])
        for name, which in GAPS.items()
    }
    answers: dict[str, Answer]
    if pairs:
        both = [run for pair in pairs for run in pair]
        shorts = [early for early, _ in pairs]
        answers = {
            "neighbors": _neighbors(both),
            "lifted": _lifted(both),
            "i": _falls(shorts),
            "ii": _selective(pairs, gaps["position"]),
            "iii": _settles(shorts),
        }
        if null:
            answers["null"] = _null(gaps["position"])
    else:
        nothing = Answer("not measured", "no seed with both correlation lengths yet")
        answers = dict.fromkeys(
            ("neighbors", "lifted", "i", "ii", "iii", *(("null",) if null else ())), nothing
        )
    return ArmVerdict(arm, seeds, asked - len(by_cell), answers, gaps)


def _word(checks: list[Check]) -> Status:
    """All runs: reproduced; some: partial; none: not reproduced."""
    return stated(checks, any(check.holds for check in checks))


def _neighbors(runs: list[SetupRun]) -> Answer:
    checks = [
        Check(name, value, bar, holds, run.seed)
        for run in runs
        for name, value, bar, holds in (
            ("captured", run.captured, f"> {NEIGHBORS:g}", run.captured > NEIGHBORS),
            ("masked rank", run.masked_rank, ">= 1", run.masked_rank >= 1),
        )
    ]
    words = (
        f"captured {spread((run.captured for run in runs), 3)}, masked rank "
        f"{spread(run.masked_rank for run in runs)}"
    )
    return Answer(_word(checks), words, tuple(checks), claim="rows depend on other positions")


def _lifted(runs: list[SetupRun]) -> Answer:
    inputs, first = ([float(run.curve()[layer]) for run in runs] for layer in (0, 1))
    checks = [
        Check("rank at layer 1", rank, f"> {run.states}", rank > run.states, run.seed)
        for run, rank in zip(runs, first, strict=True)
    ]
    words = (
        f"input {spread(inputs, 1)}, layer 1 {spread(first, 1)}, "
        f"highest {spread((run.highest_rank for run in runs), 1)}, V = {runs[0].states}"
    )
    return Answer(_word(checks), words, tuple(checks), claim="the first block lifts the rank above V")


def _falls(runs: list[SetupRun]) -> Answer:
    bars, checks = _BARS, []
    ratios = [run.ratio() for run in runs]
    untrained = [run.ratio(stage="untrained") for run in runs]
    for run, ratio, start in zip(runs, ratios, untrained, strict=True):
        bar = bars.short_ratio
        checks.append(Check("R", ratio, f"<= {bar:g}", ratio <= bar, run.seed))
        checks.append(Check("R − untrained R", ratio - start, "< 0", ratio < start, run.seed))
    mean = descent(np.mean([run.curve() for run in runs], axis=0))
    allowed = f"<= {bars.rise * mean.drop:.3g}"
    rise = Check("largest upward step of the mean curve", mean.largest_rise, allowed, mean.falls(bars.rise))
    words = f"R = {spread(ratios)}, untrained {spread(untrained)}"
    core = float(np.mean(ratios)) <= bars.short_ratio
    return Answer(
        stated([*checks, rise], core), words, (*checks, rise), claim="the rank falls after training"
    )


def _selective(pairs: list[tuple[SetupRun, SetupRun]], gap: Interval) -> Answer:
    bars, checks = _BARS, []
    for early, late in pairs:
        value, ratio = late.ratio() - early.ratio(), late.ratio()
        checks.append(Check("R_long − R_short", value, "> 0", value > 0, early.seed))
        checks.append(Check("R_long", ratio, f">= {bars.long_ratio:g}", ratio >= bars.long_ratio, early.seed))
    bar = bars.gap_elsewhere
    checks.append(Check("mean R_long − R_short", gap.mean, f">= {bar:g}", gap.mean >= bar))
    checks.append(Check("95% interval, lower end", gap.low, "> 0", gap.low > 0))
    core = all(late.ratio() > early.ratio() for early, late in pairs) and not gap.low <= 0
    each = spread((late.ratio() - early.ratio() for early, late in pairs), 3)
    words = f"R_long − R_short = {each}{_ends(gap)}, R_long = {spread(late.ratio() for _, late in pairs)}"
    return Answer(stated(checks, core), words, tuple(checks), claim="at the short ξ, not at the long")


def _settles(runs: list[SetupRun]) -> Answer:
    bars = _BARS
    drifts = [run.curve("kernel_drift") for run in runs]
    share = float(np.mean([top_share(drift) for drift in drifts]))
    mean = np.mean(drifts, axis=0)
    null = top_share_quantile(mean.size, len(drifts))
    median, of_largest = rest_of(mean)
    checks = [
        Check("mean top-2 share", share, f"> {null:.3f}", share > null),
        Check("median of the others over the largest", of_largest, f"<= {bars.rest_share:g}",
              of_largest <= bars.rest_share),
        Check("median of the others", median, f"<= {bars.rest_median:g}", median <= bars.rest_median),
    ]  # fmt: skip
    words = (
        f"top-2 share {share:.3f}, chance up to {null:.3f}; median of the others "
        f"{100 * of_largest:.1f}% of the largest, {median:.3f}"
    )
    return Answer(stated(checks, share > null), words, tuple(checks), claim="drift in one or two transitions")


def _null(gap: Interval) -> Answer:
    words = f"R_long − R_short = {gap.mean:+.3f}{_ends(gap)}"
    claim = "both trainings are the same in law"
    if not math.isfinite(gap.low):
        return Answer("undecided", f"{words}: no interval below five seeds", claim=claim)
    holds = gap.low <= 0 <= gap.high
    check = Check("0 in the 95% interval", gap.mean, f"{gap.low:+.3g} to {gap.high:+.3g}", holds)
    return Answer("valid" if holds else "refuted", words, (check,), claim=claim)


def _ends(gap: Interval) -> str:
    return f" [{gap.low:+.3f}, {gap.high:+.3f}]" if math.isfinite(gap.low) else ""
