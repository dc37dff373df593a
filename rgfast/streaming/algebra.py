"""Moving, scaling and joining the extended second moments of a stream (see `accumulator`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rgfast.ops.moments.moved import moved
from rgfast.runtime.waiting import numbers, waits_for

__all__ = [
    "NONE",
    "centred_cross",
    "centred_norm_product",
    "centred_trace",
    "common_exponent",
    "exponent_of",
    "in_late_units",
    "in_order",
    "in_parts",
    "joint_mean",
    "place_of_both",
    "power_of_two",
    "recentred",
    "rescaled",
    "scale_exponent",
    "sizes_of_sums",
    "times_power",
    "together",
]

# Stands for the exponent of a layer that was zero so far, where exponents are tensors.
NONE = -(1 << 40)
# Bytes in fp64 of rows that are copied together, so that few launches do what is done to them.
_SMALL = 128 << 20


def scale_exponent(x: Tensor, keep: Tensor | None) -> int | None:
    """Binary exponent of the largest entry that counts, as LAPACK scales before squaring; None for all zero.

    Only exponents that could overflow or underflow a fourth power are used: others would change nothing.
    """
    if keep is not None:
        x = x.masked_fill(~keep[..., None], 0.0)
    low, high = torch.aminmax(x)
    return exponent_of(max(-float(low), float(high)))


def together(rows: Sequence[Tensor]) -> Tensor | None:
    """Rows of layers of one shape as one tensor ``[L, P, b, d]``, where launches take longer than a copy."""
    first, size = rows[0], 8 * sum(x.numel() for x in rows)
    if len(rows) == 1 or size > _SMALL or not waits_for(first.device):
        return None
    alike = all((x.shape, x.dtype, x.device) == (first.shape, first.dtype, first.device) for x in rows)
    return torch.stack(list(rows)) if alike else None


def in_late_units(
    rows: Sequence[Tensor], keep: Tensor | None, before: Tensor
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Rows of layers in units that are known on their device, and :func:`scale_exponent` of each as int64
    there: what it was ``before``, or if that was `NONE`, for rows of zeros, what it is now."""
    whole = together(rows)
    if whole is not None:
        counted = whole if keep is None else whole.masked_fill(~keep[..., None], 0.0)
        sizes = torch.linalg.vector_norm(counted, torch.inf, dim=(1, 2, 3))
    else:
        kept = rows if keep is None else [x.masked_fill(~keep[..., None], 0.0) for x in rows]
        sizes = torch.stack([torch.linalg.vector_norm(x, torch.inf) for x in kept])
    found = torch.where(before == NONE, _exponents(sizes), before)
    units = power_of_two(-torch.where(found == NONE, 0, found))
    if whole is not None:
        return (whole * units[:, None, None, None]).unbind(), found.unbind()
    return [x * unit for x, unit in zip(rows, units.unbind(), strict=True)], found.unbind()


def sizes_of_sums(shifts: Sequence[Tensor], moments: Sequence[Tensor]) -> Tensor:
    """About the largest entry ``[L]`` of rows of which only the sums are known, in units of 1, of layers of
    one width."""
    squares = torch.stack([moment.diagonal(dim1=1, dim2=2) for moment in moments])[..., :-2]
    shift, square = (
        torch.linalg.vector_norm(x, torch.inf, dim=(1, 2)) for x in (torch.stack(list(shifts)), squares)
    )
    return torch.maximum(shift, square.sqrt())


def exponent_of(largest: float) -> int | None:
    """:func:`scale_exponent` of rows whose largest entry is known; None for zero."""
    if largest == 0.0:
        return None
    exponent = math.frexp(largest)[1]
    return exponent if abs(exponent) > 32 else 0


