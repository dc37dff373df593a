"""Which rank sums up which layers, if they are shared out, and how many rows wait to be handed over."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

__all__ = ["buffer_bytes", "held_layers"]

_BUFFER = 256 << 20


def buffer_bytes(memory: int) -> int:
    """Rows that a rank holds back for others, of the bytes it has."""
    return min(_BUFFER, memory // 16)


def held_layers(widths: Sequence[int], ranks: int, *, neighbors: bool) -> tuple[tuple[int, ...], ...]:
    """The layers whose moments each rank holds, about as many bytes each: those it owns, in a row, and with
    ``neighbors`` the one behind them. Ranks above the number of layers own none and are left out."""
    sizes = [width**2 for width in widths]
    ends, total = list(accumulate(sizes)), sum(sizes)
    owner = [
        min(ranks - 1, int(ranks * (end - size / 2) / total)) for end, size in zip(ends, sizes, strict=True)
    ]
    found = []
    for rank in sorted({*owner}):
        own = [layer for layer, one in enumerate(owner) if one == rank]
        more = [own[-1] + 1] if neighbors and own[-1] + 1 < len(widths) else []
        found.append((*own, *more))
    return tuple(found)
