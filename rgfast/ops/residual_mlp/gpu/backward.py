"""The kernel of the backward pass: the gradient of the rows, and what the library needs for the weights'."""

from __future__ import annotations

import triton
import triton.language as tl

from rgfast.ops.residual_mlp.gpu.elements import activated, normalized, power_of_two, slope
from rgfast.ops.residual_mlp.gpu.forward import affine, operands, product, row_scale, vector, weights_at

__all__ = ["gradient", "gradient_of_rows"]


@triton.jit
def gradient_of_rows(
    d0, d1, x0, x1, norm_weight, column, inside0, inside1, eps,
    NORM: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Through the norm: gradients of its input, and of its weight before they are summed over rows."""
    c0, c1, reciprocal = normalized(x0, x1, inside0[None, :], inside1[None, :], eps, NORM, D, HALVES)
    weight0 = d0 * c0
    weight1 = d1 * c1
    if norm_weight is not None:
        d0 = d0 * vector(norm_weight, 0, column, inside0, D)[None, :]
        if HALVES == 2:
            d1 = d1 * vector(norm_weight, 0, column + HALF, inside1, D)[None, :]
    if NORM != "none":
        along = tl.sum(d0 * c0, 1)
        mean = tl.sum(d0, 1)
        if HALVES == 2:
            along += tl.sum(d1 * c1, 1)
            mean += tl.sum(d1, 1)
        along = along * (1.0 / D)
        mean = mean * (1.0 / D)
        if NORM == "rms":
            mean = mean * 0.0
        d0 = (d0 - mean[:, None] - c0 * along[:, None]) * reciprocal[:, None]
        d1 = (d1 - mean[:, None] - c1 * along[:, None]) * reciprocal[:, None]
    return d0, d1, weight0, weight1


@triton.jit(do_not_specialize=["rows"])
def gradient(
    x, row_stride, dy, dx, normed, hidden, slopes, sums,
    w1, w1_low, unit1, b1, w2, w2_low, unit2, norm_weight, norm_bias,
    rows, eps, residual_scale,
    D: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr, H_PADDED: tl.constexpr,
    W2_BY_UNIT: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, PRODUCTS: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From ``dy[rows, D]`` the gradient ``dx``, and what is wanted (not None) of: the first product's input
    ``normed[rows, D]``, the second's ``hidden[rows, H]``, the gradient of the first's output
    ``slopes[rows, H]``, and ``sums[programs, 2, D]``, a tile's part of the gradients of the norm's vectors.

    The forward pass is done again, a block of hidden units at a time. Weights are as ``forward.block`` takes
    them. Both weights' scales belong to a hidden unit, over which ``dx`` is summed: that of ``w1`` goes into
    the other factor.
    """
    OPERAND: tl.constexpr = w1.dtype.element_ty
    FINE: tl.constexpr = PRODUCTS == "split"
    WIDE: tl.constexpr = HALF * HALVES
    DOWN: tl.constexpr = WIDE if W2_BY_UNIT else H
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.arange(0, HALF)
    inside0 = column < D
    inside1 = column + HALF < D
    within = (row < rows)[:, None]
    mask0 = within & inside0[None, :]
    mask1 = within & inside1[None, :]
    source = x + row[:, None] * row_stride + column[None, :]
    place = row[:, None] * D + column[None, :]
    unit = tl.arange(0, BH)
    x0 = tl.load(source, mask=mask0, other=0.0).to(tl.float32)
    x1 = x0
    d0 = tl.load(dy + place, mask=mask0, other=0.0).to(tl.float32)
    d1 = d0
    if HALVES == 2:
        x1 = tl.load(source + HALF, mask=mask1, other=0.0).to(tl.float32)
        d1 = tl.load(dy + place + HALF, mask=mask1, other=0.0).to(tl.float32)
    c0, c1, _ = normalized(x0, x1, inside0[None, :], inside1[None, :], eps, NORM, D, HALVES)
    c0, c1 = affine(c0, c1, norm_weight, norm_bias, 0, column, inside0, inside1, D, HALF, HALVES)
    if normed is not None:
        tl.store(normed + place, c0.to(normed.dtype.element_ty), mask=mask0)
        if HALVES == 2:
            tl.store(normed + place + HALF, c1.to(normed.dtype.element_ty), mask=mask1)
    factor, reciprocal = row_scale(c0, c1, HALVES)
    high0, low0 = operands(c0, factor, OPERAND, PRODUCTS)
    high1, low1 = high0, low0
    factor_d, reciprocal_d = row_scale(d0, d1, HALVES)
    d_high0, d_low0 = operands(d0, factor_d, OPERAND, PRODUCTS)
    d_high1, d_low1 = d_high0, d_low0
    if HALVES == 2:
        high1, low1 = operands(c1, factor, OPERAND, PRODUCTS)
        d_high1, d_low1 = operands(d1, factor_d, OPERAND, PRODUCTS)
    sum0 = tl.zeros([BM, HALF], tl.float32)
    sum1 = sum0
    for h in tl.range(0, H_PADDED, BH, num_stages=STAGES):
        up0 = weights_at(w1, h, 0, BH, HALF, True, WIDE, False)
        down0 = weights_at(w2, h, 0, BH, HALF, W2_BY_UNIT, DOWN, False)
        up0_low = up0
        down0_low = down0
        if PRODUCTS == "split":
            up0_low = weights_at(w1_low, h, 0, BH, HALF, True, WIDE, False)
            down0_low = weights_at(w2_low, h, 0, BH, HALF, W2_BY_UNIT, DOWN, False)
        u = product(high0, low0, tl.trans(up0), tl.trans(up0_low), PRODUCTS)
        da = product(d_high0, d_low0, tl.trans(down0), tl.trans(down0_low), PRODUCTS)
        up1, up1_low = up0, up0_low
        if HALVES == 2:
            up1 = weights_at(w1, h, HALF, BH, HALF, True, WIDE, False)
            down1 = weights_at(w2, h, HALF, BH, HALF, W2_BY_UNIT, DOWN, False)
            up1_low = up1
            down1_low = down1
            if PRODUCTS == "split":
                up1_low = weights_at(w1_low, h, HALF, BH, HALF, True, WIDE, False)
                down1_low = weights_at(w2_low, h, HALF, BH, HALF, W2_BY_UNIT, DOWN, False)
            u += product(high1, low1, tl.trans(up1), tl.trans(up1_low), PRODUCTS)
            da += product(d_high1, d_low1, tl.trans(down1), tl.trans(down1_low), PRODUCTS)
        if PRODUCTS != "plain":
            scale1 = tl.load(unit1 + h + unit)
            u = u * reciprocal[:, None] * scale1[None, :]
            da = da * reciprocal_d[:, None] * tl.load(unit2 + h + unit)[None, :]
        if b1 is not None:
            u += vector(b1, 0, h + unit, h + unit < H, H)[None, :]
        du = da * residual_scale * slope(u, ACTIVATION, FINE)
        beside = row[:, None] * H + (h + unit)[None, :]
        real = within & (h + unit < H)[None, :]
        if hidden is not None:
            tl.store(hidden + beside, activated(u, ACTIVATION, FINE).to(hidden.dtype.element_ty), mask=real)
        if slopes is not None:
            tl.store(slopes + beside, du.to(slopes.dtype.element_ty), mask=real)
        if dx is not None or sums is not None:
            if PRODUCTS == "plain":
                du_high = du.to(OPERAND)
                sum0 = tl.dot(du_high, up0, sum0)
                if HALVES == 2:
                    sum1 = tl.dot(du_high, up1, sum1)
            else:
                du = du * scale1[None, :]
                grow, shrink = power_of_two(tl.max(tl.abs(du), 1))
                du_high, du_low = operands(du, grow, OPERAND, PRODUCTS)
                sum0 += product(du_high, du_low, up0, up0_low, PRODUCTS) * shrink[:, None]
                if HALVES == 2:
                    sum1 += product(du_high, du_low, up1, up1_low, PRODUCTS) * shrink[:, None]
    if dx is not None or sums is not None:
        x0 = tl.load(source, mask=mask0, other=0.0).to(tl.float32)
        if HALVES == 2:
            x1 = tl.load(source + HALF, mask=mask1, other=0.0).to(tl.float32)
        n0, n1, weight0, weight1 = gradient_of_rows(
            sum0, sum1, x0, x1, norm_weight, column, inside0, inside1, eps, NORM, D, HALF, HALVES
        )
        if sums is not None:
            part = sums + tl.program_id(0).to(tl.int64) * (2 * D) + column
            tl.store(part, tl.sum(tl.where(mask0, weight0, 0.0), 0), mask=inside0)
            tl.store(part + D, tl.sum(tl.where(mask0, sum0, 0.0), 0), mask=inside0)
            if HALVES == 2:
                tl.store(part + HALF, tl.sum(tl.where(mask1, weight1, 0.0), 0), mask=inside1)
                tl.store(part + D + HALF, tl.sum(tl.where(mask1, sum1, 0.0), 0), mask=inside1)
        if dx is not None:
            n0 += tl.load(dy + place, mask=mask0, other=0.0).to(tl.float32)
            tl.store(dx + place, n0.to(dx.dtype.element_ty), mask=mask0)
            if HALVES == 2:
                n1 += tl.load(dy + place + HALF, mask=mask1, other=0.0).to(tl.float32)
                tl.store(dx + place + HALF, n1.to(dx.dtype.element_ty), mask=mask1)
