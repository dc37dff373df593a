"""The partition of layers among ranks: who sums up which, and how many bytes of rows are in transit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

__all__ = ["buffer_bytes", "held_layers", "transit_budget", "transit_bytes"]

_TRANSIT = 512 << 20


def transit_budget(memory: int) -> int:
    """Bytes for rows in transit, of those that a rank has: held back, going out and coming in."""
    return min(_TRANSIT, memory // 8)


def transit_bytes(
    memory: int, widths: Sequence[int], held: Sequence[Sequence[int]], ranks: int, feature: int
) -> int:
    """:func:`transit_budget`, or more if one sequence, of ``feature`` bytes per feature, has more rows."""
    return max(transit_budget(memory), int(feature * _most_in_transit(widths, held, ranks, [1.0] * ranks)))


def buffer_bytes(memory: int, widths: Sequence[int], held: Sequence[Sequence[int]], ranks: int) -> int:
    """Rows that a rank holds back for others until they go out, of the bytes it has."""
    each = [1 / kept if kept else 0.0 for kept in _kept(widths, held, ranks)]
    return max(1, int(transit_budget(memory) / _most_in_transit(widths, held, ranks, each)))


def _most_in_transit(
    widths: Sequence[int], held: Sequence[Sequence[int]], ranks: int, rows: Sequence[float]
) -> float:
    """Numbers in transit at a rank, at most, if rank r holds back ``rows[r]`` of every layer: while they go
    out, and others come in, as many gather; and before the next go out, those that came are summed up."""
    takes = [sum(widths[layer] for layer in some) for some in held] + [0] * (ranks - len(held))
    most = 0.0
    for rank, kept in enumerate(_kept(widths, held, ranks)):
        out = rows[rank] * (sum(takes) - takes[rank])
        come = takes[rank] * (sum(rows) - rows[rank])
        most = max(most, rows[rank] * kept + out + come, out + 2 * come)
    return most


def _kept(widths: Sequence[int], held: Sequence[Sequence[int]], ranks: int) -> list[int]:
    """The widths, in all, of the layers whose rows each rank hands over."""
    return [
        sum(widths[k] for k in {k for other, some in enumerate(held) if other != rank for k in some})
        for rank in range(ranks)
    ]


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
