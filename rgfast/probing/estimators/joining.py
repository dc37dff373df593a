"""Moments of parts of a sample as those of all of it, or of all of it but one part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rgfast.streaming import MomentAccumulator

__all__ = ["all_but_one", "joined_moments"]


def all_but_one(
    parts: Sequence[MomentAccumulator], more: list[MomentAccumulator]
) -> Iterator[MomentAccumulator]:
    """All of ``parts`` but one, for every one in order, and ``more``; in G log G steps for G parts."""
    if len(parts) == 1:
        yield joined_moments(more, factors=False)
        return
    half = len(parts) // 2
    for mine, others in ((parts[:half], parts[half:]), (parts[half:], parts[:half])):
        yield from all_but_one(mine, [joined_moments([*more, *others], factors=False)])


def joined_moments(parts: Sequence[MomentAccumulator], *, factors: bool = True) -> MomentAccumulator:
    """All of them as one; the only one itself."""
    if len(parts) == 1:
        return parts[0]
    total = MomentAccumulator(pairs=parts[0].pairs_asked, factors=parts[0].factored if factors else ())
    for part in parts:
        total.merge(part)
    return total
