"""Which pairs a stream keeps, how many rows it sums at once, and what that takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

__all__ = [
    "BLOCK_ROWS",
    "Pairs",
    "alike",
    "as_pairs",
    "at_once",
    "block_rows",
    "first_block",
    "pair_keys",
    "state_bytes",
]

Pairs = Literal["adjacent", "all"] | Sequence[tuple[int, int]]

BLOCK_ROWS = 128
_MOST_ROWS = 1024
# Entries of a layer after which the call of a sum is short beside the sum.
_ENOUGH = 1 << 16
# Bytes of sums that are joined at once where launches are what takes time.
_AT_ONCE = 512 << 20


def state_bytes(
    widths: Sequence[int], positions: int, pairs: Pairs = "adjacent", factors: Sequence[int] = ()
) -> int:
    """Bytes that an accumulator over ``positions`` leading indices holds, without rows not yet summed."""
    keys = pair_keys(pairs, len(widths))
    entries = sum((widths[i] + 2) * (widths[j] + 2) for i, j in keys) + sum(widths)
    return 8 * positions * (entries + sum((widths[layer] + 1) ** 2 for layer in factors))


def as_pairs(pairs: Any) -> Pairs:
    """``pairs`` checked: "adjacent", "all" or a list of (i, j). Raises ValueError for anything else."""
    if pairs == "adjacent":
        return "adjacent"
    if pairs == "all":
        return "all"
    if not isinstance(pairs, str):
        try:
            return [(int(i), int(j)) for i, j in pairs]
        except (TypeError, ValueError):
            pass
    raise ValueError(f"pairs must be 'adjacent', 'all' or a sequence of (i, j), got {pairs!r}")


def pair_keys(pairs: Pairs, layers: int) -> list[tuple[int, int]]:
    """Sorted (i, j), i ≤ j, every layer with itself included."""
    if pairs == "adjacent":
        asked = [(i, i + 1) for i in range(layers - 1)]
    elif pairs == "all":
        asked = [(i, j) for i in range(layers) for j in range(i + 1, layers)]
    else:
        asked = [(min(int(i), int(j)), max(int(i), int(j))) for i, j in pairs]
        for i, j in asked:
            if layers and not 0 <= i <= j < layers:
                raise ValueError(f"pairs must name layers 0 to {layers - 1}, got {(i, j)}")
    return sorted({(i, i) for i in range(layers)} | set(asked))


def block_rows(positions: int, widths: Sequence[int], budget: int, most: int = BLOCK_ROWS) -> int:
    """Rows per position that are summed at once with ``pending_bytes=budget``: ``most``, or fewer."""
    rows = most
    while rows > 8 and 8 * rows * positions * sum(widths) > budget:
        rows //= 2
    return rows


def first_block(
    positions: int, widths: Sequence[int], factors: Sequence[int], *, launched: bool = False
) -> int:
    """Rows per position to sum at once where memory allows: so many that a sum takes longer than its call,
    twice the width or more for layers with a factor, whose update costs as much for few rows as for that
    many, and the most there may be where every sum is a launch and a pass over the moments."""
    if launched and not factors:
        return _MOST_ROWS
    rows = BLOCK_ROWS
    while rows < _MOST_ROWS and 2 * rows * positions * max(widths, default=0) <= _ENOUGH:
        rows *= 2
    widest = max((widths[layer] for layer in factors), default=0)
    return min(_MOST_ROWS, max(rows, 1 << (2 * widest - 1).bit_length())) if widest else rows


def at_once(d: int, e: int, positions: int) -> int:
    """How many pairs of layers of these widths are joined, so that few launches read them."""
    return max(1, _AT_ONCE // max(1, 8 * positions * (d + 2) * (e + 2)))


def alike(
    keys: Iterable[tuple[int, int]], widths: Sequence[int], positions: int
) -> Iterator[list[tuple[int, int]]]:
    """Pairs whose sums have one shape, as many as are joined."""
    shapes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, j in keys:
        shapes.setdefault((widths[i], widths[j]), []).append((i, j))
    for (d, e), some in shapes.items():
        step = at_once(d, e, positions)
        for start in range(0, len(some), step):
            yield some[start : start + step]
