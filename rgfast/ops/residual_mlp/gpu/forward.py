"""Kernels of the forward pass: weights made ready, and whole blocks, one program per tile of rows.

The hidden layer exists ``BH`` units at a time, in registers: product, activation, product. ``PRODUCTS`` says
how the tensor cores are used:

- ``"plain"``: operands of the weights' type, bf16 or fp16, sums in fp32.
- ``"single"``: one product of fp16 operands scaled by powers of two; they keep the 11 bits of TF32.
- ``"split"``: each operand is the sum of two fp16 numbers, and three products give fp32's accuracy. The cores
  truncate when they add, which would show here: every chain of sums starts at zero for each block of hidden
  units (and each half of 256 features), and is added in fp32 on the other cores.

Scales are those of a row of the data and of a hidden unit of the weights (its row of ``w1``, its column of
``w2``), so that neither outliers nor data of any magnitude leave the range of fp16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rgfast.ops.residual_mlp.gpu.elements import activated, normalized, power_of_two

__all__ = ["affine", "block", "operands", "pack", "product", "row_scale", "vector", "weights_at"]


@triton.jit
def halves_of_fp16(a):
    """Two fp16 numbers whose sum has 22 bits of ``a``."""
    high = a.to(tl.float16)
    return high, (a - high.to(tl.float32)).to(tl.float16)


@triton.jit
def product(a, a_low, b, b_low, PRODUCTS: tl.constexpr):
    """``a b`` as sums that start at zero: in split form without the product of both low parts."""
    if PRODUCTS == "split":
        total = tl.dot(a_low, b)
        total = tl.dot(a, b_low, total)
        total = tl.dot(a, b, total)
    else:
        total = tl.dot(a, b)
    return total


@triton.jit
def pack(
    w1, w1_layer, w1_unit, w1_column, w2, w2_layer, w2_column, w2_unit,
    high1, low1, unit1, high2, low2, unit2,
    D: tl.constexpr, H: tl.constexpr, D_PADDED: tl.constexpr, H_PADDED: tl.constexpr,
    UNITS: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Both weights by hidden unit, ``[layers, H_PADDED, D_PADDED]`` with zeros outside, as ``block`` reads
    them: scaled and split as PRODUCTS says, reciprocals of the scales in ``unit1`` and ``unit2``."""
    layer = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    column = tl.arange(0, D_PADDED)
    inside = (unit < H)[:, None] & (column < D)[None, :]
    wide = unit.to(tl.int64)[:, None]
    across = column.to(tl.int64)[None, :]
    up = tl.load(w1 + layer * w1_layer + wide * w1_unit + across * w1_column, mask=inside, other=0.0)
    down = tl.load(w2 + layer * w2_layer + wide * w2_unit + across * w2_column, mask=inside, other=0.0)
    up = up.to(tl.float32)
    down = down.to(tl.float32)
    place = (layer * H_PADDED + wide) * D_PADDED + across
    if PRODUCTS == "plain":
        tl.store(high1 + place, up.to(high1.dtype.element_ty))
        tl.store(high2 + place, down.to(high2.dtype.element_ty))
    else:
        factor1, reciprocal1 = power_of_two(tl.max(tl.abs(up), 1))
        factor2, reciprocal2 = power_of_two(tl.max(tl.abs(down), 1))
        tl.store(unit1 + layer * H_PADDED + unit, reciprocal1)
        tl.store(unit2 + layer * H_PADDED + unit, reciprocal2)
        up_high, up_low = halves_of_fp16(up * factor1[:, None])
        down_high, down_low = halves_of_fp16(down * factor2[:, None])
        tl.store(high1 + place, up_high)
        tl.store(high2 + place, down_high)
        if PRODUCTS == "split":
            tl.store(low1 + place, up_low)
            tl.store(low2 + place, down_low)


