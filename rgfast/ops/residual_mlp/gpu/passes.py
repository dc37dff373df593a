"""Kernels between the library's products of a wide block: each reads and writes its rows once."""

from __future__ import annotations

import triton
import triton.language as tl

from rgfast.ops.residual_mlp.gpu.backward import gradient_of_rows
from rgfast.ops.residual_mlp.gpu.elements import activated, normalized, slope

__all__ = ["activate", "begin", "descend", "finish"]


@triton.jit
def begin(
    x, row_stride, normed, start, norm_weight, norm_bias, b2, eps, residual_scale,
    D: tl.constexpr, D_PADDED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One row: ``normed``, which the first product gets, and ``start`` if the second is added to that."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, D_PADDED)
    inside = column < D
    read = tl.load(x + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    rows = read[None, :]
    c, _, _ = normalized(rows, rows, inside[None, :], inside[None, :], eps, NORM, D, 1)
    if norm_weight is not None:
        c = c * tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if norm_bias is not None:
        c = c + tl.load(norm_bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = (row * D + column)[None, :]
    tl.store(normed + place, c.to(normed.dtype.element_ty), mask=inside[None, :])
    if start is not None:
        if b2 is not None:
            rows += residual_scale * tl.load(b2 + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        tl.store(start + place, rows.to(start.dtype.element_ty), mask=inside[None, :])


@triton.jit(do_not_specialize=["numbers"])
def activate(
    sums, b1, hidden, numbers,
    H: tl.constexpr, ACTIVATION: tl.constexpr, FINE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``hidden``: ``sums[rows, H]`` plus bias, activated. They may be one."""
    place = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = place < numbers
    u = tl.load(sums + place, mask=inside, other=0.0).to(tl.float32)
    if b1 is not None:
        u += tl.load(b1 + place % H, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden + place, activated(u, ACTIVATION, FINE).to(hidden.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "each"])
def descend(
    sums, b1, gradient, parts, rows, each, residual_scale,
    H: tl.constexpr, ACTIVATION: tl.constexpr, FINE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``gradient[rows, H]`` through the activation, in place, and ``parts[programs, H]``: what the ``each``
    rows of a program add to the gradient of the bias."""
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = column < H
    first = tl.program_id(0).to(tl.int64) * each
    last = tl.minimum(first + each, rows)
    total = tl.zeros([BC], tl.float32)
    bias = total
    if b1 is not None:
        bias = tl.load(b1 + column, mask=inside, other=0.0).to(tl.float32)
    for at in range(first, last, BM):
        row = at + tl.arange(0, BM)
        within = (row < last)[:, None] & inside[None, :]
        place = row[:, None] * H + column[None, :]
        u = tl.load(sums + place, mask=within, other=0.0).to(tl.float32) + bias[None, :]
        du = tl.load(gradient + place, mask=within, other=0.0).to(tl.float32) * residual_scale
        du *= slope(u, ACTIVATION, FINE)
        tl.store(gradient + place, du.to(gradient.dtype.element_ty), mask=within)
        total += tl.sum(tl.where(within, du, 0.0), 0)
    if parts is not None:
        tl.store(parts + tl.program_id(0).to(tl.int64) * H + column, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "each"])
def finish(
    x, row_stride, gradient, dy, dx, parts, norm_weight, rows, each, eps,
    D: tl.constexpr, D_PADDED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """``dx``, by the ``gradient`` of the first product's input, and ``parts[programs, 3, D]``: what the
    ``each`` rows of a program add to the gradients of the norm's weight and bias and to the sum of ``dy``."""
    first = tl.program_id(0).to(tl.int64) * each
    column = tl.arange(0, D_PADDED)
    inside = column < D
    weights = tl.zeros([1, D_PADDED], tl.float32)
    biases = weights
    ends = weights
    for row in range(first, tl.minimum(first + each, rows)):
        here = (row * D + column)[None, :]
        read = tl.load(x + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        through = tl.load(gradient + here, mask=inside[None, :], other=0.0).to(tl.float32)
        beside = tl.load(dy + here, mask=inside[None, :], other=0.0).to(tl.float32)
        back, _, weight, _ = gradient_of_rows(
            through, through, read, read, norm_weight, column, inside, inside, eps, NORM, D, D_PADDED, 1
        )
        if dx is not None:
            tl.store(dx + here, (back + beside).to(dx.dtype.element_ty), mask=inside[None, :])
        weights += weight
        biases += through
        ends += beside
    if parts is not None:
        place = parts + tl.program_id(0).to(tl.int64) * (3 * D) + column[None, :]
        tl.store(place, weights, mask=inside[None, :])
        tl.store(place + D, biases, mask=inside[None, :])
        tl.store(place + 2 * D, ends, mask=inside[None, :])
