"""Refusing activations that are not finite: at once on the CPU, at intervals where looking would wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rgfast.ops.moments import survey
from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.unread import Unread
from rgfast.runtime.waiting import sent, waits_for
from rgfast.streaming import NonFiniteError, check_finite

__all__ = ["NOT_FINITE", "FiniteCheck"]

NOT_FINITE = "activations must be finite"  # how the message starts


class FiniteCheck:
    """Looks for NaN and infinity in the kept rows of layers called ``names``.

    Where looking at a value waits for the device, they are counted there, and ``unread`` looks at the counts.
    """

    def __init__(self, names: Sequence[str], unread: Unread) -> None:
        self._names, self._unread = names, unread

    def check(self, batch: RowBatch, seen: int, *, means: bool = False) -> dict[int, Tensor]:
        """Raise ValueError if a layer of the batch after ``seen`` sequences is not finite, or one of an
        earlier batch that was not read yet.

        With ``means``, each sequence's means over the rows that count ``[B, d_l]`` are returned of the layers
        whose rows were read for them as well.
        """
        alike: dict[tuple[torch.device, int], list[int]] = {}
        found: dict[int, Tensor] = {}
        for layer, (x, keep) in enumerate(zip(batch.layers, batch.keeps, strict=True)):
            if x is not None and waits_for(x.device):
                alike.setdefault((x.device, x.shape[1]), []).append(layer)
            elif x is not None:
                try:
                    check_finite(x.transpose(0, 1), None if keep is None else keep.T, layer)
                except NonFiniteError as error:
                    text = self._text(layer, x.shape[1], error.position[0], error.count, seen, len(x))
                    raise ValueError(text) from error
        for (device, length), layers in alike.items():
            keeps = [None if (keep := batch.keeps[k]) is None else sent(keep, device) for k in layers]
            rows = [x for k in layers if (x := batch.layers[k]) is not None]
            by_position, averages = survey(rows, keeps, means=means)
            first = (by_position > 0).to(torch.uint8).argmax(1, keepdim=True)
            worst = torch.cat([first, by_position.gather(1, first)], 1)
            self._unread.check(worst, self._said(layers, length, seen, batch.sequences))
            found.update(zip(layers, averages, strict=False))
        self._unread.passed()
        return found

    def look(self) -> None:
        """Raise ValueError if a batch that was not read yet was not finite."""
        self._unread.look()

    def _said(self, layers: Sequence[int], length: int, seen: int, n: int) -> Callable[[Tensor], str]:
        def said(found: Tensor) -> str:
            for layer, (position, number) in zip(layers, found.tolist(), strict=True):
                if number:
                    return self._text(layer, length, position, number, seen, n)
            return ""

        return said

    def _text(self, layer: int, length: int, position: int, number: int, seen: int, sequences: int) -> str:
        where = f" at position {position}" if length > 1 else ""
        return (
            f"{NOT_FINITE}, got {number} NaN or infinite values in layer {layer}{where} "
            f"({self._names[layer]}, sequences {seen} to {seen + sequences - 1})"
        )