@triton.jit
def weights_at(
    weights, unit, column,
    BH: tl.constexpr, HALF: tl.constexpr, BY_UNIT: tl.constexpr, STRIDE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``[BH, HALF]`` of weights from a hidden unit and a column on.

    They lie by unit, or by column if not BY_UNIT, so many numbers apart: ``weights`` is a pointer, or a
    descriptor of such tiles if TMA.
    """
    if BY_UNIT:
        if TMA:
            tile = weights.load([unit, column])
        else:
            within = tl.arange(0, BH)[:, None] * STRIDE + tl.arange(0, HALF)[None, :]
            tile = tl.load(weights + (unit * STRIDE + column) + within)
    else:
        if TMA:
            tile = weights.load([column, unit])
        else:
            within = tl.arange(0, HALF)[:, None] * STRIDE + tl.arange(0, BH)[None, :]
            tile = tl.load(weights + (column * STRIDE + unit) + within)
        tile = tl.trans(tile)
    return tile


@triton.jit
def vector(pointer, layer, place, inside, LENGTH: tl.constexpr):
    """One of a block's vectors in fp32, zero outside."""
    return tl.load(pointer + layer * LENGTH + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def affine(
    c0, c1, weight, bias, layer, column, inside0, inside1,
    D: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Normalized rows times the norm's weight plus its bias, either of which may be None."""
    if weight is not None:
        c0 = c0 * vector(weight, layer, column, inside0, D)[None, :]
        if HALVES == 2:
            c1 = c1 * vector(weight, layer, column + HALF, inside1, D)[None, :]
    if bias is not None:
        c0 = c0 + vector(bias, layer, column, inside0, D)[None, :]
        if HALVES == 2:
            c1 = c1 + vector(bias, layer, column + HALF, inside1, D)[None, :]
    return c0, c1


@triton.jit
def row_scale(c0, c1, HALVES: tl.constexpr):
    """The power of two that rows are multiplied by before they are split, and its reciprocal."""
    largest = tl.max(tl.abs(c0), 1)
    if HALVES == 2:
        largest = tl.maximum(largest, tl.max(tl.abs(c1), 1))
    return power_of_two(largest)


@triton.jit
def operands(c, factor, OPERAND: tl.constexpr, PRODUCTS: tl.constexpr):
    """Rows as the tensor cores take them: the high part and the low one."""
    if PRODUCTS == "plain":
        high = c.to(OPERAND)
        low = high
    else:
        high, low = halves_of_fp16(c * factor[:, None])
    return high, low


@triton.jit(do_not_specialize=["rows"])
def block(
    x, row_stride, y, w1, w1_low, unit1, b1, w2, w2_low, unit2, b2, norm_weight, norm_bias,
    rows, eps, residual_scale,
    D: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr, H_PADDED: tl.constexpr,
    LAYERS: tl.constexpr, EVERY_LAYER: tl.constexpr, W2_BY_UNIT: tl.constexpr,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, PRODUCTS: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``LAYERS`` residual blocks one after the other on ``BM`` rows, which stay in registers between them.

    ``y`` is ``[rows, D]``, or ``[LAYERS, rows, D]`` if EVERY_LAYER. Weights are ``[LAYERS, H_PADDED,
    HALVES * HALF]``, zero outside H and D, as ``pack`` leaves them; ``w2`` is the caller's ``[D, H]`` unless
    W2_BY_UNIT. Biases and the norm's vectors may be None.
    """
    OPERAND: tl.constexpr = w1.dtype if TMA else w1.dtype.element_ty
    STREAM: tl.constexpr = y.dtype.element_ty
    FINE: tl.constexpr = PRODUCTS == "split"
    WIDE: tl.constexpr = HALF * HALVES
    DOWN: tl.constexpr = WIDE if W2_BY_UNIT else H
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.arange(0, HALF)
    inside0 = column < D
    inside1 = column + HALF < D
    within = (row < rows)[:, None]
    source = x + row[:, None] * row_stride + column[None, :]
    target = y + row[:, None] * D + column[None, :]
    unit = tl.arange(0, BH)
    x0 = tl.load(source, mask=within & inside0[None, :], other=0.0).to(tl.float32)
    x1 = x0
    if HALVES == 2:
        x1 = tl.load(source + HALF, mask=within & inside1[None, :], other=0.0).to(tl.float32)
    for layer in range(LAYERS):
        c0, c1, _ = normalized(x0, x1, inside0[None, :], inside1[None, :], eps, NORM, D, HALVES)
        c0, c1 = affine(c0, c1, norm_weight, norm_bias, layer, column, inside0, inside1, D, HALF, HALVES)
        factor, reciprocal = row_scale(c0, c1, HALVES)
        high0, low0 = operands(c0, factor, OPERAND, PRODUCTS)
        high1, low1 = high0, low0
        if HALVES == 2:
            high1, low1 = operands(c1, factor, OPERAND, PRODUCTS)
        first = layer * H_PADDED
        sum0 = tl.zeros([BM, HALF], tl.float32)
        sum1 = sum0
        for h in tl.range(0, H_PADDED, BH, num_stages=STAGES):
            here = first + h
            up0 = weights_at(w1, here, 0, BH, HALF, True, WIDE, TMA)
            up0_low = up0
            if PRODUCTS == "split":
                up0_low = weights_at(w1_low, here, 0, BH, HALF, True, WIDE, TMA)
            u = product(high0, low0, tl.trans(up0), tl.trans(up0_low), PRODUCTS)
            if HALVES == 2:
                up1 = weights_at(w1, here, HALF, BH, HALF, True, WIDE, TMA)
                up1_low = up1
                if PRODUCTS == "split":
                    up1_low = weights_at(w1_low, here, HALF, BH, HALF, True, WIDE, TMA)
                u += product(high1, low1, tl.trans(up1), tl.trans(up1_low), PRODUCTS)
            if PRODUCTS != "plain":
                u = u * reciprocal[:, None] * tl.load(unit1 + here + unit)[None, :]
            if b1 is not None:
                u += vector(b1, layer, h + unit, h + unit < H, H)[None, :]
            a = activated(u, ACTIVATION, FINE)
            down0 = weights_at(w2, here, 0, BH, HALF, W2_BY_UNIT, DOWN, TMA)
            if PRODUCTS == "plain":
                a_high = a.to(OPERAND)
                sum0 = tl.dot(a_high, down0, sum0)
                if HALVES == 2:
                    down1 = weights_at(w2, here, HALF, BH, HALF, W2_BY_UNIT, DOWN, TMA)
                    sum1 = tl.dot(a_high, down1, sum1)
            else:
                a = a * tl.load(unit2 + here + unit)[None, :]
                grow, shrink = power_of_two(tl.max(tl.abs(a), 1))
                a_high, a_low = halves_of_fp16(a * grow[:, None])
                down0_low = down0
                if PRODUCTS == "split":
                    down0_low = weights_at(w2_low, here, 0, BH, HALF, W2_BY_UNIT, DOWN, TMA)
                sum0 += product(a_high, a_low, down0, down0_low, PRODUCTS) * shrink[:, None]
                if HALVES == 2:
                    down1 = weights_at(w2, here, HALF, BH, HALF, W2_BY_UNIT, DOWN, TMA)
                    down1_low = down1
                    if PRODUCTS == "split":
                        down1_low = weights_at(w2_low, here, HALF, BH, HALF, W2_BY_UNIT, DOWN, TMA)
                    sum1 += product(a_high, a_low, down1, down1_low, PRODUCTS) * shrink[:, None]
        if b2 is not None:
            sum0 += vector(b2, layer, column, inside0, D)[None, :]
            if HALVES == 2:
                sum1 += vector(b2, layer, column + HALF, inside1, D)[None, :]
        if LAYERS == 1:  # what was read at first would take registers through the loop: it is in cache
            x0 = tl.load(source, mask=within & inside0[None, :], other=0.0).to(tl.float32)
        x0 = (x0 + residual_scale * sum0).to(STREAM).to(tl.float32)
        if HALVES == 2:
            if LAYERS == 1:
                x1 = tl.load(source + HALF, mask=within & inside1[None, :], other=0.0).to(tl.float32)
            x1 = (x1 + residual_scale * sum1).to(STREAM).to(tl.float32)
        if EVERY_LAYER:
            tl.store(target, x0.to(STREAM), mask=within & inside0[None, :])
            if HALVES == 2:
                tl.store(target + HALF, x1.to(STREAM), mask=within & inside1[None, :])
            target += rows.to(tl.int64) * D
    if not EVERY_LAYER:
        tl.store(target, x0.to(STREAM), mask=within & inside0[None, :])
        if HALVES == 2:
            tl.store(target + HALF, x1.to(STREAM), mask=within & inside1[None, :])
