"""The products through the compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rgfast import native

__all__ = ["add_products", "supports"]


def supports(
    sums: Mapping[tuple[int, int], Tensor], rows: Sequence[Tensor], *_: object, **__: object
) -> str | None:
    """None, or why the compiled kernels do not take these rows."""
    if not all(x.is_cpu for x in rows):
        return f"it runs on the CPU, rows are on {rows[0].device.type}"
    return None


def add_products(
    sums: Mapping[tuple[int, int], Tensor],
    rows: Sequence[Tensor],
    shifts: Sequence[Tensor],
    keep: Tensor | None,
    exponents: Sequence[int],
) -> None:
    """As `reference.add_products`; the bits depend on values and instruction set alone."""
    shifts = [shift.contiguous() for shift in shifts]
    keep = None if keep is None else keep.contiguous()
    b = rows[0].shape[1]
    native.load().moments_add(
        [native.tensor(x) for x in rows],
        [
            native.address(s, torch.float64, x.shape[0] * x.shape[2], "shifts")
            for s, x in zip(shifts, rows, strict=True)
        ],
        [math.ldexp(1.0, -exponent) for exponent in exponents],
        (native.address(keep, torch.bool, len(rows[0]) * b, "keep"), b, 1),
        [
            (i, j, native.address(total, torch.float64, _entries(rows[i], rows[j]), "sums"))
            for (i, j), total in sums.items()
        ],
        native.threads(),
    )


def _entries(left: Tensor, right: Tensor) -> int:
    return len(left) * (left.shape[2] + 2) * (right.shape[2] + 2)
