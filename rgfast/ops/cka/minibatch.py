"""Minibatch CKA (Nguyen et al. 2021), streamed: HSIC_1 averaged over batches of samples before dividing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rgfast.ops.cka import reference
from rgfast.ops.cka.api import OP
from rgfast.ops.cka.call import Call
from rgfast.ops.cka.rows import RowStore, as_rows
from rgfast.validation import check_positive_int

__all__ = ["MinibatchCKAAccumulator"]


class MinibatchCKAAccumulator:
    """Streaming minibatch CKA of all pairs of layers at every position: ``update``, ``merge``, ``finalize``.

    Every position's samples are cut, in the order they come, into batches of ``batch_size``, whatever the
    sizes of the updates; a last batch of at least 4 counts like any other, and fewer rows are left out (and
    counted in ``left_out``). Not the CKA of the whole data, which :class:`CKAAccumulator` gives exactly: it
    is here to compare with work that used it. Errors as there.

    >>> import rgfast, torch
    >>> layers = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))
    >>> stream = rgfast.MinibatchCKAAccumulator(batch_size=32).update(layers[:, :20]).update(layers[:, 20:])
    >>> torch.allclose(stream.finalize(), rgfast.minibatch_cka(layers, batch_size=32))
    True
    """

    def __init__(self, *, batch_size: int = 256) -> None:
        check_positive_int(batch_size, "batch_size")
        if batch_size < 4:
            raise ValueError(f"batch_size must be at least 4, got {batch_size}")
        self.batch_size = batch_size
        self._rows: RowStore | None = None
        self._sums: _Sums | None = None

    @property
    def left_out(self) -> Tensor:
        """Rows ``[...]`` that would be in no batch if the stream ended here."""
        if self._rows is None:
            return torch.zeros((), dtype=torch.int64, device="cpu")
        filled = self._rows.filled
        return torch.where(filled < 4, filled, 0).reshape(self._rows.lead)

    def update(self, layers: Any, mask: Tensor | None = None) -> MinibatchCKAAccumulator:
        """Itself, with a batch ``layers[L, ..., rows, d]`` (or a sequence of ``[..., rows, d_l]``) added.

        ``mask[..., rows]`` (bool) keeps the rows where it is True.
        """
        lead, flat, keep = as_rows(layers, mask)
        if self._rows is None or self._sums is None:
            self._rows = RowStore(lead, [x.shape[-1] for x in flat], flat[0].device)
            self._sums = _Sums(len(self._rows.filled), len(flat), flat[0].device)
        self._rows.check_like(lead, flat)
        self._add(flat, keep)
        return self

    def merge(self, other: MinibatchCKAAccumulator) -> MinibatchCKAAccumulator:
        """Itself, with the batches of ``other`` added and its rest of rows appended; ``other`` is used up.

        Raises ValueError unless both have the same batch size and saw the same layers.
        """
        if self.batch_size != other.batch_size:
            raise ValueError(f"other must have batch_size {self.batch_size}, got {other.batch_size}")
        if other._rows is None or other._sums is None:
            return self
        if self._rows is None or self._sums is None:
            self._rows, self._sums = other._rows, other._sums
            return self
        mine, theirs = ((r.lead, r.widths) for r in (self._rows, other._rows))
        if mine != theirs:
            raise ValueError(f"other must have leading shape and widths {mine}, got {theirs}")
        every = torch.arange(len(self._rows.filled), dtype=torch.int64, device=self._rows.filled.device)
        self._sums.add(every, other._sums.cross, other._sums.floor, other._sums.exponent)
        if other._rows.most:
            self._add(*other._rows.contents())
        return self

    def finalize(self) -> Tensor:
        """Minibatch CKA ``[..., L, L]``, fp64; NaN beside constant layers and where no batch has 4 samples.

        Raises ValueError where no position has a batch of 4. The stream may go on afterwards.
        """
        most = 0 if self._rows is None else self._rows.most
        if self._rows is None or self._sums is None or (most < 4 and not self._sums.any()):
            raise ValueError(f"the stream must hold at least 4 samples, got {most}")
        sums, filled = self._sums.copy(), self._rows.filled
        for n in sorted(set(filled.tolist())):
            if n >= 4:
                at = (filled == n).nonzero()[:, 0]
                sums.add(at, *_sums_of(self._rows.take(at, n)))
        values = sums.ratio()
        return values.reshape(*self._rows.lead, *values.shape[1:])

    def _add(self, flat: list[Tensor], keep: Tensor | None) -> None:
        assert self._rows is not None
        assert self._sums is not None
        # In pieces of a batch, so that the store never holds two.
        for start in range(0, flat[0].shape[1], self.batch_size):
            piece = slice(start, start + self.batch_size)
            self._rows.add([x[:, piece] for x in flat], None if keep is None else keep[:, piece])
            full = (self._rows.filled >= self.batch_size).nonzero()[:, 0]
            if len(full):
                batch = self._rows.take(full, self.batch_size)
                self._sums.add(full, *_sums_of(batch))
                self._rows.drop(full, self.batch_size)


class _Sums:
    """Σ HSIC_1 ``[P, L, L]`` over batches and the level of its rounding, in units of 2^exponent per layer."""

    def __init__(self, positions: int, layers: int, device: torch.device) -> None:
        self.cross = torch.zeros(positions, layers, layers, dtype=torch.float64, device=device)
        self.floor = torch.zeros(positions, layers, dtype=torch.float64, device=device)
        self.exponent = torch.full((positions, layers), -1000, dtype=torch.int64, device=device)

    def any(self) -> bool:
        return bool((self.exponent > -1000).any())

    def copy(self) -> _Sums:
        out = _Sums(0, 0, self.cross.device)
        out.cross, out.floor, out.exponent = self.cross.clone(), self.floor.clone(), self.exponent.clone()
        return out

    def add(self, at: Tensor, cross: Tensor, floor: Tensor, exponent: Tensor) -> None:
        top = torch.maximum(self.exponent[at], exponent)
        old, new = self.exponent[at] - top, exponent - top
        self.cross[at] = _down(self.cross[at], old) + _down(cross, new)
        self.floor[at] = _times(self.floor[at], 4 * old) + _times(floor, 4 * new)
        self.exponent[at] = top

    def ratio(self) -> Tensor:
        own = self.cross.diagonal(0, -2, -1)
        varies = own > reference.NO_VARIANCE * self.floor
        root = torch.where(varies, own, 1.0).sqrt()
        values = self.cross / (root[:, :, None] * root[:, None, :])
        return torch.where(varies[:, :, None] & varies[:, None, :], values, torch.nan)


def _sums_of(batch: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    found: Tensor = OP("auto", Call("hsic_sums", ("layers",), tuple(batch)))
    return found[..., :-2], found[..., -2], found[..., -1].to(torch.int64)


def _down(cross: Tensor, by: Tensor) -> Tensor:
    return _times(cross, 2 * (by[:, :, None] + by[:, None, :]))


def _times(values: Tensor, exponent: Tensor) -> Tensor:
    return reference.scaled(values, exponent.clamp(min=-1000))
