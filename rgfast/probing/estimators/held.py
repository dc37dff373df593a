"""The rows of all batches, gathered by position."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.estimators import samples
from rgfast.probing.estimators.row_measures import Room
from rgfast.probing.estimators.row_views import Tile
from rgfast.probing.plan import Plan

__all__ = ["HeldRows"]


class HeldRows:
    """The rows of all batches, by position."""

    def __init__(self, batches: list[RowBatch], plan: Plan) -> None:
        self._batches, self._plan = batches, plan
        self._lengths = [batch.first.shape[1] for batch in batches]
        self._starts = [0, *itertools.accumulate(batch.sequences for batch in batches)]
        sizes = [
            batch.keeps[0].sum(0)
            if batch.keeps[0] is not None
            else torch.full((length,), batch.sequences, dtype=torch.int64, device="cpu")
            for batch, length in zip(batches, self._lengths, strict=True)
        ]
        self.longest = max(self._lengths)
        counts = torch.zeros(self.longest, dtype=torch.int64, device="cpu")
        for size in sizes:
            counts[: len(size)] += size.cpu()
        self._counts: list[int] = counts.tolist()
        self.total = sum(self._counts)

    def tiles(self, most: int) -> Iterator[Tile]:
        """All positions that a view is of, about ``most`` rows a layer at a time."""
        plan = self._plan
        every = any(view in ("pooled", "mean_pooled", *plan.rows) for view in plan.views)
        wanted = list(range(self.longest)) if every else [t for t in plan.positions if t < self.longest]
        room, kinds = Room(), self._kinds()
        device = self._batches[0].first.device
        alike = len({*zip(plan.widths, kinds, strict=True)}) == 1
        for positions in self._groups(wanted, most):
            rows = sum(self._counts[t] for t in positions)
            if alike:  # what is one tensor need not be stacked
                yield self._tile(
                    positions, room.take("all", kinds[0], device, len(kinds), rows, plan.widths[0])
                )
                continue
            each = zip(plan.widths, kinds, strict=True)
            yield self._tile(
                positions, [room.take(str(k), kind, device, rows, d) for k, (d, kind) in enumerate(each)]
            )

    def _kinds(self) -> list[torch.dtype]:
        """What rows are widened to: fp64 stay so."""
        return [
            torch.float64
            if any(b.present[layer].dtype == torch.float64 for b in self._batches)
            else torch.float32
            for layer in range(len(self._plan.widths))
        ]

    def _groups(self, wanted: list[int], most: int) -> Iterator[list[int]]:
        """Neighbours that are taken together: whole ones apart from those that some sequences lack."""
        parts = max(1, -(-len(wanted) // samples.LEAST_TILES))
        group: list[int] = []
        for t in wanted:
            rows = sum(self._counts[k] for k in group) + self._counts[t]
            if group and (rows > most or len(group) == parts or self._whole(t) != self._whole(group[0])):
                yield group
                group = []
            group.append(t)
        if group:
            yield group

    def _whole(self, t: int) -> bool:
        return self._counts[t] == self._starts[-1]

    def _tile(self, positions: list[int], room: Sequence[Tensor] | Tensor) -> Tile:
        counts, plan = [self._counts[t] for t in positions], self._plan
        hidden = None
        if self._whole(positions[0]):
            where = _slice_or_list(positions)
            for layer, to in enumerate(room):
                pieces = [batch.present[layer][:, where].transpose(0, 1) for batch in self._batches]
                out = to.view(len(positions), -1, to.shape[1])
                _ = out.copy_(pieces[0]) if len(pieces) == 1 else torch.cat(pieces, 1, out=out)
            if self._batches[0].masked is not None:
                parts = [_given(b.masked)[:, where].T for b in self._batches]
                hidden = torch.cat(parts, 1).reshape(-1)
            targets = [
                torch.cat([b.targets[k][:, where].transpose(0, 1) for b in self._batches], 1).flatten(0, 1)
                for k in range(len(plan.targets))
            ]
            chosen = [
                torch.cat([_chosen(b, k)[:, where].T for b in self._batches], 1).reshape(-1)
                for k in range(len(plan.rows))
            ]
            return Tile(positions, counts, room, None, hidden, targets, chosen)
        places = [self._place(t) for t in positions]
        for layer, to in enumerate(room):
            at = 0
            for t, place in zip(positions, places, strict=True):
                for batch, kept in place:
                    x = batch.present[layer][:, t]
                    to[at : at + len(kept)] = x if len(kept) == len(x) else x[kept]
                    at += len(kept)
        numbers = [
            kept + start
            for place in places
            for (_, kept), start in zip(place, self._firsts(place), strict=True)
        ]
        sequence = torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.int64, device="cpu")
        if self._batches[0].masked is not None:
            found = [
                _given(b.masked)[kept, t]
                for t, place in zip(positions, places, strict=True)
                for b, kept in place
            ]
            hidden = torch.cat(found) if found else torch.zeros(0, dtype=torch.bool, device="cpu")
        asked = [
            [b.targets[k][kept, t] for t, place in zip(positions, places, strict=True) for b, kept in place]
            for k in range(len(plan.targets))
        ]
        targets = [
            torch.cat(some) if some else sequence.new_zeros(0, width, dtype=torch.float64)
            for some, (_, width) in zip(asked, plan.targets, strict=True)
        ]
        picked = [
            [_chosen(b, k)[kept, t] for t, place in zip(positions, places, strict=True) for b, kept in place]
            for k in range(len(plan.rows))
        ]
        chosen = [torch.cat(some) if some else sequence.new_zeros(0, dtype=torch.bool) for some in picked]
        return Tile(positions, counts, room, sequence, hidden, targets, chosen)

    def _firsts(self, place: list[tuple[RowBatch, Tensor]]) -> list[int]:
        starts = {id(batch): start for batch, start in zip(self._batches, self._starts, strict=False)}
        return [starts[id(batch)] for batch, _ in place]

    def _place(self, t: int) -> list[tuple[RowBatch, Tensor]]:
        """The batches that are as long, and which of their sequences count there."""
        found = []
        for batch, length in zip(self._batches, self._lengths, strict=True):
            if t >= length:
                continue
            keep = batch.keeps[0]
            kept = (
                torch.arange(batch.sequences, dtype=torch.int64, device="cpu")
                if keep is None
                else keep[:, t].nonzero()[:, 0]
            )
            if len(kept):
                found.append((batch, kept))
        return found

    def rows_of(self, layer: int) -> Tensor:
        """All rows of a layer that count ``[R, d]``."""
        found = []
        for batch in self._batches:
            x, keep = batch.present[layer], batch.keeps[0]
            found.append(x.flatten(0, 1) if keep is None else x[keep])
        return torch.cat(found)

    def chosen(self, number: int) -> int:
        """How many rows of a layer a selection has."""
        return sum(int(batch.chosen_of(number, 0).sum()) for batch in self._batches)

    def chosen_rows_of(self, number: int, layer: int) -> Tensor:
        """All rows of a layer that a selection has ``[R, d]``."""
        return torch.cat([batch.present[layer][batch.chosen_of(number, 0)] for batch in self._batches])

    def flattened(self) -> tuple[list[Tensor], Tensor | None]:
        """Every layer's sequences as one row each, and which sequences have all their positions."""
        keeps = [batch.keeps[0] for batch in self._batches]
        flat = [
            torch.cat([batch.present[layer].flatten(1) for batch in self._batches])
            for layer in range(len(self._plan.widths))
        ]
        if all(keep is None for keep in keeps):
            return flat, None
        whole = torch.cat(
            [
                torch.ones(b.sequences, dtype=torch.bool, device="cpu") if keep is None else keep.all(1)
                for b, keep in zip(self._batches, keeps, strict=True)
            ]
        ).nonzero()[:, 0]
        return [x[whole] for x in flat], whole


def _slice_or_list(where: list[int]) -> slice | list[int]:
    """Positions to index with; without a copy where they are neighbours."""
    near = slice(where[0], where[-1] + 1)
    return near if where == list(range(near.start, near.stop)) else where


def _chosen(batch: RowBatch, number: int) -> Tensor:
    found = batch.chosen[number]
    assert isinstance(found, Tensor)
    return found


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
