"""The validated call of this room's op: what an implementation gets."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PairSums", "Pairs", "Positions", "Products"]


class Products(NamedTuple):
    """z_iᵀ z_j of `rows[l][P, b, d_l]` less `shifts`, to be added to `sums[i, j]`; see `add_products`.

    `extra` columns of z, two or none, stand behind those of y. `fresh` sums hold nothing yet: products take
    the place of whatever is in them.
    """

    sums: Mapping[tuple[int, int], Tensor]
    rows: Sequence[Tensor]
    shifts: Sequence[Tensor]
    keep: Tensor | None
    exponents: Sequence[int]
    extra: int = 2
    precision: str = "double"
    fresh: bool = False

    @property
    def device(self) -> torch.device:
        return self.rows[0].device

    def multiplications(self) -> float:
        """Of all products."""
        wide = [x.shape[2] + self.extra for x in self.rows]
        positions, b = self.rows[0].shape[:2]
        return float(positions * b * sum(wide[i] * wide[j] for i, j in self.sums))

    def shape_class(self) -> Hashable:
        sizes = tuple((x.dtype, x.shape) for x in self.rows)
        return self.device.type, sizes, tuple(self.sums), self.extra, self.precision


class Pairs(NamedTuple):
    """Cross moments of `pairs` of layers `rows[l][P, n, d_l]` less `shifts[l][P, d_l]`; see `pair_products`.

    `units[l]` `[P]` are powers of two that bring rows to about 1, `owns[l]` `[P, d_l, d_l]` the layers' own
    moments or None, `moves[l]` `[P, d_l]` or None.
    """

    totals: Mapping[tuple[int, int], Tensor]
    rows: Sequence[Tensor]
    shifts: Sequence[Tensor]
    units: Sequence[Tensor]
    owns: Sequence[Tensor | None]
    moves: Sequence[Tensor | None]

    @property
    def device(self) -> torch.device:
        return self.rows[0].device

    @property
    def width(self) -> int:
        """Of the widest layer."""
        return max(x.shape[2] for x in self.rows)

    def multiplications(self) -> float:
        """Of all products."""
        positions, n = self.rows[0].shape[:2]
        wide = [x.shape[2] for x in self.rows]
        return float(positions * n * sum(wide[i] * wide[j] for i, j in self.totals))

    def entries(self, i: int, j: int) -> int:
        """Of a cross moment."""
        return self.rows[i].shape[2] * self.rows[j].shape[2]

    @property
    def lacks_own(self) -> bool:
        """Whether a layer beside itself has no moment of its own."""
        return any(i == j and self.owns[i] is None for i, j in self.totals)

    @property
    def contiguous(self) -> bool:
        """Whether features lie side by side."""
        return all(x.shape[2] <= 1 or x.stride(2) == 1 for x in self.rows)

    def shape_class(self) -> Hashable:
        sizes = tuple((x.dtype, x.shape) for x in self.rows)
        return self.device.type, sizes, self.contiguous, self.lacks_own, len(self.totals)


class Positions(NamedTuple):
    """`to[n, d]` += Σ_P `rows[P, n, d]`."""

    rows: Tensor
    to: Tensor

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def shape_class(self) -> Hashable:
        x = self.rows
        return x.device.type, x.dtype, x.shape[2] <= 1 or x.stride(2) == 1


class PairSums(NamedTuple):
    """What a pair's cross moment C at every position leads to, for K pairs; vectors are padded with zeros.

    `norm[K, P]` is ‖C‖², `products[K, P]` Σ|u|²|v|², `right_sums[K, P, d]` Σ|u|² v, `left_sums` Σ|v|² u, and
    if layers have a move, e and f, `moved_right` Cᵀe and `moved_left` C f.
    """

    norm: Tensor
    products: Tensor
    right_sums: Tensor
    left_sums: Tensor
    moved_right: Tensor
    moved_left: Tensor
