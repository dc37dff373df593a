"""The rows of a view, of all layers of both models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgfast.probing.capture.positions import columns_of
from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.estimators.means import means_of
from rgfast.probing.options import POSITIONAL
from rgfast.probing.plan import Plan
from rgfast.runtime.waiting import sent

__all__ = ["Rows", "end_to_end", "rows_of"]


@dataclass(frozen=True)
class Rows:
    """Rows ``layers[l][R, d_l]``, or ``[R, P, d_l]`` of a view by position, and of which sequence each is.

    ``kept[R, P]`` says which positions count (None: all). ``sequence`` and ``kept`` are on the CPU.
    """

    layers: Sequence[Tensor]
    sequence: Tensor
    kept: Tensor | None = None

    def at(self, index: Tensor) -> Rows:
        """Some of the rows."""
        kept = None if self.kept is None else self.kept[index]
        return Rows([x[sent(index, x.device)] for x in self.layers], self.sequence[index], kept)

    def by_position(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        """The rows that count ``[n, d_l]`` of each position, and of which sequence they are; one of a view
        without positions."""
        if self.layers[0].dim() == 2:
            yield list(self.layers), self.sequence
            return
        for position in range(self.layers[0].shape[1]):
            rows = [x[:, position] for x in self.layers]
            if self.kept is None:
                yield rows, self.sequence
                continue
            at = self.kept[:, position].nonzero()[:, 0]
            yield [x[sent(at, x.device)] for x in rows], self.sequence[at]

    def counts(self) -> Tensor:
        """How many rows count at each position ``[P]``, int64."""
        if self.kept is not None:
            return self.kept.sum(0)
        shape = self.layers[0].shape
        positions = shape[1] if len(shape) == 3 else 1
        return torch.full((positions,), shape[0], dtype=torch.int64, device="cpu")


def end_to_end(parts: Sequence[Rows]) -> Rows:
    """Rows of several batches as one."""
    kept = [part.kept for part in parts if part.kept is not None]
    return Rows(
        [torch.cat(layer) for layer in zip(*(part.layers for part in parts), strict=True)],
        torch.cat([part.sequence for part in parts]),
        torch.cat(kept) if kept else None,
    )


def rows_of(view: str, batch: RowBatch, plan: Plan, seen: int) -> Rows:
    """The rows of a view in a batch after ``seen`` sequences, copied. Reading padding waits for a device."""
    layers, keep = batch.present, batch.keeps[0]
    sequence = torch.arange(seen, seen + batch.sequences, dtype=torch.int64, device="cpu")
    if view == "mean_pooled":
        means, some = means_of(layers, list(batch.keeps))
        found = Rows(means, sequence)
        return found if some is None else found.at(some.cpu().nonzero()[:, 0])
    if view in POSITIONAL:
        return _at_positions(view, batch, plan, sequence)
    if view in plan.rows:
        keep = batch.chosen_of(plan.rows.index(view), 0)
    if view == "flattened":
        found = Rows([x.flatten(1).clone() for x in layers], sequence)
        return found if keep is None else found.at(keep.all(1).cpu().nonzero()[:, 0])
    every = torch.repeat_interleave(sequence, layers[0].shape[1])
    found = Rows([x.flatten(0, 1).clone() for x in layers], every)
    return found if keep is None else found.at(keep.flatten().cpu().nonzero()[:, 0])


def _at_positions(view: str, batch: RowBatch, plan: Plan, sequence: Tensor) -> Rows:
    layers, keep, masked = batch.present, batch.keeps[0], batch.masked
    length, here = layers[0].shape[1], layers[0].device
    if keep is None:
        keep = torch.ones(batch.sequences, length, dtype=torch.bool, device=here)
    columns = columns_of(plan.positions, keep)
    columns = columns.expand(len(keep), -1)
    inside = (columns >= 0) & (columns < length)
    columns = columns.clamp(0, length - 1)
    kept = keep.gather(1, columns) & inside
    if view != "position":
        assert masked is not None
        kept = kept & (masked if view == "masked" else ~masked).gather(1, columns)
    rows = [x.gather(1, sent(columns, x.device)[..., None].expand(-1, -1, x.shape[2])) for x in layers]
    return Rows(rows, sequence, kept.cpu())
