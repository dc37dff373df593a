"""Whether rows are held until the end or summed up, for a number of sequences that is still to come."""

from __future__ import annotations

from rgfast.probing.estimators.samples import LIMIT, enough, worthwhile
from rgfast.probing.plan import Plan
from rgfast.probing.predict import Foreseen
from rgfast.probing.spec import ProbeSpec

__all__ = ["rows_or_moments"]


def rows_or_moments(
    spec: ProbeSpec,
    rows: Plan | None,
    moments: Plan | None,
    sequences: int,
    *,
    why_moments: str,
    too_big: ValueError | None,
    deficient: tuple[int, ...],
) -> Foreseen:
    """The estimator of ``sequences`` by the plans of both, None if it is ruled out: ``why_moments``.

    Raises ValueError if neither will do, since moments are ``too_big``.
    """
    plan = rows or moments
    assert plan is not None
    targets = sum(width for _, width in plan.targets)
    rows_bytes = sequences * plan.length * (4 * sum(plan.widths) + 8 * targets)
    reasons = {
        why_moments: rows is None,
        f"there are more than {LIMIT} sequences": sequences > LIMIT,
        "the rows of all layers do not fit memory=": rows_bytes > spec.memory_bytes,
        "there are too few sequences for every measure": not enough(sequences, spec.groups),
        "they take a moment either way": spec.route == "auto" and not worthwhile(plan, sequences),
    }
    why = next((reason for reason, holds in reasons.items() if reason and holds), "")
    if not why:
        why = f"the rows of at most {LIMIT} sequences fit memory="
        return Foreseen("rows", why, plan, rows_bytes, deficient)
    if moments is None:
        raise ValueError(f"{too_big} (rows cannot be held, since {why})")
    return Foreseen("moments", why, moments, moments.state_bytes, deficient)
