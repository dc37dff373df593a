"""The moments of pooled rows from those of positions, or from rows, with cross moments in fp32 products."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgfast.ops.moments import add_products, first_mean, pair_products
from rgfast.ops.moments.call import PairSums
from rgfast.runtime.threads import one_thread
from rgfast.runtime.waiting import numbers
from rgfast.streaming import MomentAccumulator, Pairs, pair_keys

__all__ = ["Pooled"]

_F64 = torch.float64
# Rows of a layer that are multiplied at once: what stays in the second-level cache beside another layer's.
_ROWS = 1024
# A kernel's squared norm below this fraction of (tr K)²/n is rounding, not variance.
_NO_VARIANCE = 1e-13
# What must be left of ‖K‖² after U-centring, or fp32 products blur it.
_BLURRED = 0.25


@dataclass
class _Cross:
    """Sums of z_i z_jᵀ with z = [x, |x|², 1] of rows less the layers' shifts, but for those of one layer."""

    body: Tensor  # Σ x yᵀ
    right: Tensor  # Σ |x|² y
    left: Tensor  # Σ |y|² x
    products: Tensor  # Σ |x|²|y|²


class Pooled:
    """Sums up rows of layers of these ``widths`` as one cloud, about a shift near the first ones' mean.

    The cross moments are of ``pairs``, and of every layer with itself; all sums but the products of two
    layers are fp64. Exact for the means of positions, whatever they are.
    """

    def __init__(self, widths: Sequence[int], pairs: Pairs) -> None:
        self._widths, self._pairs = tuple(widths), pairs
        self.keys = pair_keys(pairs, len(widths))
        self._shift: list[Tensor] = []
        self._cross: dict[tuple[int, int], _Cross] = {}
        self._sum: list[Tensor] = []
        self._trace: list[Tensor] = []
        self._count = 0

    def aligned(
        self, rows: Sequence[Tensor], owns: Sequence[Tensor], means: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Debiased and biased CKA ``[2, P, L, L]`` of ``rows[l][P, n, d_l]``, which are added to the sums.

        ``owns[l][P, d_l, d_l]`` are the layers' centred moments and ``means[l][P, d_l]`` their means, fp64.
        Also where fp32 products blur a debiased value ``[P]``.
        """
        n = rows[0].shape[1]
        if not self._shift:
            self._begin([mean.mean(0) for mean in means])
        moves = [mean - shift for mean, shift in zip(means, self._shift, strict=True)]
        traces = torch.stack([own.diagonal(dim1=1, dim2=2).sum(1) for own in owns])
        totals = {key: self._cross[key].body for key in self.keys}
        found = pair_products(
            totals, rows, means, owns=owns, moves=moves, units=_units(traces, n, self._widths)
        )
        with one_thread():
            self._take(found, moves, traces, n)
        return _cka(self.keys, found.norm, found.products, traces, n)

    def _take(self, found: PairSums, moves: list[Tensor], traces: Tensor, n: int) -> None:
        """What was found of n rows at every position, moved from its mean to the shift."""
        squares = torch.stack([move.square().sum(1) for move in moves])
        for k, (i, j) in enumerate(self.keys):
            e, f = moves[i], moves[j]
            av, bu = found.right_sums[k, :, : f.shape[1]], found.left_sums[k, :, : e.shape[1]]
            ce, cf = found.moved_right[k, :, : f.shape[1]], found.moved_left[k, :, : e.shape[1]]
            ee, ff, a, b = squares[i], squares[j], traces[i], traces[j]
            cross = self._cross[i, j]
            cross.body.addmm_(e.T, f, alpha=float(n))
            cross.right += (av + 2 * ce + f * (a + n * ee)[:, None]).sum(0)
            cross.left += (bu + 2 * cf + e * (b + n * ff)[:, None]).sum(0)
            inner = (e * (2 * bu + 4 * cf)).sum(1) + 2 * (f * av).sum(1)
            cross.products += (found.products[k] + inner + ff * a + ee * b + n * ee * ff).sum()
        for layer, move in enumerate(moves):
            self._sum[layer] += n * move.sum(0)
            self._trace[layer] += (traces[layer] + n * squares[layer]).sum()
        self._count += n * len(moves[0])

    def add(self, rows: Iterable[Tensor]) -> None:
        """Add finite rows ``rows[l][R, d_l]``."""
        layers = list(rows)
        for start in range(0, len(layers[0]), _ROWS):
            self._add([x[None, start : start + _ROWS] for x in layers])

    def _add(self, rows: list[Tensor]) -> None:
        n = rows[0].shape[1]
        if not self._shift:
            self._begin([first_mean(x)[0] for x in rows])
        shifts, layers = [shift[None] for shift in self._shift], range(len(rows))
        sums = {
            (k, k): torch.zeros(1, d + 2, d + 2, dtype=_F64, device=shifts[k].device)
            for k, d in enumerate(self._widths)
        }
        add_products(sums, rows, shifts)
        own = [sums[k, k][0] for k in layers]
        traces = torch.stack([moment[-2:-1, -1] for moment in own])
        totals = {key: self._cross[key].body for key in self.keys if key[0] != key[1]}
        found = pair_products(
            totals,
            rows,
            shifts,
            owns=[moment[None, :-2, :-2].contiguous() for moment in own],
            moves=[None] * len(rows),
            units=_units(traces, n, self._widths),
        )
        for k, (i, j) in enumerate(totals):
            cross = self._cross[i, j]
            cross.right += found.right_sums[k, 0, : self._widths[j]]
            cross.left += found.left_sums[k, 0, : self._widths[i]]
            cross.products += found.products[k, 0]
        for k in layers:
            cross, moment = self._cross[k, k], own[k]
            cross.body += moment[:-2, :-2]
            cross.right += moment[-2, :-2]
            cross.left += moment[-2, :-2]
            cross.products += moment[-2, -2]
            self._sum[k] += moment[-1, :-2]
            self._trace[k] += moment[-2, -1]
        self._count += n

    def _begin(self, shift: list[Tensor]) -> None:
        self._shift, device = shift, shift[0].device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=_F64, device=device)

        self._sum, self._trace = [zeros(d) for d in self._widths], [zeros() for _ in self._widths]
        for i, j in self.keys:
            d, e = self._widths[i], self._widths[j]
            self._cross[i, j] = _Cross(zeros(d, e), zeros(e), zeros(d), zeros())

    def moments(self) -> MomentAccumulator:
        """All that was added, with the leading shape ``[1]``."""
        found, shifts = {}, [shift[None] for shift in self._shift]
        for (i, j), cross in self._cross.items():
            d, e = self._widths[i], self._widths[j]
            moment = found[i, j] = torch.zeros(1, d + 2, e + 2, dtype=_F64, device=shifts[i].device)
            moment[0, :d, :e], moment[0, d, :e], moment[0, :d, e] = cross.body, cross.right, cross.left
            moment[0, d, e], moment[0, d + 1, e + 1] = cross.products, self._count
            moment[0, d, e + 1], moment[0, d + 1, e] = self._trace[i], self._trace[j]
            moment[0, :d, e + 1], moment[0, d + 1, :e] = self._sum[i], self._sum[j]
        return MomentAccumulator.of_sums(self._pairs, shifts, found)


def _units(traces: Tensor, n: int, widths: Sequence[int]) -> list[Tensor]:
    """Powers of two ``[P]`` that bring rows to about 1, 0 where nothing varies, from traces ``[L, P]``."""
    each = []
    for trace, width in zip(traces, widths, strict=True):
        level = (trace / (n * width)).sqrt()
        power = torch.where(level > 0, level, 1.0).log2().round()
        each.append(torch.where(level > 0, torch.exp2(-power), 0.0))
    return each


def _cka(
    keys: Sequence[tuple[int, int]], norm: Tensor, products: Tensor, traces: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """Debiased and biased CKA ``[2, P, L, L]`` from ‖C‖² and Σ|u|²|v|² ``[K, P]``, and where blurred."""
    layers, positions = traces.shape
    left, right = (numbers([key[side] for key in keys], norm.device) for side in (0, 1))
    inner = torch.full((2, positions, layers, layers), torch.nan, dtype=_F64, device=norm.device)
    both = (traces[left] * traces[right]).T
    debiased = norm.T
    if n > 3:
        debiased = norm.T - n / (n - 2) * products.T + both / ((n - 1) * (n - 2))
    for values, found in zip(inner, (debiased, norm.T), strict=True):
        values[:, left, right] = values[:, right, left] = found
    own = inner.diagonal(0, 2, 3)
    varies = own > _NO_VARIANCE * traces.T.square() / n
    blurred = varies.all(0) & (own[0] < _BLURRED * own[1])
    own = torch.where(varies, own, math.nan)
    # The root of the product, not the product of roots: identical layers then have a CKA of exactly 1.
    return inner / (own[..., :, None] * own[..., None, :]).sqrt(), blurred.any(1)
