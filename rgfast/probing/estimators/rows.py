"""Rows held back until it is known whether they are few enough to be measured all at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.estimators import samples
from rgfast.probing.estimators.finite import NOT_FINITE, FiniteCheck
from rgfast.probing.estimators.row_measures import Room
from rgfast.probing.estimators.row_views import Part, RowViews, Tile
from rgfast.probing.estimators.samples import SampleState, enough, tile_rows, worthwhile
from rgfast.probing.plan import Plan
from rgfast.probing.unread import Unread
from rgfast.runtime.waiting import waits_for

__all__ = ["Rows"]


class Rows:
    """The estimator that holds rows back by batch: those of all layers, on one device, of any padding.

    On a device of which nothing is read while a model runs, padding would have to be: there it is refused.

    It keeps what came: :meth:`batches` hands the rows over to an estimator that sums them up. Rows are copied
    if they are about to be overwritten, else those of outputs that the model does not leave alone from one
    forward to the next. That shows from the third batch on (the probe copies what it captures in the first
    one): the memory of the second batch was written to, or is given out again. It is held for that, so that a
    model that takes turns between buffers is found out before one is lost.
    """

    def __init__(self, plan: Plan, memory: int, *, uncentred: bool) -> None:
        self.plan, self._memory, self._uncentred = plan, memory, uncentred
        self._batches: list[RowBatch] = []
        self.sequences = 0
        self._bytes = 0
        self._devices: list[Tensor] = []
        self._second: list[tuple[Tensor, int]] = []
        self._reused: set[int] = set()
        self._as_given: list[dict[int, tuple[Tensor, int]]] = []

    def note(self, sentences: Sequence[str]) -> None:
        """Let the result say these too."""
        self.plan = self.plan.noted(sentences)

    def accepts(self, batch: RowBatch) -> str:
        """Why a batch cannot be held beside the others, or nothing."""
        if batch.missing:
            return "a layer did not run"
        rows, keep = batch.present, batch.keeps[0]
        if len({x.device for x in (*self._devices, *rows)}) > 1:
            return "layers are on several devices"
        if waits_for(rows[0].device) and (keep is not None or batch.masked is not None):
            return "rows that do not count are told apart on the CPU only"
        if any(other is not keep for other in batch.keeps) or len({x.shape[:2] for x in rows}) > 1:
            return "layers differ in the positions that count"
        if tuple(x.shape[2] for x in rows) != self.plan.widths:
            return "a layer has another width than before"
        if self.sequences + len(rows[0]) > samples.LIMIT:
            return f"there are more than {samples.LIMIT} sequences"
        if self._bytes + sum(x.nbytes for x in rows) > self._memory:
            return "the rows of all layers do not fit memory="
        return ""

    def add(self, batch: RowBatch) -> None:
        """Hold a batch that :meth:`accepts` has nothing against; its values are not looked at.

        Raises ValueError if the ``flattened`` view was asked for and sequences differ in length.
        """
        rows, number = batch.present, len(self._batches)
        if "flattened" in self.plan.views and rows[0].shape[1] != self.plan.length:
            self.plan = self.plan.without_flattened(rows[0].shape[1])
        if number == 1:
            self._bytes += sum(x.nbytes for x in rows)
            self._second, self._as_given = [(x, _version(x)) for x in rows], [{} for _ in rows]
        if not batch.owned:
            if batch.reused or number < 2:
                rows = [x.clone() for x in rows]
            else:
                rows = [self._kept(layer, x) for layer, x in enumerate(rows)]
        self._devices = [rows[0]]
        self._batches.append(replace(batch, layers=rows, owned=True, reused=False))
        self.sequences += len(rows[0])
        self._bytes += sum(x.nbytes for x in rows)

    def merge(self, other: Rows) -> None:
        """Hold what ``other`` holds too, its sequences numbered on from the own."""
        for batch in other.batches():
            self._batches.append(batch)
            self.sequences += batch.sequences
        self._bytes += other._bytes

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """All rows as named arrays, to hold on from or to merge later."""
        self._check()
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        for number, batch in enumerate(self._batches):
            for layer, x in enumerate(batch.present):
                # NumPy has no bf16.
                wide = x.to(torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else x
                arrays[f"rows.{number}.{layer}"] = wide.cpu().numpy()
            for name, mask in (("keep", batch.keeps[0]), ("masked", batch.masked)):
                if mask is not None:
                    arrays[f"{name}.{number}"] = mask.cpu().numpy()
        return arrays

    @staticmethod
    def is_state(arrays: Mapping[str, np.ndarray[Any, Any]]) -> bool:
        """Whether arrays are what :meth:`state` returns, rather than moments."""
        return "rows.0.0" in arrays

    def load(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Hold what :meth:`state` returned for the same plan, and nothing else."""
        self._batches, self.sequences, self._bytes = [], 0, 0
        layers = len(self.plan.widths)
        number = 0
        while f"rows.{number}.0" in arrays:
            rows = [torch.from_numpy(np.array(arrays[f"rows.{number}.{layer}"])) for layer in range(layers)]
            keep, masked = (
                torch.from_numpy(np.array(arrays[key])).to(torch.bool) if key in arrays else None
                for key in (f"keep.{number}", f"masked.{number}")
            )
            batch = RowBatch(
                rows, [keep] * layers, masked, places=self.plan.places, padded=keep is not None, owned=True
            )
            self._batches.append(batch)
            self.sequences += batch.sequences
            self._bytes += sum(x.nbytes for x in rows)
            number += 1

    def batches(self) -> Iterator[RowBatch]:
        """What is held. Raises RuntimeError if rows that were not copied have been written to since."""
        self._check()
        yield from self._batches

    def _kept(self, layer: int, x: Tensor) -> Tensor:
        """``x``, or a copy where its memory will be written to again."""
        if not self._second:
            return x.clone()
        if layer not in self._reused:
            second, version = self._second[layer]
            given_again = x.data_ptr() == second.data_ptr()
            if second.is_inference() or second._version != version or given_again:
                self._reused.add(layer)
                self._check_unchanged(layer)
                for number, batch in enumerate(self._batches[2:], start=2):
                    rows = list(batch.layers)
                    rows[layer] = batch.present[layer].clone()
                    self._batches[number] = replace(batch, layers=rows)
                self._as_given[layer].clear()
        if layer in self._reused:
            return x.clone()
        if x.data_ptr() in self._as_given[layer]:
            self._check_unchanged(layer)
        self._as_given[layer][x.data_ptr()] = x, _version(x)
        return x

    def _check_unchanged(self, layer: int) -> None:
        if any(_version(x) != version for x, version in self._as_given[layer].values()):
            raise RuntimeError(
                f"the model wrote to the output of {self.plan.names[layer]} of an earlier forward, which it "
                "left alone in its first ones; take route='moments'"
            )

    def _check(self) -> None:
        for layer in range(len(self._as_given)):
            self._check_unchanged(layer)

    def enough(self) -> bool:
        """Whether all measures are defined."""
        return enough(self.sequences, self.plan.groups)

    def worthwhile(self) -> bool:
        """Whether accumulating their moments would be felt."""
        return worthwhile(self.plan, self.sequences)

    def measures(self) -> SampleState:
        """The measures of all that is held, a few positions at a time.

        Raises ValueError if a layer is not finite at a position that counts.
        """
        self._check()
        held = _Held(self._batches, self.plan)
        if self.plan.positions and held.longest > self.plan.length:
            self.note([self.plan.longer])
        plan = self.plan
        views = RowViews(plan, uncentred=self._uncentred, sequences=self.sequences, total=held.total)
        for tile in held.tiles(tile_rows(plan, self._memory)):
            if not views.take(tile):
                self._raise_not_finite()
        found = views.finish(held.rows_of)
        if "flattened" in plan.views:
            flat, sequence = held.flattened()
            part = views.cloud(flat, sequence)
            if part is None:
                self._raise_not_finite()
            else:
                found["flattened"] = _without_spectra(part)
        masked = self._batches[0].masked is not None
        return SampleState(plan, self.sequences, found, masked)

    def _raise_not_finite(self) -> None:
        look, seen = FiniteCheck(self.plan.names, Unread()), 0
        for batch in self._batches:
            look.check(batch, seen)
            seen += batch.sequences
        look.look()
        raise ValueError(f"{NOT_FINITE}, and their squares numbers of fp64; take smaller units")


class _Held:
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
        every = any(view in ("pooled", "mean_pooled") for view in plan.views)
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
        counts = [self._counts[t] for t in positions]
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
            return Tile(positions, counts, room, None, hidden)
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
        return Tile(positions, counts, room, sequence, hidden)

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


def _without_spectra(part: Part) -> Part:
    """A flattened sequence has too many singular values to be kept."""
    return tuple(replace(found, spectrum=found.spectrum[..., :0]) for found in part)


def _slice_or_list(where: list[int]) -> slice | list[int]:
    """Positions to index with; without a copy where they are neighbours."""
    near = slice(where[0], where[-1] + 1)
    return near if where == list(range(near.start, near.stop)) else where


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
