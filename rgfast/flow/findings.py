"""Findings (i) and (ii): the rank falls with depth, and only where correlations are short.

Each has two answers. *As stated* is decided by the view ``position``, over all seeds. *Its reading* is
decided over the seeds that learned the task, against the trained controls.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from rgfast.flow.answers import Answer, Check, Quantity, Status, Verdict, quantity, spread
from rgfast.flow.curves import descent
from rgfast.flow.saved import CONTROLS, FIRST_LAYER, VIEW, Runs, mean_of
from rgfast.flow.stages import in_words

__all__ = [
    "beside",
    "concentration",
    "fall",
    "selective",
    "stated",
    "undecided",
    "unmeasured",
    "with_controls",
]

_CITED = (
    "one result cannot tell; cited from the decimation study: one and the same network shows the fall as far "
    "as the visible tokens make its task that of the short chain"
)


def stated(checks: list[Check], core: bool) -> Status:
    """All checks hold: reproduced; the core of the finding alone: partial."""
    if all(check.holds for check in checks):
        return "reproduced"
    return "partial" if core else "not reproduced"


def undecided(claim: str, why: str) -> Answer:
    """A reading that the result does not decide."""
    return Answer("undecided", why, claim=claim)


def unmeasured(key: str, title: str, why: str) -> Verdict:
    """A finding without numbers."""
    return Verdict(key, title, Answer("not measured", why))


def with_controls(quantities: list[Quantity], name: str) -> str:
    """The trained controls' values of the quantity ``name``, in words."""
    found = {q.name: q for q in quantities}
    told = [
        f"{words} {spread(found[f'{name}, {stage}'].by_seed.values())}"
        for stage, words in CONTROLS.items()
        if f"{name}, {stage}" in found
    ]
    return f"; controls: {', '.join(told)}" if told else "; no trained controls"


def beside(runs: Runs, quantities: list[Quantity], name: str, own: str) -> str:
    """The other views' values of the quantity ``name``, in words."""
    found = {q.name: q for q in quantities}
    told = [
        f"{view.replace('_', '-')}{' from layer 1' if FIRST_LAYER.get(view) else ''} "
        f"{spread(found[f'{name}, {view}'].by_seed.values())}"
        for view in runs.views
        if view != own and f"{name}, {view}" in found
    ]
    return f"{name}: {', '.join(told)}" if told else ""


def _ratios(runs: Runs, xi: float, view: str) -> list[Quantity]:
    """R of the trained stacks in ``view``, from layer 1 on too, of the controls, and in the other views."""
    found = [quantity("R", runs.ratios(xi, view))]
    if not FIRST_LAYER.get(view):
        found.append(quantity("R from layer 1", runs.ratios(xi, view, first=1)))
    found += [quantity(f"R, {stage}", runs.ratios(xi, view, stage)) for stage in runs.controls]
    found += [quantity(f"R, {other}", runs.ratios(xi, other)) for other in runs.views if other != view]
    return found


def _fall_as_stated(
    runs: Runs, xi: float, view: str, quantities: list[Quantity]
) -> tuple[Answer, dict[str, Any]]:
    bars, ratio = runs.bars, quantities[0]
    checks = [
        Check("R", value, f"<= {bars.short_ratio:g}", value <= bars.short_ratio, int(seed))
        for seed, value in ratio.by_seed.items()
    ]
    mean = np.mean([runs.ranks(xi, seed, view) for seed in runs.seeds], axis=0)
    whole = descent(mean)
    allowed = bars.rise * whole.drop
    holds = whole.falls(bars.rise)
    checks.append(
        Check("largest upward step of the mean curve", whole.largest_rise, f"<= {allowed:.3g}", holds)
    )
    details = {"mean_curve": asdict(whole)}
    summary = f"R = {spread(ratio.by_seed.values())}, {_steps(whole.rise_share)}"
    if not FIRST_LAYER.get(view) and mean.size > 2:
        later = descent(mean[1:])
        details["mean_curve_from_layer_1"] = asdict(later)
        ratios = quantities[1].by_seed.values()
        summary += f"; from layer 1 R = {spread(ratios)}, {_steps(later.rise_share)}"
    core = mean_of(ratio.by_seed.values()) <= bars.short_ratio
    summary += with_controls(quantities, "R")
    if missing := runs.unlearned(xi):
        summary += f"; {missing}"
    return Answer(stated(checks, core), summary, tuple(checks)), details


def _steps(share: float) -> str:
    if math.isinf(share):
        return "no drop"
    return "no upward step" if share == 0 else f"largest upward step {100 * share:.1f}% of the drop"


def fall(runs: Runs, xi: float) -> Verdict:
    """Finding (i): the effective rank falls monotonically with depth after training."""
    title = f"(i) Effective rank falls monotonically with depth after training, ξ = {xi:g}"
    quantities = _ratios(runs, xi, VIEW)
    if not quantities[0].pooled.n:
        return unmeasured("i", title, "no effective rank of two layers")
    answer, details = _fall_as_stated(runs, xi, VIEW, quantities)
    quantities += _mode_gaps(runs, xi)
    reading = _integration(runs, xi)
    told = beside(runs, quantities, "R", VIEW)
    return Verdict("i", title, answer, reading, tuple(quantities), details, _runaway(runs, xi), told)


