"""What a plan takes on each of several ranks, and what moves between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rgfast.probing.options import human_bytes
from rgfast.probing.plan import Held, Plan
from rgfast.streaming.sizes import at_once

__all__ = [
    "Sums",
    "handed_bytes",
    "handing_note",
    "moment_bytes",
    "solving_bytes",
    "spectra_bytes",
    "spectra_per_layer",
    "summing_note",
    "sums_of",
]

# Matrices of a layer that exist at once while its spectra are solved, as measured on the CPU.
_SOLVING = 14


@dataclass(frozen=True)
class Sums:
    """What ranks that each hold all moments take to add them up: bytes that a rank has at most, those that go
    between all ranks, and those that go through the connection of the busiest one, in and out."""

    peak: int
    between: int
    through: int


def sums_of(plan: Plan, ranks: int, waiting: int) -> Sums:
    """What adding up takes if every rank has ``waiting`` bytes of rows that it has not summed yet."""
    solving, moments = solving_bytes(plan), moment_bytes(plan)
    if ranks == 1:
        return Sums(plan.state_bytes + solving, 0, 0)
    state, largest = _used_bytes(plan), max(held.bytes(plan.pending_bytes) for held in _used(plan))
    hops = 2 * (ranks - 1).bit_length()
    # Every second rank hands over rows that it has not summed, too; whoever merges them sums them.
    return Sums(
        max(2 * (state + largest), 2 * state + solving),
        2 * (ranks - 1) * moments + ranks // 2 * waiting,
        hops * moments + waiting,
    )


def summing_note(plan: Plan, ranks: int) -> str:
    """What is said before a run of ranks that each hold all moments."""
    # How many rows wait in the end depends on how many come: half of what there is room for, on average.
    found = sums_of(plan, ranks, (_used_bytes(plan) - moment_bytes(plan)) // 2)
    return (
        f"each of {ranks} ranks sums up all layers of its own sequences; adding up the ranks takes at most "
        f"{human_bytes(found.peak)} on each and moves about {human_bytes(found.between)} between all of "
        f"them, {human_bytes(found.through)} through the busiest"
    )


def handed_bytes(widths: Sequence[int], held: Sequence[Sequence[int]], itemsize: int) -> int:
    """Bytes of a row of every layer, at all ranks that hold it."""
    return itemsize * sum(widths[layer] for some in held for layer in some)


def handing_note(plan: Plan, parts: Sequence[Plan], row: int, ranks: int, transit: int) -> str:
    """What is said before a run of ranks that share out the layers of ``plan``: with ``row`` bytes that go to
    the owners of a row's layers, and ``transit`` bytes of rows on their way to and from a rank."""
    peak = max(part.state_bytes + max(transit, solving_bytes(part)) for part in parts)
    sequence, end = (ranks - 1) * plan.length * row // ranks, (ranks - 1) * spectra_bytes(plan, plan.widths)
    return (
        f"at most {human_bytes(peak)} with what solves spectra; about {human_bytes(sequence)} per sequence "
        f"move between all ranks, and {human_bytes(end)} in the end"
    )


def moment_bytes(plan: Plan) -> int:
    """Moments of sequences as long as the first ones, without rows that are not summed yet."""
    return plan.groups * sum(held.moment_bytes for held in _used(plan))


def _used_bytes(plan: Plan) -> int:
    """Moments of sequences as long as the first ones, and at most as many rows as may wait."""
    return plan.groups * sum(held.bytes(plan.pending_bytes) for held in _used(plan))


def _used(plan: Plan) -> list[Held]:
    """What rows come to, if no sequence is longer than the first ones: the rest has none if all positions are
    followed."""
    return [held for held in plan.accumulators if plan.rows_of(held)]


def spectra_bytes(plan: Plan, widths: Sequence[int]) -> int:
    """Singular values of layers of these widths, which are nearly all that there is of measures."""
    return 8 * spectra_per_layer(plan) * len(widths) * max(widths)


def solving_bytes(plan: Plan) -> int:
    """What spectra take while they are solved: a layer at a time, or several where sums are launches."""
    width, positions = max(plan.widths), max(1, len(plan.positions))
    layers = min(len(plan.widths), at_once(width, width, positions)) if plan.launched else 1
    return _SOLVING * 8 * layers * positions * (width + 2) ** 2


def spectra_per_layer(plan: Plan) -> int:
    """How many spectra a layer has, centered or not."""
    single = sum(view in plan.views for view in ("pooled", "mean_pooled", "flattened", *plan.rows))
    return single + ("position" in plan.views) * len(plan.positions)
