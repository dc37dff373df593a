"""What every entry of a batch means: an argument of the model, padding, a mask, a target."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rgfast.probing.capture.batches import Caller, batch_rows
from rgfast.probing.capture.companions import MaskSpec, row_masks
from rgfast.probing.estimators.base import RowBatch
from rgfast.probing.targets import Target

__all__ = ["Entries"]


class Entries:
    """The entries of the forward that is running, by name, and how a batch becomes a call of the model."""

    def __init__(self, model: nn.Module, mask: MaskSpec, targets: Sequence[Target]) -> None:
        self._caller, self._mask, self._targets = Caller(model), mask, targets
        self._signature = inspect.signature(model.forward)
        self._noted: dict[str, Any] = {}
        self._now: dict[str, Any] = {}

    def note(self, entries: Mapping[str, Any]) -> None:
        """Keep entries that the model itself does not take, for the next forward."""
        self._noted.update(entries)

    def run(self, batch: Any) -> Any:
        """The output of the model on a batch; an empty batch gives None."""
        if not batch_rows(batch):
            return None
        entries = self._caller.entries(batch)
        named = [self._mask, *(target.entry for target in self._targets)]
        self.note(entries)
        return self._caller(batch, entries, frozenset(name for name in named if isinstance(name, str)))

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward on these arguments begins: they are entries too."""
        try:
            bound = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        except TypeError:
            bound = {}
        self._now = {**bound, **bound.pop("kwargs", {}), **self._noted}
        self._noted = {}

    def batch(self, layers: Sequence[Tensor], seen: int) -> RowBatch:
        """The batch after ``seen`` sequences, whose layers' rows are ``layers[l]`` ``[B, T_l, d_l]``."""
        first = layers[0]
        keep, masked = row_masks(self._mask, self._now, first)
        lengths = {x.shape[1]: k for k, x in enumerate(layers)}
        return RowBatch(
            layers,
            [keep if x.shape[1] == first.shape[1] else None for x in layers],
            masked,
            [target.rows(self._now, seen, *first.shape[:2]).to(first.device) for target in self._targets],
            [lengths[x.shape[1]] for x in layers],
        )

    def end(self) -> None:
        """The forward is over."""
        self._now = {}
