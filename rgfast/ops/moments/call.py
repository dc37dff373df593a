"""The validated call of this room's op: what an implementation gets."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Products"]


class Products(NamedTuple):
    """z_iᵀ z_j of `rows[l][P, b, d_l]` less `shifts`, to be added to `sums[i, j]`; see `add_products`."""

    sums: Mapping[tuple[int, int], Tensor]
    rows: Sequence[Tensor]
    shifts: Sequence[Tensor]
    keep: Tensor | None
    exponents: Sequence[int]

    @property
    def device(self) -> torch.device:
        return self.rows[0].device

    def multiplications(self) -> float:
        """Of all products."""
        wide = [x.shape[2] + 2 for x in self.rows]
        positions, b = self.rows[0].shape[:2]
        return float(positions * b * sum(wide[i] * wide[j] for i, j in self.sums))

    def shape_class(self) -> Hashable:
        return self.device.type
