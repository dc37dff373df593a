"""Two results of the same probe as one, exactly as if it had seen both samples."""

from __future__ import annotations

from dataclasses import replace

from rgfast.probing.assemble import assemble
from rgfast.probing.estimators.moments import Moments
from rgfast.probing.plan import Plan
from rgfast.probing.result import ProbeResult

__all__ = ["merged"]


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
    if plan.refine != theirs.refine:  # what one of them lacks, both lack together
        plan = replace(plan, refine=False)
    theirs = replace(theirs, refine=plan.refine)
    state, added = (Moments(one, masked=extra["masked"]) for one in (plan, theirs))
    state.load(result.moments)
    added.load(other.moments)
    state.merge(added)
    measures = [name for name in result.measures if name in other.measures]
    dataset = assemble(state, measures, result.provenance)
    return ProbeResult(dataset, state.state(), writes=result.writes and other.writes)
