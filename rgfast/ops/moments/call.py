"""The validated call of this room's op: what an implementation gets."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Batch",
    "Centered",
    "Moved",
    "PairSums",
    "Pairs",
    "Positions",
    "Products",
    "Survey",
    "Uncentered",
]


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


class Uncentered(NamedTuple):
    """Sums of K pairs of layers of the same widths, in one or several parts; see `centered`.

    `sums[k][part]` is `[P, d + 2, e + 2]`. First come layers with themselves whose matrices are wanted too,
    as many as have `shifts[k][part]` `[P, d]`, which `units[k]` bring into the units of their sums.
    """

    sums: Sequence[Sequence[Tensor]]
    shifts: Sequence[Sequence[Tensor]] = ()
    units: Sequence[float] = ()

    @property
    def device(self) -> torch.device:
        return self.sums[0][0].device

    @property
    def positions(self) -> list[int]:
        """Of every part."""
        return [part.shape[0] for part in self.sums[0]]

    @property
    def widths(self) -> tuple[int, int]:
        """Of both layers of a pair."""
        return self.sums[0][0].shape[1] - 2, self.sums[0][0].shape[2] - 2

    def shape_class(self) -> Hashable:
        return self.device.type, len(self.sums), tuple(self.positions), self.widths, len(self.shifts)


class Centered(NamedTuple):
    """Sums of rows about their means, of K pairs of layers at the P positions of all parts, fp64.

    `sums[4, K, P]` are ‖Σ x_c y_cᵀ‖², Σ|x_c|²|y_c|², and of layers with themselves Σ|x_c|², Σ|x − shift|².
    Of the L layers whose matrices are wanted, `matrix[L · P, d, d]` is Σ x_c x_cᵀ, of which the lower
    triangle is set, and `mean[L · P, d]` the mean times the root of the count: Σ x xᵀ is `matrix` + `mean`
    `mean`ᵀ. All are zero if nothing was counted.
    """

    sums: Tensor
    matrix: Tensor | None = None
    mean: Tensor | None = None

    @property
    def accumulated(self) -> Tensor:
        """Σ|x − shift|² `[L · P]` of the layers whose matrices are wanted."""
        wanted = 0 if self.mean is None else len(self.mean)
        return self.sums[3].flatten()[:wanted]


class Moved(NamedTuple):
    """Sums of K pairs of layers of the same widths, to be moved and added up over positions; see `pooled`."""

    sums: Sequence[Tensor]
    left: Sequence[Tensor]
    right: Sequence[Tensor]

    @property
    def device(self) -> torch.device:
        return self.sums[0].device

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Positions, and features of both layers."""
        positions, high, wide = self.sums[0].shape
        return positions, high - 2, wide - 2

    def shape_class(self) -> Hashable:
        return self.device.type, len(self.sums), self.sizes


class Batch(NamedTuple):
    """Rows of one batch to be looked at, `layers[l][B, T, d_l]`, those that `keeps[l][B, T]` keeps (None:
    all); see `survey`."""

    layers: Sequence[Tensor]
    keeps: Sequence[Tensor | None]
    means: bool

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    @property
    def lead(self) -> tuple[int, int]:
        """Sequences and positions."""
        sequences, positions, _ = self.layers[0].shape
        return sequences, positions

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of every layer."""
        return [x.dtype for x in self.layers]

    @property
    def nbytes(self) -> float:
        """Of all rows."""
        return float(sum(x.numel() * x.element_size() for x in self.layers))

    def shape_class(self) -> Hashable:
        sizes = tuple((x.dtype, x.shape) for x in self.layers)
        return self.device.type, sizes, tuple(keep is None for keep in self.keeps), self.means


class Survey(NamedTuple):
    """What was found of L layers of a batch.

    `bad[L, T]`, int64, is how many of the numbers that count are not finite at every position, and
    `means[l][B, d_l]`, fp64, each sequence's mean over the positions that count, zero if none does; `means`
    is empty if none were wanted.
    """

    bad: Tensor
    means: Sequence[Tensor]
