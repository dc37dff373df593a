"""Krylov spaces of symmetric operators, for one or, off the CPU, many side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

__all__ = ["DEPTH", "TILE", "Operator", "lanczos", "leading", "off", "product", "spread"]

Operator = Callable[[Tensor], Tensor]

TILE = 512  # rows of a formed matrix that one thread multiplies at once
DEPTH = 8  # of the block Krylov space in which the top of the spectrum is sought
_ALIKE = 1e-13  # eigenvalue of a Gram matrix of unit columns that says no more than its rounding


def product(a: Tensor, workers: int) -> Operator:
    """V -> a V; on the CPU by tiles of rows, whose bits are the same whichever thread computes them."""
    if a.device.type != "cpu":
        return lambda v: a @ v
    tiles = torch.split(a, TILE)
    return lambda v: torch.cat(spread(lambda rows: rows @ v, tiles, workers))


def spread(function: Callable[[Any], Tensor], parts: Sequence[Any], workers: int) -> list[Tensor]:
    """`function` of every part, on so many threads."""
    if workers == 1 or len(parts) < 4:
        return [function(part) for part in parts]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, parts))


def leading(apply: Operator, block: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ritz values, descending, vectors and residuals of a block Krylov space, and whether all was finite.

    It has at most `DEPTH` blocks. Columns without a direction of their own are zero.
    """
    here = block.device.type == "cpu"
    basis = image = block[..., :0]
    finite = torch.ones(block.shape[:-2], dtype=torch.bool, device=block.device)
    for _ in range(DEPTH if count else 1):
        for _ in range(3):
            # What is left of a column inside the space already there is rounding error without a direction.
            least = 1e-10 * block.norm(dim=-2).sum(-1)[..., None]
            block = block - basis @ (basis.mT @ block)
            block = (_by_columns if here else _side_by_side)(block, least)
        if here and not bool(block.any()):  # elsewhere that would be a wait
            break
        basis, block = torch.cat([basis, block], -1), apply(block)
        known = torch.isfinite(block)
        finite, block = finite & known.flatten(-2).all(-1), torch.where(known, block, 0.0)
        image = torch.cat([image, block], -1)
    small = basis.mT @ image
    value, s = torch.linalg.eigh((small + small.mT) / 2)
    kept = max(count, 1)
    value, s = value.flip(-1)[..., :kept], s.flip(-1)[..., :kept]
    vector = basis @ s
    return value, vector, (image @ s - vector * value[..., None, :]).norm(dim=-2), finite


def _by_columns(block: Tensor, least: Tensor) -> Tensor:
    """Orthonormal columns for those of `block[d, k]`; 0 where less than `least` is left of one."""
    q, r = torch.linalg.qr(block)
    return torch.where(r.diagonal().abs() > least, q, 0.0)


def _side_by_side(block: Tensor, least: Tensor) -> Tensor:
    """The same of `block[..., d, k]` all at once, by the eigenvectors of their Gram matrix.

    A QR decomposition takes column after column. What this loses in precision the next round makes good.
    """
    norm = block.norm(dim=-2)
    unit = block / torch.where(norm > least, norm, torch.inf)[..., None, :]
    value, vector = torch.linalg.eigh(unit.mT @ unit)
    kept = value > _ALIKE
    weight = torch.where(kept, torch.where(kept, value, 1.0).rsqrt(), 0.0)
    columns: Tensor = unit @ (vector * weight[..., None, :])
    return columns


def off(v: Tensor, vector: Tensor) -> Tensor:
    """The part of `v[d, k]` orthogonal to the deflated vectors; twice, since once leaves rounding error."""
    for _ in range(2):
        v = v - vector @ (vector.mT @ v)
    return v


def lanczos(apply: Operator, start: Tensor, steps: int, workers: int) -> Tensor:
    """Tridiagonal matrices `[..., steps, steps]` of Lanczos from each of `start[..., d]`, kept orthogonal."""
    lead, d = start.shape[:-1], start.shape[-1]
    q = math.prod(lead)
    together, workers = (4, workers) if start.device.type == "cpu" else (q, 1)
    parts = [slice(i, i + together) for i in range(0, q, together)]
    basis = torch.zeros((q, steps, d), dtype=torch.float64, device=start.device)
    small = torch.zeros((q, steps, steps), dtype=torch.float64, device=start.device)
    v, beta = start.reshape(q, d), torch.zeros(q, dtype=torch.float64, device=start.device)
    for k in range(steps):
        basis[:, k] = v
        w = apply(v.view(start.shape).mT).mT.reshape(q, d)
        small[:, k, k] = (w * v).sum(-1)
        # The recurrence takes out nearly all of it, one pass over the basis what rounding has brought back.
        w = w - small[:, k, k, None] * v
        if k:
            w = w - beta[:, None] * basis[:, k - 1]

        def outside(part: slice, w: Tensor = w, k: int = k) -> Tensor:
            seen = basis[part, : k + 1]
            return w[part] - (seen.mT @ (seen @ w[part, :, None]))[:, :, 0]

        w = torch.cat(spread(outside, parts, workers if d >= 2 * TILE else 1))
        beta = w.norm(dim=-1)
        beta = torch.where(beta > 1e-14, beta, 0.0)  # an exhausted space goes on with zeros of no weight
        v = w / torch.where(beta > 0, beta, 1.0)[:, None] * (beta > 0)[:, None]
        if k + 1 < steps:
            small[:, k, k + 1] = small[:, k + 1, k] = beta
    return small.view(*lead, steps, steps)
