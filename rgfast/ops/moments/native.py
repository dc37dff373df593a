"""The products through the compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
    native.load().moments_add(
        [native.tensor(x) for x in rows],
        [shift.data_ptr() for shift in shifts],
        [math.ldexp(1.0, -exponent) for exponent in exponents],
        (0, 0, 0) if keep is None else (keep.data_ptr(), *keep.stride()),
        [(i, j, total.data_ptr()) for (i, j), total in sums.items()],
        native.threads(),
    )
