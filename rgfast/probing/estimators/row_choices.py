"""The views of ``rows=`` from rows that come a few positions at a time: each pools what it selects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from rgfast.probing.estimators.row_views import Part, RowViews, Tile, numbers_of
from rgfast.probing.plan import Plan

__all__ = ["RowChoices"]


class RowChoices:
    """Takes every position once, as :class:`RowViews` does, and gives the measures of the views of ``rows=``.

    ``totals`` has the number of rows of a layer by the number of the selection.
    """

    def __init__(self, plan: Plan, *, uncentred: bool, sequences: int, totals: Mapping[int, int]) -> None:
        pooled = replace(plan, views=("pooled",), positions=())
        self._names = plan.chosen
        self._pools = {
            number: RowViews(pooled, uncentred=uncentred, sequences=sequences, total=totals[number])
            for number in self._names
        }

    def take(self, tile: Tile) -> None:
        """Take the rows of some positions, all finite, which may be overwritten afterwards."""
        for number, pool in self._pools.items():
            at = tile.chosen[number].nonzero()[:, 0]
            rows, targets = ([x[at] for x in some] for some in (tile.rows, tile.targets))
            pool.take(Tile(tile.positions[:1], [len(at)], rows, numbers_of(tile)[at], None, targets))

    def finish(
        self, rows_of: Callable[[int, int], Tensor]
    ) -> tuple[dict[str, Part], dict[str, tuple[Tensor, Tensor]]]:
        """The measures of every view, and R² of the targets; ``rows_of(k, l)`` are all rows ``[R, d_l]`` of
        a layer that selection k has."""
        parts: dict[str, Part] = {}
        r2: dict[str, tuple[Tensor, Tensor]] = {}
        for number, pool in self._pools.items():
            name = self._names[number]
            parts[name] = pool.finish(partial(rows_of, number))["pooled"]
            if found := pool.r2():
                r2[name] = found["pooled"]
        return parts, r2