def _exponents(largest: Tensor) -> Tensor:
    exponent = torch.frexp(largest.to(torch.float64)).exponent.to(torch.int64).clamp(-1000, 1000)
    exponent = torch.where(exponent.abs() > 32, exponent, 0)
    return torch.where(largest == 0, NONE, exponent)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent of int64 exponents between -1022 and 1023, fp64, exact on any device."""
    return ((exponent + 1023) << 52).view(torch.float64)


def common_exponent(a: int | None, b: int | None) -> tuple[int | None, float, float]:
    """The larger exponent, and the factors that bring sums of each into its units."""
    if a is None or b is None:
        return (b if a is None else a), 1.0, 1.0
    top = max(a, b)
    return top, math.ldexp(1.0, max(a - top, -1000)), math.ldexp(1.0, max(b - top, -1000))


def joint_mean(mean_a: Tensor, n_a: Tensor, mean_b: Tensor, n_b: Tensor) -> Tensor:
    """Mean of both, exactly the common value where the two agree; the one mean where the other is empty."""
    mean_a = torch.where(n_a[:, None] > 0, mean_a, mean_b)
    mean_b = torch.where(n_b[:, None] > 0, mean_b, mean_a)
    both = torch.where(n_a + n_b > 0, n_b / (n_a + n_b), torch.zeros_like(n_a))
    target = mean_a + both[:, None] * (mean_b - mean_a)
    return torch.where((n_a + n_b > 0)[:, None], target, torch.zeros_like(target))


def rescaled(moment: Tensor, left: float, right: float) -> Tensor:
    """diag(c I, c², 1) M diag(c' I, c'², 1): the sums in other units, exact for powers of two."""
    if left == right == 1.0:
        return moment
    rows = moment.new_full((moment.shape[1],), left)
    rows[-2], rows[-1] = left * left, 1.0
    cols = moment.new_full((moment.shape[2],), right)
    cols[-2], cols[-1] = right * right, 1.0
    return moment * rows[:, None] * cols


def recentred(moment: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """:func:`moved`, with squared norms added up in an order of their own, which the CPU's bits rest on."""
    return moved(moment, left, right, _norms)


def _norms(moment: Tensor, delta: Tensor) -> Tensor:
    body, square, one = moment[..., :-2], moment[..., -2], moment[..., -1]
    return square + (body * (2 * delta[:, None])).sum(-1) + delta.square().sum(-1)[:, None] * one


def centred_cross(moment: Tensor) -> Tensor:
    """Σ x_c y_cᵀ ``[P, d_i, d_j]`` from the sums of ``[x, |x|², 1]`` and ``[y, |y|², 1]``."""
    count = moment[:, -1, -1]
    off = -moment[:, :-2, -1] / count[:, None]
    return torch.addcmul(moment[:, :-2, :-2], off[:, :, None], moment[:, -1, None, :-2])


def centred_trace(moment: Tensor) -> Tensor:
    """Σ|x_c|² ``[P]`` from the sums of ``[x, |x|², 1]`` with itself."""
    return moment[:, -2, -1] - moment[:, :-2, -1].square().sum(-1) / moment[:, -1, -1]


def centred_norm_product(moment: Tensor) -> Tensor:
    """Σ|x_c|²|y_c|² ``[P]``: |x + e|² = a + 2 e·x + |e|² in every row, with e the negative mean."""
    n = moment[:, -1, -1]
    sum_x, sum_y = moment[:, :-2, -1], moment[:, -1, :-2]
    sum_a, sum_b = moment[:, -2, -1], moment[:, -1, -2]
    e, f = -sum_x / n[:, None], -sum_y / n[:, None]
    ee, ff = e.square().sum(1), f.square().sum(1)
    ex, fy = (e * sum_x).sum(1), (f * sum_y).sum(1)
    xy = ((e[:, :, None] * moment[:, :-2, :-2]).sum(1) * f).sum(1)
    with_y = moment[:, -2, -2] + 2 * (moment[:, -2, :-2] * f).sum(1) + ff * sum_a
    with_x = 2 * (moment[:, :-2, -2] * e).sum(1) + 4 * xy + 2 * ff * ex
    return with_y + with_x + ee * (sum_b + 2 * fy + ff * n)


def times_power(x: Tensor, exponent: int) -> Tensor:
    """x · 2^exponent, infinite or zero where that is no fp64 number."""
    half = exponent // 2  # 2^exponent itself may be none
    return x * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half) if exponent else x


def in_order(parts: Sequence[Tensor], order: Sequence[int], dim: int) -> Tensor:
    """Parts that have some layers (or pairs) each along ``dim``, all together those that ``order`` numbers,
    as one in the order of these numbers."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
    if list(order) == sorted(order):
        return whole
    return whole.index_select(dim, numbers(np.argsort(order).tolist(), whole.device))


def place_of_both(first: torch.device, second: torch.device) -> torch.device:
    """Where the products of layers on two devices are summed: on the first, unless rows would be sent to the
    CPU, which waits for them."""
    return first if waits_for(first) else second


def in_parts(which: Tensor, rows: Sequence[Tensor], most: int) -> Sequence[Tensor]:
    """Indices where ``which[P]`` is True, in chunks whose rows ``rows[l][P, b, d]`` take ``most`` bytes."""
    at = which.nonzero()[:, 0]
    widest = max((x.shape[2] for x in rows), default=1)
    return torch.split(at, max(1, most // max(1, 8 * rows[0].shape[1] * widest))) if len(at) else ()