def concentration(runs: Runs, xi: float) -> Verdict:
    """The same on masked rows, from layer 1 on: what the stack infers."""
    title = f"Concentration on masked rows, from layer 1, ξ = {xi:g}"
    quantities = _ratios(runs, xi, "masked") if "masked" in runs.views else []
    if not quantities or not quantities[0].pooled.n:
        return unmeasured("concentration", title, "no effective rank of two layers of masked rows")
    answer, details = _fall_as_stated(runs, xi, "masked", quantities)
    reading = undecided("demanded by the input rather than chosen", _CITED)
    told = beside(runs, quantities, "R", "masked")
    return Verdict("concentration", title, answer, reading, tuple(quantities), details, (), told)


def _mode_gaps(runs: Runs, xi: float) -> list[Quantity]:
    """R² of the own token's slowest and fastest eigenspace, trained and of the controls, and D."""
    found = []
    if runs.survival(xi, runs.seeds[0]) is None:
        return []
    for stage in ("trained", *runs.controls):
        kept = {seed: runs.survival(xi, seed, stage) or (math.nan, math.nan) for seed in runs.seeds}
        of = "" if stage == "trained" else f", {stage}"
        for k, which in enumerate(("slow", "fast")):
            found.append(quantity(f"R² {which}{of}", {seed: values[k] for seed, values in kept.items()}))
    for stage in runs.controls:
        gaps = {seed: runs.mode_gap(xi, seed, stage) for seed in runs.seeds}
        found.append(quantity(f"D, {stage}", gaps))
    return found


def _told_apart(runs: Runs, xi: float, seeds: list[int], control: str) -> tuple[list[Check], bool | None]:
    """Whether modes tell the trained stacks from a control: D by seed and in the mean; None if unknown."""
    gaps = {seed: runs.mode_gap(xi, seed, control) for seed in seeds}
    if not np.isfinite(list(gaps.values())).all():
        return [], None
    checks = [Check(f"D against {control}", gap, "> 0", gap > 0, seed) for seed, gap in gaps.items()]
    mean, bar = mean_of(gaps.values()), runs.bars.modes
    checks.append(Check(f"mean D against {control}", mean, f">= {bar:g}", mean >= bar))
    return checks, all(check.holds for check in checks)


def _integration(runs: Runs, xi: float) -> Answer:
    """Reading of (i): the fall is a loss of what the task does not need."""
    claim = "integration of irrelevant degrees of freedom"
    seeds = runs.learned(xi)
    if not seeds:
        return undecided(claim, runs.unlearned(xi))
    ratios = {seed: runs.ratio(xi, seed, VIEW) for seed in seeds}
    if any(not ratio < 1 for ratio in ratios.values()):
        return Answer("not supported", f"no fall to read: R = {spread(ratios.values())}", claim=claim)
    if len(runs.controls) < len(CONTROLS):
        return undecided(claim, "the result lacks a trained control")
    checks: list[Check] = []
    words: list[str] = []
    decided: list[bool | None] = []
    for stage in runs.controls:
        others = {seed: runs.ratio(xi, seed, VIEW, stage) for seed in seeds}
        own = [
            Check(f"R below {stage}", ratios[s], f"< {others[s]:.3f}", ratios[s] < others[s], s)
            for s in seeds
        ]
        if all(check.holds for check in own):
            checks += own
            decided.append(True)
            words.append(f"falls more than {CONTROLS[stage]} (R {spread(others.values())})")
            continue
        modes, apart = _told_apart(runs, xi, seeds, stage)
        checks += modes or own
        decided.append(apart)
        told = (
            f"D = {spread(c.value for c in modes if c.seed is not None)}" if modes else "modes not measured"
        )
        words.append(f"{CONTROLS[stage]} falls as far (R {spread(others.values())}): {told}")
    status: Status = "supported" if all(decided) else "undecided"
    if False in decided:
        status = "not supported"
    return Answer(status, "; ".join(words) + _left_out(runs, xi), tuple(checks), claim)


def _left_out(runs: Runs, *xis: float) -> str:
    missing = runs.unlearned(*xis)
    return f"; left out: {missing}" if missing else ""


def _runaway(runs: Runs, xi: float) -> tuple[str, ...]:
    """Where a control falls as far as the trained stack: whether one growing direction makes it fall.

    A stack with nothing to learn still moves under a normalizing optimizer, often along one direction; the
    stable rank (1 where one direction holds all variance) tells that from a loss of many directions.
    """
    if "stable_rank" not in runs.result:
        return ()

    def last(stage: str) -> float:
        values = runs.result.stable_rank.sel(chain=runs.chain, xi=xi, stage=stage, view=VIEW)
        return float(values.isel(layer=-1).mean())

    own = mean_of(runs.ratio(xi, s, VIEW) for s in runs.seeds)
    return tuple(
        f"a stack {in_words(stage)} falls as far, with stable rank {last(stage):.2f} at the last layer "
        f"(trained: {last('trained'):.2f}): 1 means that a single growing direction holds the variance"
        for stage in runs.controls
        if mean_of(runs.ratio(xi, s, VIEW, stage) for s in runs.seeds) <= own
    )


