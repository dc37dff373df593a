"""The products through the compiled kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rgfast.dispatch import Impl
from rgfast.ops.moments.call import Products
from rgfast.runtime import native

__all__ = ["MOMENTS"]

# Seconds per call, and products a second of one AVX-512 core (README, "Measurements").
_CALL, _PRODUCTS = 2e-5, 35e9


def _run(call: Products) -> None:
    """As `reference.add_products`; the bits depend on values and instruction set alone."""
    rows, sums = call.rows, call.sums
    shifts = [shift.contiguous() for shift in call.shifts]
    keep = None if call.keep is None else call.keep.contiguous()
    b = rows[0].shape[1]
    native.load().moments_add(
        [native.tensor(x) for x in rows],
        [
            native.address(s, torch.float64, x.shape[0] * x.shape[2], "shifts")
            for s, x in zip(shifts, rows, strict=True)
        ],
        [math.ldexp(1.0, -exponent) for exponent in call.exponents],
        (native.address(keep, torch.bool, len(rows[0]) * b, "keep"), b, 1),
        [
            (i, j, native.address(total, torch.float64, _entries(rows[i], rows[j]), "sums"))
            for (i, j), total in sums.items()
        ],
        native.threads(),
    )


def _entries(left: Tensor, right: Tensor) -> int:
    return len(left) * (left.shape[2] + 2) * (right.shape[2] + 2)


MOMENTS = Impl(
    "native",
    _run,
    cost=lambda call: _CALL + call.multiplications() / _PRODUCTS,
    devices=("cpu",),
    missing=native.unavailable_reason,
    isa=native.active_isa,
)
