"""Second moments by torch's batched fp64 products, on any device, for the implementations that take them so.

Nothing here reads a value on a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgfast.ops.device import by_itself, cache_bytes, seconds
from rgfast.ops.spectrum.call import Rows

__all__ = ["cost", "gram", "moments", "refusal"]

# Rows per partial sum of a moment, as the error bound counts them.
_TILE = 256
_PART_BYTES, _WORTH_A_LAUNCH = 32 << 20, 8 << 20


def gram(call: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `reference.gram` returns, in the same tiles, by fewer passes over rows that stay in the cache."""
    x, m = call.x.detach(), call.side
    b, n, d = x.shape
    matrix = torch.empty((b, m, m), dtype=torch.float64, device=x.device)
    accumulated = torch.empty(b, dtype=torch.float64, device=x.device)
    exponent, limit = torch.zeros((2, b), dtype=torch.int64, device=x.device)
    step = _matrices_at_once(call)
    with by_itself(x.device.type):
        for start in range(0, b, step):
            part = slice(start, min(start + step, b))
            y, first = _shifted(call, part, exponent)
            if call.centering == "mean":
                mean = y.mean(1, keepdim=True)
                y.sub_(mean)
                accumulated[part] = y.square().sum((1, 2)) + n * mean.square().sum((1, 2))
            else:
                mean = (y - first[:, None]).mean(1, keepdim=True)
                accumulated[part] = y.square().sum((1, 2))
            if call.means is not None:
                call.means[part] = first + mean[:, 0]
            live = y != 0
            rows = live.any(2).sum(1) - (1 if call.centering == "mean" else 0)
            limit[part] = torch.minimum(rows.clamp_min(0), live.any(1).sum(1))
            tall = y if n >= d else y.mT
            total = torch.bmm(tall[:, :_TILE].mT, tall[:, :_TILE])
            for row in range(_TILE, max(n, d), _TILE):
                total.baddbmm_(tall[:, row : row + _TILE].mT, tall[:, row : row + _TILE])
            matrix[part] = total
    return matrix, accumulated, exponent, limit


def moments(call: Rows) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """What `gram` returns, and after the matrix the means, None unless `call.raw` needs them.

    Both are zero where they are not finite; `call.matrix` gets the moments as they are.
    """
    b, _, d = call.x.shape
    means = call.means
    if call.raw is not None and means is None:
        means = torch.empty((b, d), dtype=torch.float64, device=call.device)
    matrix, accumulated, exponent, limit = gram(call._replace(means=means))
    if call.matrix is not None:
        call.matrix.copy_(matrix)
    matrix.masked_fill_(~torch.isfinite(accumulated)[:, None, None], 0.0)
    if call.raw is None or means is None:
        return matrix, None, accumulated, exponent, limit
    return matrix, torch.where(torch.isfinite(means), means, 0.0), accumulated, exponent, limit


def _shifted(call: Rows, part: slice, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Widened rows less the first (times 2^-exponent for fp64 data), and that first; new tensors."""
    x = call.x.detach()[part]
    y = torch.empty(x.shape, dtype=torch.float64, device=x.device)
    if x.dtype == torch.float64:
        largest = x.abs().amax((-2, -1))
        exponent[part] = torch.frexp(largest).exponent.long().clamp(-1000, 1000)
        unit = ((1023 - exponent[part]) << 52).view(torch.float64)[:, None, None]
        torch.mul(x, unit, out=y)
    else:
        y.copy_(x)
    first = y[:, 0].clone()
    if call.centering == "mean":
        # The first row goes first: an exactly constant column becomes exactly zero, which no mean promises.
        y.sub_(first[:, None])
    return y, first


def _matrices_at_once(call: Rows) -> int:
    """As many as stay in a GPU's cache, if launches then have enough to do."""
    each = max(1, 8 * call.x.shape[1] * call.x.shape[2])
    if call.device.type == "cpu":
        return max(1, _PART_BYTES // each)
    return max(1, cache_bytes(call.device) // 2 // each, _WORTH_A_LAUNCH // each)


def refusal(call: Rows) -> str | None:
    """Why `gram` cannot make the moments of a call, or None."""
    single = call.dtype != torch.float64
    return "it computes in float64, and precision='single' asks for float32" if single else None


def cost(call: Rows) -> float:
    """About how long `gram` takes: on a GPU ten passes through the cache, and tiles of products."""
    b, n, d = call.x.shape
    if call.device.type == "cpu":
        return 1e-4 + call.x.numel() * (call.side + 30.0) / 12e9
    calls = -(-b // _matrices_at_once(call))
    launches = calls * (16 + -(-max(n, d) // _TILE))
    moved = call.x.numel() * (call.x.element_size() + 40.0) + 16.0 * b * call.side**2
    return seconds(launches, moved, float(call.x.numel()) * call.side)
