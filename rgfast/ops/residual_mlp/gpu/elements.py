"""Functions of single numbers and rows that the block's kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activated", "normalized", "power_of_two", "slope"]

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def power_of_two(largest, LEAST: tl.constexpr = 1):
    """A power of two that brings ``largest`` into [2^14, 2^15), where fp16 is finest, and its reciprocal.

    Both stay normal numbers: a zero and what is near it get 2^126, or less the greater ``LEAST`` is, the
    least exponent of ``largest`` (plus 127) to be told from zero.
    """
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    biased = tl.minimum(tl.maximum(268 - tl.maximum(exponent, LEAST), 1), 253)
    factor = (biased << 23).to(tl.float32, bitcast=True)
    return factor, ((254 - biased) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _upper_tail(v, FINE: tl.constexpr):
    """1 - Phi(v) for v >= 0, Phi of the normal distribution.

    2^p(v) with p(0) = -1 exactly, so that GELU near zero is u/2. Weighted minimax fits of log2: off by 3e-7
    (five coefficients) or 5e-8 evaluated in fp32 (eight); p falls without bound beyond the fit.
    """
    if FINE:
        p = 3.9377692e-05 + v * -2.83491282e-06
        p = 0.00706342009 + v * (-0.000136936349 + v * (-0.000186180247 + v * p))
        p = -1.15110521 + v * (-0.459208197 + v * (-0.0524961783 + v * p))
    else:
        p = -0.0525611665 + v * (0.0073974644 + v * -0.000520448664)
        p = -1.15109135 + v * (-0.459254723 + v * p)
    return tl.exp2(-1.0 + v * p)


@triton.jit
def _sigmoid(u):
    return 1.0 / (1.0 + tl.exp2(u * -_LOG2E))


@triton.jit
def _tanh(u):
    # Near zero the quotient cancels; there an odd polynomial is right to 1e-8 of its value.
    square = u * u
    near = 0.133308998 + square * (-0.0536929677 + square * (0.0204833151 + square * -0.00552863249))
    near = u + u * square * (-0.333332629 + square * near)
    v = tl.abs(u)
    far = 1.0 - 2.0 / (1.0 + tl.exp2(v * (2.0 * _LOG2E)))
    return tl.where(v < 0.65, near, tl.where(u < 0, -far, far))


@triton.jit
def activated(u, ACTIVATION: tl.constexpr, FINE: tl.constexpr):
    """The activation of ``u``; GELU and its slope are finer if ``FINE``."""
    if ACTIVATION == "gelu":
        v = tl.abs(u)
        # Written with a product that is NaN for a NaN: a maximum would drop it.
        return tl.maximum(u, 0.0) - v * _upper_tail(v, FINE)
    elif ACTIVATION == "gelu_tanh":
        return u * _sigmoid(u * (1.5957691216057308 + 0.07135481282989427 * (u * u)))
    elif ACTIVATION == "relu":
        return tl.where(u < 0, 0.0, u)
    elif ACTIVATION == "silu":
        return u * _sigmoid(u)
    else:
        return _tanh(u)


@triton.jit
def slope(u, ACTIVATION: tl.constexpr, FINE: tl.constexpr):
    """The derivative of the activation at ``u``."""
    if ACTIVATION == "gelu":
        tail = _upper_tail(tl.abs(u), FINE)
        density = 0.3989422804014327 * tl.exp2(u * (u * -0.7213475204444817))
        return tl.where(u < 0, tail, 1.0 - tail) + u * density
    elif ACTIVATION == "gelu_tanh":
        near = tl.minimum(tl.maximum(u, -30.0), 30.0)  # it is 0 or 1 beyond, where the cube would overflow
        square = near * near
        s = _sigmoid(near * (1.5957691216057308 + 0.07135481282989427 * square))
        return s + near * s * (1.0 - s) * (1.5957691216057308 + 0.2140644384896828 * square)
    elif ACTIVATION == "relu":
        return tl.where(u > 0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        s = _sigmoid(u)
        return s * (1.0 + u * (1.0 - s))
    else:
        t = _tanh(u)
        return 1.0 - t * t


@triton.jit
def _row_sums(a0, a1, HALVES: tl.constexpr):
    total = tl.sum(a0, 1)
    if HALVES == 2:
        total += tl.sum(a1, 1)
    return total


@triton.jit
def normalized(x0, x1, inside0, inside1, eps, NORM: tl.constexpr, D: tl.constexpr, HALVES: tl.constexpr):
    """Rows ``x`` (in one or two halves of columns, zero outside) without their mean, over their deviation.

    Also returns the reciprocal of the deviation, for the gradient.
    """
    if NORM == "none":
        return x0, x1, tl.sum(x0, 1) * 0.0 + 1.0
    # Squares of fp32 overflow at 1e19 and vanish at 1e-23, so each row is scaled by a power of two first.
    largest = tl.max(tl.abs(x0), 1)
    if HALVES == 2:
        largest = tl.maximum(largest, tl.max(tl.abs(x1), 1))
    factor, _ = power_of_two(largest, 81)  # 2^60 at most: eps is multiplied by the square
    c0 = x0 * factor[:, None]
    c1 = x1 * factor[:, None]
    if NORM == "layer":
        # Twice: what rounding left in the first mean is small against the deviation only if the mean is.
        for _ in tl.static_range(2):
            mean = _row_sums(c0, c1, HALVES) * (1.0 / D)
            c0 = tl.where(inside0, c0 - mean[:, None], 0.0)
            c1 = tl.where(inside1, c1 - mean[:, None], 0.0)
    square = _row_sums(c0 * c0, c1 * c1, HALVES) * (1.0 / D)
    floor = eps * factor * factor
    floor = tl.where(eps > 0, tl.maximum(floor, 1e-37), floor)
    reciprocal = tl.div_rn(1.0, tl.sqrt_rn(square + floor))
    return c0 * reciprocal[:, None], c1 * reciprocal[:, None], reciprocal * factor
