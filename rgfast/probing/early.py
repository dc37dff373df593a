"""Batches that come before every layer has run, which a plan is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.first import FirstBatch, first_of
from rgfast.probing.targets import Target

__all__ = ["Early", "owned"]

# Forwards to wait for a layer that does not run in every one.
_PATIENCE = 16


class Early:
    """The batches so far, until all layers have been seen."""

    def __init__(self) -> None:
        self.batches: list[RowBatch] = []

    def __bool__(self) -> bool:
        return bool(self.batches)

    @property
    def sequences(self) -> int:
        """How many sequences the batches have."""
        return sum(batch.numbers for batch in self.batches)

    def add(self, batch: RowBatch, names: Sequence[str]) -> None:
        """Keep a batch of the layers ``names``. Raises ValueError if some have not run for too long."""
        self.batches.append(owned(batch) if batch.missing else batch)
        unseen = self.unseen()
        if unseen and len(self.batches) == _PATIENCE:
            raise ValueError(self.never_ran(names))

    def own(self) -> None:
        """Have the last batch stay although other forwards follow."""
        self.batches[-1:] = [owned(batch) for batch in self.batches[-1:]]

    def take(self) -> list[RowBatch]:
        """The batches; none are left."""
        batches, self.batches = self.batches, []
        return batches

    def unseen(self) -> list[int]:
        """The layers that have not run yet."""
        layers = range(len(self.batches[-1].layers))
        return [k for k in layers if all(batch.layers[k] is None for batch in self.batches)]

    def never_ran(self, names: Sequence[str]) -> str:
        """What is said of the layers that have not run yet."""
        unseen = ", ".join(names[layer] for layer in self.unseen())
        return f"layers: {unseen} did not run in {len(self.batches)} forwards; name layers that run"

    def first(self, layers: int, targets: Sequence[Target]) -> FirstBatch:
        """What the last batch shows of as many layers, now that all have run."""
        rows = [next(x for b in self.batches if (x := b.layers[k]) is not None) for k in range(layers)]
        labelled = [target.classes is not None for target in targets]
        return first_of(self.batches[-1], rows, [target.name for target in targets], labelled)


def owned(batch: RowBatch) -> RowBatch:
    """``batch`` with layers of its own, which later forwards do not write to."""
    return replace(batch, layers=[None if x is None else x.clone() for x in batch.layers])
