"""Finding (iii): the drift sits in one or two transitions, the rest is near a fixed point."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from rgfast.flow.answers import Answer, Check, Quantity, Status, Verdict, quantity, spread
from rgfast.flow.curves import effective_transitions, top_share
from rgfast.flow.findings import beside, stated, undecided, unmeasured, with_controls
from rgfast.flow.saved import CONTROLS, FIRST_LAYER, VIEW, Runs, mean_of
from rgfast.flow.shapes import (
    ShapeWord,
    common_shape,
    described,
    drift_shape,
    rest_of,
    top_share_quantile,
)

__all__ = ["settling"]

_CLAIM = "discrete step, then plateau"
_SHARE = "top-2 share"


def settling(runs: Runs, xi: float, *, judged: bool = True) -> Verdict:
    """Finding (iii) at one ξ; not ``judged``: its numbers are reported alone."""
    key = "iii" if judged else "iii-long"
    title = f"(iii) Drift sits in one or two transitions, the rest near a fixed point, ξ = {xi:g}"
    drifts = {seed: runs.drift(xi, seed, VIEW) for seed in runs.seeds}
    some = next(iter(drifts.values()))
    if some.size < 3:
        return unmeasured(key, title, f"{some.size} transitions: the two largest hold everything")
    quantities = _quantities(runs, xi)
    if quantities[0].pooled.n < len(drifts):
        return unmeasured(key, title, "the drift of some seed is undefined or zero")
    answer, details = _concentrated(runs, drifts, quantities)
    if missing := runs.unlearned(xi):
        answer = Answer(answer.status, f"{answer.summary}; {missing}", answer.checks)
    reading = _shape(runs, xi, details)
    if not judged:
        answer = Answer("reported", answer.summary, answer.checks)
        reading = Answer("reported", reading.summary, reading.checks, reading.claim)
    told = beside(runs, quantities, _SHARE, VIEW)
    return Verdict(key, title, answer, reading, tuple(quantities), details, beside=told)


def _quantities(runs: Runs, xi: float) -> list[Quantity]:
    def share(view: str = VIEW, stage: str = "trained", measure: str = "kernel_drift") -> dict[int, float]:
        return {s: top_share(runs.drift(xi, s, view, stage, measure)) for s in runs.seeds}

    count = {seed: effective_transitions(runs.drift(xi, seed, VIEW)) for seed in runs.seeds}
    return [
        quantity(_SHARE, share()),
        *(quantity(f"{_SHARE}, {stage}", share(stage=stage)) for stage in runs.controls),
        *(
            quantity(f"{_SHARE}, {view}", share(view))
            for view in runs.views
            if view != VIEW and runs.drift(xi, runs.seeds[0], view).size > 2
        ),
        quantity(f"{_SHARE} of the change ‖K' − K‖/‖K‖", share(measure="kernel_change")),
        quantity("N_eff", count),
    ]


def _concentrated(
    runs: Runs, drifts: dict[int, np.ndarray[Any, Any]], quantities: list[Quantity]
) -> tuple[Answer, dict[str, Any]]:
    bars, share = runs.bars, quantities[0].pooled.mean
    mean = np.mean(list(drifts.values()), axis=0)
    null = top_share_quantile(mean.size, len(drifts))
    median, of_largest = rest_of(mean)
    concentrated = share > null
    checks = [
        Check(f"mean {_SHARE}", share, f"> {null:.3f}", concentrated),
        Check("median of the others over the largest", of_largest, f"<= {bars.rest_share:g}",
              of_largest <= bars.rest_share),
        Check("median of the others", median, f"<= {bars.rest_median:g}", median <= bars.rest_median),
    ]  # fmt: skip
    largest = {seed: sorted(int(k) for k in np.argsort(-v, kind="stable")[:2]) for seed, v in drifts.items()}
    summary = (
        f"{_SHARE} {spread(quantities[0].by_seed.values(), 3)}, chance up to {null:.3f}; median of the "
        f"others {100 * of_largest:.1f}% of the largest, {median:.3f}; largest at {_places(largest)}"
        f"{with_controls(quantities, _SHARE)}"
    )
    details = {
        "mean_curve": mean.tolist(),
        "top2_null": null,
        "rest_median": median,
        "rest_share": of_largest,
        "largest_transitions": {str(seed): places for seed, places in largest.items()},
    }
    return Answer(stated(checks, concentrated), summary, tuple(checks)), details


def _places(largest: dict[int, list[int]]) -> str:
    """Which two transitions are the largest, and in how many seeds."""
    counted: dict[tuple[int, ...], int] = {}
    for places in largest.values():
        counted[tuple(places)] = counted.get(tuple(places), 0) + 1
    first = FIRST_LAYER[VIEW]
    return ", ".join(
        f"{' and '.join(f'{k + first}→{k + first + 1}' for k in places)} in {n} of {len(largest)}"
        for places, n in sorted(counted.items(), key=lambda item: -item[1])
    )


def _shape(runs: Runs, xi: float, details: dict[str, Any]) -> Answer:
    """Reading of (iii): a discrete step, then a plateau, that the controls do not show."""
    seeds = runs.learned(xi)
    if not seeds:
        return undecided(_CLAIM, runs.unlearned(xi))
    if len(runs.controls) < len(CONTROLS):
        return undecided(_CLAIM, "the result lacks a trained control")
    own = mean_of(top_share(runs.drift(xi, s, VIEW)) for s in seeds)
    checks, words = [], []
    for stage in runs.controls:
        other = mean_of(top_share(runs.drift(xi, s, VIEW, stage)) for s in seeds)
        if not math.isfinite(other):  # a control that does not move shows nothing
            continue
        checks.append(Check(f"{_SHARE} above {stage}", own, f"> {other:.3f}", own > other))
        if other >= own:
            words.append(f"{CONTROLS[stage]} is at least as concentrated ({other:.3f} against {own:.3f})")
    word, told = _winner(runs, xi, seeds, details)
    status: Status = "supported" if word == "step + plateau" else "not supported"
    if word in ("undecided", "not judged"):
        status = "undecided"
    if words:
        status = "not supported"
    return Answer(status, "; ".join([*words, told]), tuple(checks), _CLAIM)


def _winner(runs: Runs, xi: float, seeds: list[int], details: dict[str, Any]) -> tuple[ShapeWord, str]:
    """The shape that the seeds have in common, and in words by how much it wins."""
    drifts = [runs.drift(xi, seed, VIEW) for seed in seeds]
    shapes = [shape for drift in drifts if (shape := drift_shape(drift)) is not None]
    mean = drift_shape(np.mean(drifts, axis=0))
    if mean is None or len(shapes) < len(seeds):
        return "not judged", f"shape not judged: {drifts[0].size} transitions, or one that does not move"
    word = common_shape(shapes, mean)
    total = sum(shape.bic_difference for shape in shapes)
    rate = math.exp(mean_of(math.log(shape.decay_rate) for shape in shapes))
    details |= {
        "shape": word,
        "decay_rate": rate,
        "bic_decay_minus_step": total,
        "over_flat": mean.over_flat,
        "over_flat_null": mean.over_flat_null,
        "largest_over_median": mean.largest_over_median,
        "shapes": {str(seed): asdict(shape) for seed, shape in zip(seeds, shapes, strict=True)},
    }
    if word == "not judged":
        return word, described(word, rate, mean.transitions)
    if word == "flat":
        return word, (
            f"flat: ΔBIC over flat {mean.over_flat:.1f}, chance up to {mean.over_flat_null:.1f}, largest "
            f"{mean.largest_over_median:.1f} times the median"
        )
    better, other = ("step", "decay") if total > 0 else ("decay", "step")
    agree = sum((shape.bic_difference > 0) == (total > 0) for shape in shapes)
    return word, (
        f"{described(word, rate, mean.transitions)}: {better} over {other} by {abs(total):.1f} in BIC, "
        f"{agree} of {len(shapes)} seeds"
    )
