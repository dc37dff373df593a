"""Measures of the product x_cᵀ y_c of centered rows: a permutation reorders the rows of one factor.

Procrustes takes its singular values; CKA its squares, where features are so few, or samples so many, that
this takes less than n×n kernels do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rgfast.ops.similarity.rows import centered

__all__ = ["Factor", "factor", "inner", "products", "rotations"]

_NO_VARIANCE = 1e-13


class Factor(NamedTuple):
    """Centered rows ``z[n, d]``, their squared norms ``[n]``, and their size, NaN without variance."""

    z: Tensor
    norms: Tensor
    size: Tensor


def factor(x: Tensor, measure: str, debiased: bool = False) -> Factor:
    """``x[n, d]`` as the measure needs it."""
    z = centered(x)
    norms = z.square().sum(1)
    trace = norms.sum()
    if measure == "procrustes":
        if z.shape[1] > len(z):
            z = torch.linalg.qr(z.mT, mode="r").R.mT.contiguous()  # the same Gram, and so the same values
        return Factor(z, norms, torch.where(trace > 0, trace.sqrt(), torch.nan))
    own = inner((z.mT @ z).square().sum(), norms @ norms, trace * trace, len(z), debiased)
    varies = own > _NO_VARIANCE * trace.square() / len(z)
    return Factor(z, norms, torch.where(varies, own.sqrt(), torch.nan))


def products(first: list[Factor], second: Factor, orders: Tensor, debiased: bool) -> Tensor:
    """Linear CKA ``[orders, layers]``."""
    n, widths = len(second.z), [each.z.shape[1] for each in first]
    side = torch.cat([each.z for each in first], 1).mT.contiguous()
    norms = torch.stack([each.norms for each in first])
    traces, sizes = norms.sum(1) * second.norms.sum(), torch.stack([each.size for each in first])
    out = torch.empty(len(orders), len(first), dtype=torch.float64, device=side.device)
    for row, order in zip(out, orders, strict=True):
        squares = (side @ second.z[order]).square().sum(1)
        whole = torch.stack([part.sum() for part in torch.split(squares, widths)])
        row.copy_(inner(whole, norms @ second.norms[order], traces, n, debiased))
    return out / (sizes * second.size)


def rotations(first: list[Factor], second: Factor, orders: Tensor) -> Tensor:
    """‖x_cᵀy_c‖_* / (‖x_c‖_F ‖y_c‖_F) ``[orders, layers]``."""
    out = torch.empty(len(orders), len(first), dtype=torch.float64, device=second.z.device)
    for row, order in zip(out, orders, strict=True):
        y = second.z[order]
        for k, each in enumerate(first):
            row[k] = torch.linalg.svdvals(each.z.mT @ y).sum() / (each.size * second.size)
    return out.clamp_max(1.0)


def inner(whole: Tensor, same: Tensor, traces: Tensor, n: int, debiased: bool) -> Tensor:
    """⟨K, L⟩ of (U-)centered kernels from ‖zᵀw‖², Σ|z|²|w|² and the product of traces."""
    if not debiased:
        return whole
    return whole - same - 2.0 * same / (n - 2) + traces / ((n - 1) * (n - 2))