def selective(runs: Runs, short: float, long: float) -> Verdict:
    """Finding (ii): the rank falls at the short correlation length and not at the long one."""
    title = f"(ii) Selective, per position: at ξ = {short:g}, not at ξ = {long:g}"
    seeds, bars = runs.seeds, runs.bars

    def gap(view: str, stage: str = "trained") -> dict[int, float]:
        shorts, longs = (runs.ratios(xi, view, stage) for xi in (short, long))
        return {seed: longs[seed] - shorts[seed] for seed in seeds}

    name = "R_long − R_short"
    others = [view for view in runs.views if view != VIEW]
    quantities = [
        quantity(name, gap(VIEW)),
        quantity("R_long", runs.ratios(long, VIEW)),
        quantity("R_long from layer 1", runs.ratios(long, VIEW, first=1)),
        *(quantity(f"{name}, {stage}", gap(VIEW, stage)) for stage in runs.controls),
        *(quantity(f"{name}, {view}", gap(view)) for view in others),
        *(quantity(f"R_long, {view}", runs.ratios(long, view)) for view in others),
    ]
    gaps, longs = quantities[0], quantities[1]
    if not gaps.pooled.n:
        return unmeasured("ii", title, "no effective rank of two layers")
    checks = [Check(name, v, "> 0", v > 0, int(s)) for s, v in gaps.by_seed.items()]
    bar = f">= {bars.long_ratio:g}"
    checks += [Check("R_long", v, bar, v >= bars.long_ratio, int(s)) for s, v in longs.by_seed.items()]
    mean = gaps.pooled.mean
    checks.append(Check(f"mean {name}", mean, f">= {runs.gap:g}", mean >= runs.gap))
    if math.isfinite(gaps.pooled.low):
        low = gaps.pooled.low
        checks.append(Check(f"95% interval of {name}, lower end", low, "> 0", low > 0))
    summary = (
        f"{name} = {spread(gaps.by_seed.values())}, R_long = {spread(longs.by_seed.values())}"
        f"{with_controls(quantities, name)}"
    )
    if missing := runs.unlearned(short, long):
        summary += f"; {missing}"
    answer = Answer(stated(checks, mean > 0), summary, tuple(checks))
    quantities += _mode_gaps(runs, short) + _posterior_modes(runs, short, long)
    reading = _preserves(runs, short, long)
    told = "; ".join(filter(None, (beside(runs, quantities, n, VIEW) for n in (name, "R_long"))))
    return Verdict("ii", title, answer, reading, tuple(quantities), beside=told)


def _posterior_modes(runs: Runs, *xis: float) -> list[Quantity]:
    """R² of the posterior's slowest and fastest eigenspace on masked rows, by ξ."""
    found = []
    for xi in xis:
        kept = {seed: runs.survival(xi, seed, process="masked") for seed in runs.seeds}
        for k, which in enumerate(("slow", "fast")):
            values = {seed: pair[k] for seed, pair in kept.items() if pair is not None}
            if values:
                found.append(quantity(f"R² {which} of the posterior, ξ = {xi:g}", values))
    return found


def _preserves(runs: Runs, short: float, long: float) -> Answer:
    """Reading of (ii): the network keeps exactly what the task needs."""
    claim = "preserves exactly the degrees of freedom relevant to the prediction task"
    seeds = runs.learned(short, long)
    if not seeds:
        return undecided(claim, runs.unlearned(short, long))
    if len(runs.controls) < len(CONTROLS):
        return undecided(claim, "the result lacks a trained control")
    checks: list[Check] = []
    words = []
    for stage in runs.controls:
        found, _ = _told_apart(runs, short, seeds, stage)
        checks += found
        words.append(f"D = {spread(c.value for c in found if c.seed is not None)} against {CONTROLS[stage]}")
    kept = {(xi, s): runs.survival(xi, s, process="masked") for xi in (short, long) for s in seeds}
    if not checks or any(pair is None for pair in kept.values()):
        return undecided(claim, "the survival of slow and fast modes is not measured")
    for xi in (short, long):
        bar = mean_of(runs.captured(xi, s) for s in seeds)
        for k, which in enumerate(("slow", "fast")):
            value = mean_of(pair[k] for s in seeds if (pair := kept[xi, s]) is not None)
            checks.append(
                Check(f"R² {which} of the posterior at ξ = {xi:g}", value, f">= {bar:.3f}", value >= bar)
            )
        pairs = " and ".join(f"{check.value:.2f}" for check in checks[-2:])
        words.append(f"posterior's slow and fast modes at ξ = {xi:g}: {pairs} (captured {bar:.2f})")
    status: Status = "supported" if all(check.holds for check in checks) else "not supported"
    return Answer(status, "; ".join(words) + _left_out(runs, short, long), tuple(checks), claim)
