"""Two results of the same probe as one, exactly as if it had seen both samples."""

from __future__ import annotations

from dataclasses import replace

from rgfast.probing.assemble import assemble
from rgfast.probing.estimators.moments import Moments
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
            "other cannot be merged: one of the two results was saved with moments=False, or probed by "
            "samples (probe with route='moments' to merge)"
        )
    (plan, extra), (theirs, _) = (Plan.from_json(r.dataset.attrs["plan"]) for r in (result, other))
    same = ("names", "widths", "length", "positions", "views", "pairs", "groups", "targets", "places")
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
            raise ValueError(f"other must be of {what}: {mine[name]}, got {others[name]}")
    controls = [
        {name: r.dataset.attrs.get(name) for name in ("control", "control_seed")} for r in (result, other)
    ]
    if controls[0] != controls[1]:
        told = [one["control"] and f"{one['control']} (seed {one['control_seed']})" for one in controls]
        raise ValueError(f"other must be of the same control: {told[0]}, got {told[1]}")
    if None in (mine.get("weights"), others.get("weights")):
        mine = {**mine, "weights": None}
    if plan.refine != theirs.refine:  # what one of them lacks, both lack together
        plan = replace(plan, refine=False)
    theirs = replace(theirs, refine=plan.refine)
    state, added = (Moments(one, masked=extra["masked"]) for one in (plan, theirs))
    state.load(result.moments)
    added.load(other.moments)
    state.merge(added)
    measures = [name for name in result.measures if name in other.measures]
    dataset = assemble(state, measures, mine)
    dataset.attrs.update({name: value for name, value in controls[0].items() if value is not None})
    return ProbeResult(dataset, state.state(), writes=result.writes and other.writes)
