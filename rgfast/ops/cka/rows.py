"""Rows of every layer, kept per position until they are needed as samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rgfast.ops.cka.checks import as_layers, check_finite
from rgfast.validation import as_bool_mask

__all__ = ["RowStore", "as_rows"]


def as_rows(layers: Any, mask: Any) -> tuple[tuple[int, ...], list[Tensor], Tensor | None]:
    """The leading shape, layers ``[P, rows, d_l]`` and the mask ``[P, rows]`` of one update, checked."""
    seq = as_layers(layers, "layers")
    lead, rows = tuple(seq[0].shape[:-2]), seq[0].shape[-2]
    if mask is not None:
        mask = as_bool_mask(mask, "mask")
        if mask.shape != seq[0].shape[:-1]:
            raise ValueError(f"mask must have shape {(*lead, rows)}, got {tuple(mask.shape)}")
        mask = mask.to(seq[0].device)
        check_finite([x.detach().masked_fill(~mask[..., None], 0.0) for x in seq], "layers")
    else:
        check_finite(seq, "layers")
    flat = [x.detach().reshape(math.prod(lead), rows, x.shape[-1]) for x in seq]
    return lead, flat, None if mask is None else mask.reshape(math.prod(lead), rows)


class RowStore:
    """Rows ``[P, n_p, d_l]`` of L layers, in their own dtype; n_p differs by position where masks select."""

    def __init__(self, lead: tuple[int, ...], widths: Sequence[int], device: torch.device) -> None:
        self.lead, self.widths = lead, tuple(widths)
        self.filled = torch.zeros(math.prod(lead), dtype=torch.int64, device=device)
        self._rows: list[Tensor] = []

    @property
    def most(self) -> int:
        """The largest n_p."""
        return int(self.filled.max()) if self.filled.numel() else 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(rows.numel() * rows.element_size() for rows in self._rows)

    def check_like(self, lead: tuple[int, ...], layers: Sequence[Tensor]) -> None:
        """Raise unless ``layers`` have the leading shape and widths of the first update."""
        got = lead, tuple(x.shape[-1] for x in layers)
        if got != (self.lead, self.widths):
            raise ValueError(
                f"layers must keep leading shape {self.lead} and widths {self.widths}, "
                f"got {got[0]} and {got[1]}"
            )

    def add(self, layers: Sequence[Tensor], keep: Tensor | None) -> None:
        """Append the rows ``[P, rows, d_l]`` of every layer that ``keep[P, rows]`` selects (None: all)."""
        rows = layers[0].shape[1]
        new = self.filled + (rows if keep is None else keep.sum(1))
        self._reserve(layers, int(new.max()) if new.numel() else 0)
        start = int(self.filled[0]) if self.filled.numel() else 0
        if keep is None and bool((self.filled == start).all()):
            for kept, x in zip(self._rows, layers, strict=True):
                kept[:, start : start + rows] = x
        else:
            keep = (
                torch.ones(layers[0].shape[:2], dtype=torch.bool, device=self.filled.device)
                if keep is None
                else keep
            )
            at = (self.filled[:, None] + keep.cumsum(1) - 1)[keep]
            position = torch.arange(len(self.filled), dtype=torch.int64, device=at.device)[:, None].expand_as(
                keep
            )[keep]
            for kept, x in zip(self._rows, layers, strict=True):
                kept[position, at] = x[keep].to(kept.dtype)
        self.filled = new

    def _reserve(self, layers: Sequence[Tensor], rows: int) -> None:
        if not self._rows:
            self._rows = [x.new_empty(x.shape[0], rows, x.shape[2]) for x in layers]
        for i, x in enumerate(layers):
            held = self._rows[i]
            dtype = torch.promote_types(held.dtype, x.dtype)
            if held.shape[1] < rows or dtype != held.dtype:
                capacity = held.shape[1] if held.shape[1] >= rows else max(rows, 2 * held.shape[1])
                self._rows[i] = held.new_empty(held.shape[0], capacity, held.shape[2], dtype=dtype)
                self._rows[i][:, : held.shape[1]] = held

    def take(self, positions: Tensor, count: int) -> list[Tensor]:
        """The first ``count`` rows ``[positions, count, d_l]`` of every layer."""
        if len(positions) == len(self.filled):
            return [rows[:, :count] for rows in self._rows]
        return [rows[positions, :count] for rows in self._rows]

    def drop(self, positions: Tensor, count: int) -> None:
        """Forget the first ``count`` rows at ``positions``."""
        for rows in self._rows:
            rows[positions, : rows.shape[1] - count] = rows[positions, count:].clone()
        self.filled[positions] -= count

    def contents(self) -> tuple[list[Tensor], Tensor | None]:
        """Everything as layers ``[P, n, d_l]`` with a mask ``[P, n]``, None where no position is short."""
        most = self.most
        keep = torch.arange(most, dtype=torch.int64, device=self.filled.device) < self.filled[:, None]
        # Rows past the end of a position were never written; nobody may read them.
        return [rows[:, :most] for rows in self._rows], None if bool(keep.all()) else keep
