"""Refusing activations that are not finite: at once on the CPU, at intervals where looking would wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rgfast.probing.capture.rows import RowBatch
from rgfast.runtime.waiting import waits_for
from rgfast.streaming import NonFiniteError, check_finite, count_nonfinite

__all__ = ["FiniteCheck"]

_LOOK_EVERY = 64


class FiniteCheck:
    """Looks for NaN and infinity in the kept rows of layers called ``names``.

    Where looking at a value waits for the device, every batch is counted there, and the counts of 64 are read
    at once.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        # The first sequence of a batch, how many it has, and its counts by layer.
        self._unread: list[tuple[int, int, dict[int, Tensor]]] = []

    def check(self, batch: RowBatch, seen: int) -> None:
        """Raise ValueError if a layer of the batch after ``seen`` sequences is not finite, or one of an
        earlier batch that was not read yet."""
        counts: dict[int, Tensor] = {}
        for layer, (x, keep) in enumerate(zip(batch.layers, batch.keeps, strict=True)):
            if x is not None and waits_for(x.device):
                counts[layer] = count_nonfinite(x, keep)
            elif x is not None:
                try:
                    check_finite(x.transpose(0, 1), None if keep is None else keep.T, layer)
                except NonFiniteError as error:
                    position = error.position[0] if x.shape[1] > 1 else -1
                    text = self._text(layer, position, error.count, seen, len(x))
                    raise ValueError(text) from error
        if counts:
            self._unread.append((seen, batch.sequences, counts))
        if len(self._unread) >= _LOOK_EVERY:
            self.look()

    def look(self) -> None:
        """Raise ValueError if a batch that was not read yet was not finite."""
        for layer in sorted({layer for *_, counts in self._unread for layer in counts}):
            of = [(seen, n, counts[layer]) for seen, n, counts in self._unread if layer in counts]
            found = torch.stack([count for *_, count in of]).tolist()
            for (seen, n, _), (position, number) in zip(of, found, strict=True):
                if number:
                    raise ValueError(self._text(layer, position, number, seen, n))
        self._unread.clear()

    def _text(self, layer: int, position: int, number: int, seen: int, sequences: int) -> str:
        where = f" at position {position}" if position >= 0 else ""
        return (
            f"activations must be finite, got {number} NaN or infinite values in layer {layer}{where} "
            f"({self._names[layer]}, sequences {seen} to {seen + sequences - 1})"
        )
