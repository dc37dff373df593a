"""Rows held back until it is known whether they are few enough to be measured all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgfast.ops.spectrum.rows import spectra_of_rows
from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.estimators import samples
from rgfast.probing.estimators.finite import NOT_FINITE, FiniteCheck
from rgfast.probing.estimators.held import HeldRows
from rgfast.probing.estimators.row_choices import RowChoices
from rgfast.probing.estimators.row_measures import DOUBT
from rgfast.probing.estimators.row_views import Part, RowViews
from rgfast.probing.estimators.samples import SampleState, enough, tile_rows, worthwhile
from rgfast.probing.measured import doubtful
from rgfast.probing.plan import Plan
from rgfast.probing.unread import Unread
from rgfast.runtime.waiting import waits_for

__all__ = ["Rows"]

# NumPy has no bf16: rows of these are written by their bits.
_HALVES = (torch.bfloat16, torch.float16)


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
        self._loaded, self._looked = 0, 0
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
        if waits_for(rows[0].device) and (keep is not None or batch.masked is not None or batch.chosen):
            return "rows that do not count are told apart on the CPU only"
        if any(other is not keep for other in batch.keeps) or len({x.shape[:2] for x in rows}) > 1:
            return "layers differ in the positions that count"
        if tuple(x.shape[2] for x in rows) != self.plan.widths:
            return "a layer has another width than before"
        if self.sequences + len(rows[0]) > samples.LIMIT:
            return f"there are more than {samples.LIMIT} sequences"
        if self._bytes + _bytes_of(batch) > self._memory:
            return "the rows of all layers do not fit memory="
        return ""

    def add(self, batch: RowBatch) -> None:
        """Hold a batch that :meth:`accepts` has nothing against; its values are not looked at.

        Raises ValueError if the ``flattened`` view was asked for and sequences differ in length.
        """
        rows, number = batch.present, len(self._batches) - self._loaded
        if "flattened" in self.plan.views and rows[0].shape[1] != self.plan.length:
            self.plan = self.plan.without_flattened(rows[0].shape[1])
        if number == 1:
            self._second, self._as_given = [(x, _version(x)) for x in rows], [{} for _ in rows]
        if not batch.owned:
            if batch.reused or number < 2:
                rows = [x.clone() for x in rows]
            else:
                rows = [self._kept(layer, x) for layer, x in enumerate(rows)]
        targets = [_copied(x) for x in batch.targets]
        # What is written to a file, and merged, has no words in it.
        chosen = [batch.chosen_of(number, 0).clone() for number in range(len(batch.chosen))]
        self._hold(replace(batch, layers=rows, targets=targets, chosen=chosen, owned=True, reused=False))

    def _hold(self, batch: RowBatch) -> None:
        # The second batch of a run that was never stopped is there twice, and what fits must not depend on
        # where one was stopped.
        self._bytes += _bytes_of(batch) * (2 if len(self._batches) == 1 else 1)
        self._devices = batch.present[:1]
        self._batches.append(batch)
        self.sequences += batch.sequences

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
            halves = [1 + _HALVES.index(x.dtype) if x.dtype in _HALVES else 0 for x in batch.present]
            if any(halves):
                arrays[f"halves.{number}"] = np.array(halves, dtype=np.int8)
            for layer, x in enumerate(batch.present):
                plain = x.view(torch.int16) if x.dtype in _HALVES else x
                arrays[f"rows.{number}.{layer}"] = plain.cpu().numpy()
            for k, y in enumerate(batch.targets):
                # Of a whole sequence it is the same at every position.
                each = y[:, :1] if y.stride(1) == 0 else y
                narrow = each.to(torch.float32)
                exact = torch.equal(narrow.to(torch.float64), each)
                arrays[f"targets.{number}.{k}"] = (narrow if exact else each).cpu().numpy()
            for name, mask in (("keep", batch.keeps[0]), ("masked", batch.masked)):
                if mask is not None:
                    arrays[f"{name}.{number}"] = mask.cpu().numpy()
            for k in range(len(batch.chosen)):
                arrays[f"chosen.{number}.{k}"] = batch.chosen_of(k, 0).cpu().numpy()
        return arrays

    @staticmethod
    def is_state(arrays: Mapping[str, np.ndarray[Any, Any]]) -> bool:
        """Whether arrays are what :meth:`state` returns, rather than moments."""
        return "rows.0.0" in arrays

    def load(
        self,
        arrays: Mapping[str, np.ndarray[Any, Any]],
        device: torch.device | str = "cpu",
        notes: Sequence[str] = (),
    ) -> None:
        """Hold what :meth:`state` returned for the same plan, and nothing else; ``notes`` are those that the
        batches had."""
        self._batches, self.sequences, self._bytes = [], 0, 0

        def tensor(name: str) -> Tensor | None:
            return torch.from_numpy(np.array(arrays[name])).to(device) if name in arrays else None

        layers, number = range(len(self.plan.widths)), 0
        while f"rows.{number}.0" in arrays:
            rows = [_given(tensor(f"rows.{number}.{layer}")) for layer in layers]
            halves = arrays.get(f"halves.{number}", np.zeros(len(rows), dtype=np.int8)).tolist()
            rows = [x.view(_HALVES[half - 1]) if half else x for x, half in zip(rows, halves, strict=True)]
            keep, masked = (
                None if x is None else x.to(torch.bool)
                for x in (tensor(f"keep.{number}"), tensor(f"masked.{number}"))
            )
            targets = [
                _given(tensor(f"targets.{number}.{k}")).to(torch.float64).expand(-1, rows[0].shape[1], -1)
                for k in range(len(self.plan.targets))
            ]
            chosen = [
                _given(tensor(f"chosen.{number}.{k}")).to(torch.bool) for k in range(len(self.plan.rows))
            ]
            self._hold(
                RowBatch(
                    rows,
                    [keep] * len(rows),
                    masked,
                    targets,
                    chosen,
                    self.plan.places,
                    padded=keep is not None,
                    notes=() if number else tuple(notes),
                    owned=True,
                )
            )
            number += 1
        self._loaded = self._looked = number

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the batches."""
        return tuple(dict.fromkeys(note for batch in self._batches for note in batch.notes))

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
                begin = self._loaded + 2
                for number, batch in enumerate(self._batches[begin:], start=begin):
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

    def deficient(self) -> tuple[int, ...]:
        """How many spectra of each layer, centered and as they are, have values that a moment loses, by about
        two rows per feature of all positions; none if there are fewer."""
        held, found = HeldRows(self._batches, self.plan), []
        for layer, width in enumerate(self.plan.widths):
            x = held.rows_of(layer)
            x = x[:: max(1, len(x) // (2 * width))].to(torch.float32)
            if len(x) <= width + 1:
                return ()
            spectra = spectra_of_rows(x[None], uncentred=self._uncentred)
            solved = [one for one in spectra or () if one is not None]
            found.append(sum(bool(doubtful(one.sigma, one.rank_limit, DOUBT)) for one in solved))
        return tuple(found)

    def measures(self) -> SampleState:
        """The measures of all that is held, a few positions at a time.

        Raises ValueError if a layer is not finite at a position that counts.
        """
        self._check()
        held = HeldRows(self._batches, self.plan)
        if self.plan.positions and held.longest > self.plan.length:
            self.note([self.plan.longer])
        plan = self.plan
        views = RowViews(plan, uncentred=self._uncentred, sequences=self.sequences, total=held.total)
        totals = {number: held.chosen(number) for number in plan.chosen}
        choices = RowChoices(plan, uncentred=self._uncentred, sequences=self.sequences, totals=totals)
        for tile in held.tiles(tile_rows(plan, self._memory)):
            if not views.take(tile):
                self._raise_not_finite()
            choices.take(tile)
        found = views.finish(held.rows_of)
        chosen, r2 = choices.finish(held.chosen_rows_of)
        found |= chosen
        if "flattened" in plan.views:
            flat, sequence = held.flattened()
            part = views.cloud(flat, sequence)
            if part is None:
                self._raise_not_finite()
            else:
                found["flattened"] = _without_spectra(part)
        masked = self._batches[0].masked is not None
        return SampleState(plan, self.sequences, found, masked, views.r2() | r2)

    def look(self) -> None:
        """Raise ValueError if a layer of a batch since the last look is not finite at a position that counts,
        naming both."""
        look, seen = FiniteCheck(self.plan.names, Unread()), 0
        for number, batch in enumerate(self._batches):
            if number >= self._looked:
                look.check(batch, seen)
            seen += batch.sequences
        look.look()
        self._looked = len(self._batches)

    def _raise_not_finite(self) -> None:
        self._looked = 0
        self.look()
        raise ValueError(f"{NOT_FINITE}, and their squares numbers of fp64; take smaller units")


def _without_spectra(part: Part) -> Part:
    """A flattened sequence has too many singular values to be kept."""
    return tuple(replace(found, spectrum=found.spectrum[..., :0]) for found in part)


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _bytes_of(batch: RowBatch) -> int:
    """What holding a batch takes."""
    targets = sum(y.nbytes // (y.shape[1] if y.stride(1) == 0 else 1) for y in batch.targets)
    return sum(x.nbytes for x in batch.present) + targets


def _copied(target: Tensor) -> Tensor:
    """A copy of ``[B, T, m]``; what is the same at every position is copied once."""
    return target[:, :1].clone().expand_as(target) if target.stride(1) == 0 else target.clone()


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
