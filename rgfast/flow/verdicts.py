"""The paper's findings as verdicts on a saved result, each with the numbers it rests on.

A result is the labelled dataset that ``rgfast reproduce`` writes (``result.nc``): ``effective_rank`` over
(chain, xi, seed, stage, view, layer), ``kernel_drift`` and ``kernel_change`` over (…, transition),
``captured`` over (chain, xi, seed, stage) and, where it is there, ``survival`` over (…, process, mode,
layer). Nothing else is read; no model is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rgfast.flow.curves import (
    Descent,
    DriftShape,
    Interval,
    descent,
    drift_shape,
    effective_transitions,
    paired_interval,
    top_share,
)
from rgfast.netcdf import read_netcdf

__all__ = ["Check", "Thresholds", "Verdict", "curve", "judge"]

Status = Literal["reproduced", "partial", "not reproduced", "undertrained", "not measured"]
CONTROLS = ("control_iid", "control_permuted")
FIRST_LAYER = {"visible": 0, "masked": 1, "position": 0}


@dataclass(frozen=True)
class Thresholds:
    """The bars of the verdicts; the defaults are the published ones for the default set-up."""

    captured: float = 0.90
    rise: float = 0.05
    short_ratio: float = 0.85
    gap: float = 0.25
    long_visible: float = 0.95
    long_masked: float = 0.85
    slow_survival: float = 0.75
    survival_gap: float = 0.25


@dataclass(frozen=True)
class Check:
    """One numbered condition of a verdict: what was asked, what came, and whether it holds.

    ``seed`` is None for a check on all seeds together.
    """

    name: str
    value: float
    bar: str
    holds: bool
    seed: int | None = None


@dataclass(frozen=True)
class Verdict:
    """A finding, its status in words, and the evidence: checks, numbers by seed, pooled numbers, notes."""

    key: str
    title: str
    status: Status | str
    summary: str
    checks: tuple[Check, ...] = ()
    pooled: dict[str, Any] = field(default_factory=dict)
    per_seed: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def curve(
    result: xr.Dataset, measure: str, *, chain: str, xi: float, seed: int, stage: str, view: str
) -> NDArray[np.float64]:
    """``measure`` by layer (or transition) for one run, from the view's first meaningful layer on.

    The stream of masked rows is constant at the input, so that view starts at layer 1.
    """
    values = result[measure].sel(chain=chain, xi=xi, seed=seed, stage=stage, view=view)
    along = "transition" if "transition" in values.dims else "layer"
    first = FIRST_LAYER.get(view, 0)
    return np.asarray(values.sel({along: values[along] >= first}).values, dtype=float)


@dataclass(frozen=True)
class _Runs:
    """One chain of a result: its short and long ξ and the seeds trained well enough for a verdict."""

    result: xr.Dataset
    chain: str
    bars: Thresholds

    @property
    def xis(self) -> list[float]:
        return [float(x) for x in self.result.xi.values]

    @property
    def seeds(self) -> list[int]:
        return [int(s) for s in self.result.seed.values]

    def captured(self, xi: float, seed: int) -> float:
        return float(self.result.captured.sel(chain=self.chain, xi=xi, seed=seed, stage="trained"))

    def trained(self, *xis: float) -> list[int]:
        return [s for s in self.seeds if all(self.captured(x, s) >= self.bars.captured for x in xis)]

    def ranks(self, xi: float, seed: int, view: str, stage: str = "trained") -> NDArray[np.float64]:
        return curve(
            self.result, "effective_rank", chain=self.chain, xi=xi, seed=seed, stage=stage, view=view
        )

    def descent(self, xi: float, seed: int, view: str, stage: str = "trained") -> Descent:
        return descent(self.ranks(xi, seed, view, stage))

    def drift(self, xi: float, seed: int, view: str, measure: str = "kernel_drift") -> NDArray[np.float64]:
        return curve(self.result, measure, chain=self.chain, xi=xi, seed=seed, stage="trained", view=view)


def _status(checks: Iterable[Check], core: bool) -> Status:
    """All checks hold: reproduced; the core of the finding alone: partial."""
    if all(c.holds for c in checks):
        return "reproduced"
    return "partial" if core else "not reproduced"


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return float(np.mean(values)) if values else math.nan


def _valid(runs: _Runs) -> Verdict:
    checks = tuple(
        Check(f"captured at ξ={xi:g}", runs.captured(xi, seed), f">= {runs.bars.captured:g}",
              runs.captured(xi, seed) >= runs.bars.captured, seed)
        for xi in runs.xis
        for seed in runs.seeds
    )  # fmt: skip
    bad = [c for c in checks if not c.holds]
    lowest = min((c.value for c in checks), default=math.nan)
    words = f"captured {lowest:.3f} at the least over {len(checks)} runs"
    if bad:
        words += f"; {len(bad)} undertrained, left out below"
    status: Status = "undertrained" if bad else "reproduced"
    return Verdict("valid", "Trained: captured ≥ 0.90", "valid" if not bad else status, words, checks)


def _monotone_pooled(curves: NDArray[np.float64], share: float) -> tuple[float, float, bool]:
    """Largest upward step of the mean curve, its allowance, and whether it stays within it.

    The allowance is the larger of ``share`` of the mean drop and two standard errors of that step over seeds.
    """
    steps = np.diff(curves, axis=1)
    worst = int(steps.mean(axis=0).argmax())
    rise = max(0.0, float(steps[:, worst].mean()))
    drop = float((curves[:, 0] - curves[:, -1]).mean())
    error = float(steps[:, worst].std(ddof=1)) / math.sqrt(len(curves)) if len(curves) >= 3 else 0.0
    allowance = max(share * drop, 2 * error)
    return rise, allowance, drop > 0 and rise <= allowance


def _collapse(runs: _Runs, xi: float, view: str, key: str, title: str) -> Verdict:
    seeds = runs.trained(xi)
    if not seeds:
        return Verdict(key, title, "undertrained", f"no run at ξ={xi:g} reached captured 0.90")
    bars, checks, rows = runs.bars, [], []
    for seed in seeds:
        d = runs.descent(xi, seed, view)
        row: dict[str, Any] = {"seed": seed, **asdict(d)}
        checks.append(Check("R", d.ratio, f"<= {bars.short_ratio:g}", d.ratio <= bars.short_ratio, seed))
        for stage in CONTROLS:
            if stage not in runs.result.stage.values:
                continue
            control = runs.descent(xi, seed, view, stage).ratio
            row[f"R_{stage}"] = control
            # An untrained-like control has no masked process: its rows stay constant and its rank is zero.
            if math.isfinite(control):
                checks.append(Check(f"R below {stage}", d.ratio, f"< {control:.3f}", d.ratio < control, seed))
        rows.append(row)
    curves = np.stack([runs.ranks(xi, seed, view) for seed in seeds])
    rise, allowance, falls = _monotone_pooled(curves, bars.rise)
    checks.append(Check("largest upward step of the mean", rise, f"<= {allowance:.3g}", falls))
    worst = max(row["rise_share"] for row in rows)
    ratio = paired_interval([row["ratio"] for row in rows])
    summary = (
        f"R = {ratio.mean:.2f} ({min(r['ratio'] for r in rows):.2f}–{max(r['ratio'] for r in rows):.2f}), "
        f"largest upward step {100 * worst:.1f}% of the drop"
    )
    core = ratio.mean <= bars.short_ratio
    pooled = {"R": asdict(ratio), "largest_rise": rise, "allowance": allowance, "worst_rise_share": worst}
    notes = _runaway(runs, xi, view, seeds, checks)
    return Verdict(key, title, _status(checks, core), summary, tuple(checks), pooled, tuple(rows), notes)


def _runaway(runs: _Runs, xi: float, view: str, seeds: list[int], checks: Iterable[Check]) -> tuple[str, ...]:
    """Where a control falls as far as the trained stack: whether one growing direction is what makes it fall.

    A stack with nothing to learn still moves under a normalising optimiser, often along one direction; the
    stable rank (1 where one direction holds all variance) tells that from a loss of many directions.
    """
    if "stable_rank" not in runs.result:
        return ()

    def last(stage: str) -> float:
        found = [
            curve(runs.result, "stable_rank", chain=runs.chain, xi=xi, seed=seed, stage=stage, view=view)
            for seed in seeds
        ]
        return _mean(float(values[-1]) for values in found)

    beaten = {
        c.name.removeprefix("R below ") for c in checks if not c.holds and c.name.startswith("R below ")
    }
    return tuple(
        f"{stage} falls as far, with stable rank {last(stage):.2f} at the last layer (trained: "
        f"{last('trained'):.2f}): 1 means that a single growing direction holds the variance"
        for stage in CONTROLS
        if stage in beaten
    )


def _selective(runs: _Runs, short: float, long: float) -> Verdict:
    key, title = "ii", f"(ii) Selective: collapse at ξ={short:g}, not at ξ={long:g}"
    seeds = runs.trained(short, long)
    if not seeds:
        return Verdict(key, title, "undertrained", "no seed reached captured 0.90 at both ξ")
    bars, checks, notes = runs.bars, [], []
    rows: list[dict[str, Any]] = []
    gaps: dict[str, Interval] = {}
    for view, bar in (("visible", bars.long_visible), ("masked", bars.long_masked)):
        differences = []
        for seed in seeds:
            r_short = runs.descent(short, seed, view).ratio
            r_long = runs.descent(long, seed, view).ratio
            differences.append(r_long - r_short)
            checks.append(
                Check(f"{view} R_long − R_short", differences[-1], "> 0", differences[-1] > 0, seed)
            )
            checks.append(Check(f"{view} R_long", r_long, f">= {bar:g}", r_long >= bar, seed))
            rows.append({"seed": seed, "view": view, "R_short": r_short, "R_long": r_long})
        gaps[view] = paired_interval(differences)
    gap = gaps["visible"]
    checks.append(
        Check("visible mean of R_long − R_short", gap.mean, f">= {bars.gap:g}", gap.mean >= bars.gap)
    )
    for view in ("mean_pooled", "flattened"):
        if view in runs.result.view.values:
            other = paired_interval([
                runs.descent(long, s, view).ratio - runs.descent(short, s, view).ratio for s in seeds
            ])  # fmt: skip
            long_ratio = _mean(runs.descent(long, s, view).ratio for s in seeds)
            if other.mean <= 0 or long_ratio < bars.long_visible:
                notes.append(
                    f"{view} says otherwise: R at ξ={long:g} is {long_ratio:.2f}, "
                    f"R_long − R_short {other.mean:+.2f}"
                )
    low = {v: min(r["R_long"] for r in rows if r["view"] == v) for v in ("visible", "masked")}
    summary = (
        f"R_long − R_short = {gap.mean:+.2f} visible, {gaps['masked'].mean:+.2f} masked; "
        f"lowest R at ξ={long:g} {low['visible']:.2f} visible, {low['masked']:.2f} masked"
    )
    core = gap.mean > 0 and gaps["masked"].mean > 0
    pooled = {f"gap_{view}": asdict(interval) for view, interval in gaps.items()}
    return Verdict(
        key, title, _status(checks, core), summary, tuple(checks), pooled, tuple(rows), tuple(notes)
    )


def _plateau(runs: _Runs, xi: float, view: str, *, judged: bool = True) -> Verdict:
    key = f"iii-{view}" if judged else f"iii-{view}-long"
    title = f"(iii) Drift at ξ={xi:g}, {view}: one or two steps, then a plateau"
    seeds = runs.trained(xi)
    if not seeds:
        return Verdict(key, title, "undertrained", f"no run at ξ={xi:g} reached captured 0.90")
    rows, shapes = [], []
    for seed in seeds:
        drift = runs.drift(xi, seed, view)
        shape = drift_shape(drift)
        change = runs.drift(xi, seed, view, "kernel_change")
        rows.append({
            "seed": seed,
            **(asdict(shape) if shape else {"preferred": None}),
            "change_top2": top_share(change),
            "change_effective_transitions": effective_transitions(change),
        })  # fmt: skip
        if shape:
            shapes.append(shape)
    if not shapes:
        return Verdict(key, title, "not measured", "fewer than four transitions with a positive drift",
                       per_seed=tuple(rows))  # fmt: skip
    status, summary = _describe(shapes, FIRST_LAYER.get(view, 0))
    checks = tuple(
        Check("BIC(decay) − BIC(step)", row["bic_difference"], "> 0", row["preferred"] == "step", row["seed"])
        for row in rows
        if row["preferred"] is not None
    )
    pooled = {
        "decay_rate": _mean(s.decay_rate for s in shapes),
        "top2": _mean(s.top2 for s in shapes),
        "top2_null": shapes[0].top2_null,
        "effective_transitions": _mean(s.effective_transitions for s in shapes),
        "step_preferred": sum(s.preferred == "step" for s in shapes),
        "seeds": len(shapes),
    }
    if not judged:
        status = "reported"
    return Verdict(key, title, status, summary, checks, pooled, tuple(rows))


def _describe(shapes: list[DriftShape], first: int) -> tuple[str, str]:
    wins = sum(s.preferred == "step" for s in shapes)
    rate, top2 = _mean(s.decay_rate for s in shapes), _mean(s.top2 for s in shapes)
    numbers = (
        f"top-2 share {top2:.2f} (broken stick {shapes[0].top2_null:.2f}), "
        f"N_eff {_mean(s.effective_transitions for s in shapes):.1f}"
    )
    if wins == len(shapes):
        starts = sorted({s.plateau[0] + first for s in shapes})
        where = "/".join(str(s) for s in starts)
        return "reproduced", f"step + plateau (from transition {where} on) in {wins}/{len(shapes)}; {numbers}"
    words = f"relaxation to a fixed point (up to scale), rate {rate:.2f} a layer"
    if wins:
        words += f"; step + plateau preferred in {wins}/{len(shapes)}"
    return ("partial" if wins * 2 > len(shapes) else "not reproduced"), f"{words}; {numbers}"


def _survival(runs: _Runs, xi: float, *, judged: bool = True) -> Verdict:
    """What the last layer still holds of the own token (visible rows): slowest against fastest eigenspace."""
    key = "ii-b" if judged else "ii-b-long"
    title = f"(ii-b) Slow modes of the own token survive at ξ={xi:g}, fast ones do not"
    if not judged:
        title = f"(ii-b) Modes of the own token at ξ={xi:g}"
    seeds = runs.trained(xi)
    if not seeds:
        return Verdict(key, title, "undertrained", f"no run at ξ={xi:g} reached captured 0.90")
    kept = runs.result.survival.sel(chain=runs.chain, xi=xi).dropna("mode", how="all").isel(layer=-1)
    if kept.sizes["mode"] < 2:
        return Verdict(key, title, "not measured", "the chain has one eigenspace besides the constant")

    def ends(seed: int, stage: str, process: str = "visible") -> tuple[float, float]:
        values = kept.sel(seed=seed, stage=stage, process=process).values
        return float(values[0]), float(values[-1])

    bars, checks = runs.bars, []
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        slow, fast = ends(seed, "trained")
        row: dict[str, Any] = {"seed": seed, "slow": slow, "fast": fast}
        row["slow_masked"], row["fast_masked"] = ends(seed, "trained", "masked")
        checks.append(Check("slow", slow, f">= {bars.slow_survival:g}", slow >= bars.slow_survival, seed))
        checks.append(Check("slow − fast", slow - fast, "> 0", slow > fast, seed))
        for stage in CONTROLS:
            row[f"slow_{stage}"], other = ends(seed, stage)
            row[f"fast_{stage}"] = other
            checks.append(Check(f"fast below {stage}", fast, f"< {other:.3f}", fast < other, seed))
        rows.append(row)
    gap = paired_interval([row["slow"] - row["fast"] for row in rows])
    wanted = f">= {bars.survival_gap:g}" + (", interval above 0" if math.isfinite(gap.low) else "")
    holds = gap.mean >= bars.survival_gap and not gap.low <= 0
    checks.append(Check("mean of slow − fast", gap.mean, wanted, holds))
    means = {name: _mean(row[name] for row in rows) for name in rows[0] if name != "seed"}
    controls = ", ".join(
        f"{stage} {means[f'slow_{stage}']:.2f} and {means[f'fast_{stage}']:.2f}" for stage in CONTROLS
    )
    summary = f"last layer keeps slow {means['slow']:.2f}, fast {means['fast']:.2f} ({controls})"
    pooled = {**means, "gap": asdict(gap)}
    status = _status(checks, all(row["slow"] > row["fast"] for row in rows)) if judged else "reported"
    return Verdict(key, title, status, summary, tuple(checks), pooled, tuple(rows))


def _chain_control(runs: _Runs, short: float, long: float) -> Verdict | None:
    """What is expected of the chains that serve as controls; None for any other chain."""
    if runs.chain == "lazy":
        title, wanted = "Control lazy: no collapse at either ξ", [(xi, ">= 1") for xi in (short, long)]
    elif runs.chain == "two-scale:r=30":
        title, wanted = f"Control r=30: collapse at ξ={long:g} too", [(long, "<= 0.7")]
    else:
        return None
    checks = []
    for xi, bar in wanted:
        for seed in runs.trained(xi):
            ratio = runs.descent(xi, seed, "visible").ratio
            holds = ratio >= 1 if bar == ">= 1" else ratio <= 0.7
            checks.append(Check(f"visible R at ξ={xi:g}", ratio, bar, holds, seed))
    if not checks:
        return Verdict("control", title, "undertrained", "no run of this chain reached captured 0.90")
    values = [c.value for c in checks]
    summary = f"visible R {min(values):.2f}–{max(values):.2f} over {len(values)} runs"
    core = sum(c.holds for c in checks) * 2 > len(checks)
    return Verdict("control", title, _status(checks, core), summary, tuple(checks))


def judge(
    result: xr.Dataset | str | Path, chain: str | None = None, bars: Thresholds | None = None
) -> tuple[Verdict, ...]:
    """All verdicts on one chain of a saved result.

    ``result`` is the dataset or the path of a ``result.nc``; ``chain`` may be left out where it holds one.
    Finding (i) and (iii) are judged at the smallest ξ, (ii) between the smallest and the largest; with a
    single ξ there is no (ii). A run under ``bars.captured`` gets no verdict and is left out of the others.

    Raises ValueError if the chain or a variable that is needed is not in ``result``, or the file is damaged.
    """
    if isinstance(result, (str, Path)):
        return judge(read_netcdf(result), chain, bars)
    chains = [str(c) for c in result.chain.values]
    if chain is None and len(chains) == 1:
        chain = chains[0]
    if chain is None or chain not in chains:
        raise ValueError(f"chain must be one of those in the result ({', '.join(chains)}), got {chain!r}")
    for name in ("effective_rank", "kernel_drift", "kernel_change", "captured"):
        if name not in result:
            raise ValueError(
                f"result must have the variable {name!r}, got {', '.join(map(str, result.data_vars))}"
            )
    runs = _Runs(result, chain, bars or Thresholds())
    short, long = min(runs.xis), max(runs.xis)
    verdicts = [
        _valid(runs),
        _collapse(
            runs, short, "visible", "i", f"(i) Effective rank falls with depth at ξ={short:g}, visible"
        ),
        _collapse(runs, short, "masked", "i-masked", f"Concentration at ξ={short:g}, masked from layer 1"),
    ]
    if long > short:
        verdicts.append(_selective(runs, short, long))
    if "survival" in result:
        verdicts.append(_survival(runs, short))
        if long > short:
            verdicts.append(_survival(runs, long, judged=False))
    verdicts += [_plateau(runs, short, view) for view in ("visible", "masked")]
    if long > short:
        verdicts += [_plateau(runs, long, view, judged=False) for view in ("visible", "masked")]
    control = _chain_control(runs, short, long) if long > short else None
    return tuple(verdicts) + ((control,) if control is not None else ())
