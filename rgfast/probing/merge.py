"""Two results of the same probe as one, exactly as if it had seen both samples."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from rgfast.probing.assemble import assemble
from rgfast.probing.estimators import samples
from rgfast.probing.estimators.moments import Moments
from rgfast.probing.estimators.rows import Rows
from rgfast.probing.measures import MEASURES
from rgfast.probing.plan import Plan
from rgfast.probing.result import ProbeResult

__all__ = ["merged"]

# What must agree in the provenance of both results, as far as both have it.
_SAME = {
    "model": "a model of the same class",
    "parameters": "a model of as many parameters",
    "dtype": "a model of the same dtype",
    "weights": "a model with the same weights (fingerprint)",
    "mask": "the same mask",
    "rows": "the same rows",
    "padding": "the same padding",
    "origin": "the same origin",
    "axes": "the same axes",
    "output": "the same output",
}


def merged(result: ProbeResult, other: ProbeResult) -> ProbeResult:
    """The result of both samples; see :meth:`rgfast.ProbeResult.merge`."""
    if not isinstance(other, ProbeResult):
        raise TypeError(f"other must be a ProbeResult, got {type(other).__name__}")
    if result.moments is None or other.moments is None:
        raise ValueError(
            "other cannot be merged: one of the two results has no moments: it was saved with moments=False, "
            "is of ranks that shared out the layers (owner=), or was joined"
        )
    (plan, extra), (theirs, _) = (Plan.from_json(r.dataset.attrs["plan"]) for r in (result, other))
    same = ("names", "widths", "length", "positions", "views", "pairs", "groups", "targets", "places", "rows")
    for name in same:
        if getattr(plan, name) != getattr(theirs, name):
            raise ValueError(
                f"other must have the same {name}: {getattr(plan, name)}, got {getattr(theirs, name)}"
            )
    mine, others = result.provenance, other.provenance
    for name, what in _SAME.items():
        if name in mine and name in others and mine[name] != others[name]:
            if name == "weights" and None in (mine[name], others[name]):
                continue
            if name == "parameters" and mine.get("weights") == others.get("weights") is not None:
                continue  # those that are tied are counted as often as they were offloaded
            raise ValueError(f"other must be of {what}: {mine[name]}, got {others[name]}")
    controls = [
        {name: r.dataset.attrs.get(name) for name in ("control", "control_seed")} for r in (result, other)
    ]
    if controls[0] != controls[1]:
        told = [one["control"] and f"{one['control']} (seed {one['control_seed']})" for one in controls]
        raise ValueError(f"other must be of the same control: {told[0]}, got {told[1]}")
    if None in (mine.get("weights"), others.get("weights")):
        mine = {**mine, "weights": None}
    ids = _ids(result, other)
    if plan.refine != theirs.refine:  # what one of them lacks, both lack together
        plan = replace(plan, refine=False)
    theirs = replace(theirs, refine=plan.refine)
    measures = [name for name in result.measures if name in other.measures]
    writes = result.writes and other.writes
    uncentred = any(MEASURES[name].needs == "uncentred" for name in measures)
    rows = _rows(plan, uncentred, result.moments, other.moments)
    kept = {name: value for name, value in controls[0].items() if value is not None}
    if rows is not None:
        dataset = assemble(rows.measures(), measures, mine)().assign_attrs(kept)
        both = ProbeResult(dataset, rows.state(), writes=writes)
        return both if ids is None else both.with_ids(ids)
    state, added = (
        _summed(one, r.moments, masked=extra["masked"], uncentred=uncentred)
        for one, r in ((plan, result), (theirs, other))
    )
    state.merge(added)
    dataset = assemble(state, measures, mine)().assign_attrs(kept)
    both = ProbeResult(dataset, state.state(), writes=writes)
    return both if ids is None else both.with_ids(ids)


def _ids(result: ProbeResult, other: ProbeResult) -> list[int | str] | None:
    """The ids of both, if both have some. Raises ValueError if a sequence is in both."""
    if result.ids is None or other.ids is None:
        return None
    if again := [one for one in other.ids if one in {*result.ids}]:
        raise ValueError(f"other must be of other sequences, and both have {again[0]!r} (ids)")
    return [*result.ids, *other.ids]


def _rows(plan: Plan, uncentred: bool, *states: Mapping[str, NDArray[Any]]) -> Rows | None:
    """The rows of both, if both are rows and these few enough to be measured at once."""
    if not all(Rows.is_state(state) for state in states):
        return None
    both = [Rows(plan, sys.maxsize, uncentred=uncentred) for _ in states]
    for rows, state in zip(both, states, strict=True):
        rows.load(state)
    both[0].merge(both[1])
    fits = both[0].sequences <= samples.LIMIT and both[0].enough()
    return both[0] if fits else None


def _summed(
    plan: Plan, state: Mapping[str, NDArray[Any]] | None, *, masked: bool, uncentred: bool
) -> Moments:
    """The moments that a result holds, or of the rows that it holds."""
    assert state is not None
    found = Moments(plan, masked=masked, uncentred=uncentred)
    if not Rows.is_state(state):
        found.load(state)
        return found
    rows = Rows(plan, sys.maxsize, uncentred=False)
    rows.load(state)
    for batch in rows.batches():
        found.add(batch)
    return found
