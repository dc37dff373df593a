"""Kernels between the library's products of a wide block: each reads and writes its rows once."""

from __future__ import annotations

import triton
import triton.language as tl

from rgfast.ops.residual_mlp.gpu.elements import activated, normalized

__all__ = ["activate", "begin"]


@triton.jit
def begin(
    x, row_stride, normed, start, norm_weight, norm_bias, b2, eps, residual_scale,
    D: tl.constexpr, D_PADDED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One row: ``normed``, which the first product gets, and ``start``, to which the second is added."""
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
    if b2 is not None:
        rows += residual_scale * tl.load(b2 + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(start + place, rows.to(start.dtype.element_ty), mask=inside[None, :])


@triton.jit(do_not_specialize=["numbers"])
def activate(
    sums, b1, numbers, H: tl.constexpr, ACTIVATION: tl.constexpr, FINE: tl.constexpr, CHUNK: tl.constexpr
):
    """``sums[rows, H]`` plus bias, activated, in place."""
    place = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = place < numbers
    u = tl.load(sums + place, mask=inside, other=0.0).to(tl.float32)
    if b1 is not None:
        u += tl.load(b1 + place % H, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + place, activated(u, ACTIVATION, FINE).to(sums.dtype.element_ty), mask=inside)
