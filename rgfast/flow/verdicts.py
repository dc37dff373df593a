"""The paper's findings as verdicts on a saved result, each with the numbers it rests on.

A result is the labelled dataset that ``rgfast reproduce`` writes (``result.nc``): ``effective_rank`` over
(chain, xi, seed, stage, view, layer), ``kernel_drift`` and ``kernel_change`` over (…, transition),
``captured`` over (chain, xi, seed, stage) and, where it is there, ``survival`` over (…, process, mode,
layer). Nothing else is read; no model is in memory.
"""

from __future__ import annotations

import math
from pathlib import Path

import xarray as xr

from rgfast.flow.answers import Answer, Check, Thresholds, Verdict
from rgfast.flow.findings import concentration, fall, selective, stated
from rgfast.flow.saved import VIEW, Runs
from rgfast.flow.settling import settling
from rgfast.netcdf import read_netcdf

__all__ = ["judge"]


def judge(
    result: xr.Dataset | str | Path, chain: str | None = None, bars: Thresholds | None = None
) -> tuple[Verdict, ...]:
    """All verdicts on one chain of a saved result, each with two answers: as stated, and its reading.

    ``result`` is the dataset or the path of a ``result.nc``; ``chain`` may be left out where it holds one.
    Findings (i) and (iii) and the concentration on masked rows are judged at the smallest ξ, (ii) between the
    smallest and the largest; with a single ξ there is no (ii). *As stated* is judged over all seeds; a run
    under ``bars.captured`` did not learn the task and is left out of every *reading*.

    Raises ValueError if the chain, a variable or the view ``position`` is not in ``result``, or the file is
    damaged.
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
    runs = Runs(result, chain, bars or Thresholds())
    if VIEW not in runs.views:
        raise ValueError(f"result must have the view {VIEW!r}, got {', '.join(runs.views)}")
    short, long = min(runs.xis), max(runs.xis)
    verdicts = [_valid(runs), fall(runs, short)]
    if long > short:
        verdicts.append(selective(runs, short, long))
    verdicts.append(settling(runs, short))
    if long > short:
        verdicts.append(settling(runs, long, judged=False))
    verdicts.append(concentration(runs, short))
    control = _chain_control(runs, short, long) if long > short else None
    return tuple(verdicts) + ((control,) if control is not None else ())


def _valid(runs: Runs) -> Verdict:
    """Whether the stacks learned their task."""
    bar = runs.bars.captured
    checks = tuple(
        Check(f"captured at ξ={xi:g}", value, f">= {bar:g}", value >= bar, seed)
        for xi in runs.xis
        for seed in runs.seeds
        for value in [runs.captured(xi, seed)]
    )
    bad = sum(not check.holds for check in checks)
    lowest = min((check.value for check in checks), default=math.nan)
    words = f"captured {lowest:.3f} at the least over {len(checks)} runs"
    if bad:
        words += f"; {bad} {'run' if bad == 1 else 'runs'} did not learn the task: left out of every reading"
        if not runs.sees_neighbors:
            words = f"{words.partition(';')[0]}; without mixing a stack cannot learn the task"
    answer = Answer("undertrained" if bad else "valid", words, checks)
    return Verdict("valid", f"Learned: captured ≥ {bar:.2f}", answer)


def _chain_control(runs: Runs, short: float, long: float) -> Verdict | None:
    """What is expected of the chains that serve as controls; None for any other chain."""
    if runs.chain == "lazy":
        title, wanted = "Control lazy: no collapse at either ξ", [(xi, ">= 1") for xi in (short, long)]
    elif runs.chain == "two-scale:r=30":
        title, wanted = f"Control r=30: collapse at ξ={long:g} too", [(long, "<= 0.7")]
    else:
        return None
    checks = []
    for xi, bar in wanted:
        for seed in runs.learned(xi):
            ratio = runs.ratio(xi, seed, VIEW)
            holds = ratio >= 1 if bar == ">= 1" else ratio <= 0.7
            checks.append(Check(f"R at ξ={xi:g}", ratio, bar, holds, seed))
    if not checks:
        return Verdict("control", title, Answer("undertrained", "no run of this chain learned the task"))
    values = [check.value for check in checks]
    summary = f"R {min(values):.2f} to {max(values):.2f} over {len(values)} runs"
    core = sum(check.holds for check in checks) * 2 > len(checks)
    return Verdict("control", title, Answer(stated(checks, core), summary, tuple(checks)))
