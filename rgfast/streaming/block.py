"""The rows of a stream that wait until a block of them is full."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rgfast.runtime.waiting import sent, waits_for

__all__ = ["OpenBlock"]


class OpenBlock:
    """Up to ``size`` rows of every layer, ``[P, size, d_l]``, where they came from, and which of them count
    ``[P, size]``, on ``device``. The memory is taken once."""

    def __init__(self, widths: Sequence[int], positions: int, size: int, device: torch.device) -> None:
        self.size, self.filled, self._whole = size, 0, True
        self._widths, self._positions, self._device = tuple(widths), positions, device
        self._rows: list[Tensor] = []
        self._keep: Tensor | None = None  # until there are rows

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = self._rows if self._keep is None else [*self._rows, self._keep]
        return sum(x.numel() * x.element_size() for x in held)

    def hold(self, piece: Sequence[Tensor], keep: Tensor | None) -> None:
        """Add rows ``piece[l][P, b, d_l]``, in the widest dtype that came for each layer."""
        if not self._rows:
            self._rows = [
                torch.empty(self._positions, self.size, d, dtype=x.dtype, device=x.device)
                for d, x in zip(self._widths, piece, strict=True)
            ]
            self._keep = torch.empty(self._positions, self.size, dtype=torch.bool, device=self._device)
        take = slice(self.filled, self.filled + piece[0].shape[1])
        for layer, x in enumerate(piece):
            held = sent(self._rows[layer], x.device)
            if held.dtype != x.dtype:
                held = held.to(torch.promote_types(held.dtype, x.dtype))
            self._rows[layer] = held
        if self._positions == 1:  # all rows of a layer side by side: one launch for those on a device
            for device in dict.fromkeys(x.device for x in piece):
                here = [layer for layer, x in enumerate(piece) if x.device == device]
                torch._foreach_copy_(
                    [self._rows[layer][0, take] for layer in here], [piece[layer][0] for layer in here]
                )
        else:
            for held, x in zip(self._rows, piece, strict=True):
                held[:, take] = x
        assert self._keep is not None
        self._keep[:, take] = True if keep is None else sent(keep, self._device)
        self._whole = keep is None and (self._whole or not self.filled)
        self.filled = take.stop

    def contents(self) -> tuple[list[Tensor], Tensor]:
        """The rows held and which count, in order; views."""
        keep = self._keep
        if keep is None:
            keep = torch.zeros(self._positions, 0, dtype=torch.bool, device=self._device)
        return [x[:, : self.filled] for x in self._rows], keep[:, : self.filled]

    def take(self) -> tuple[list[Tensor], Tensor | None]:
        """The same, with None where all count; the block is empty afterwards, its memory is used again."""
        rows, keep = self.contents()
        self.filled = 0
        every = self._whole if waits_for(self._device) else bool(keep.all())
        return rows, None if every else keep
