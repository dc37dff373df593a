"""Spectra and rank measures in plain PyTorch: the specification that every other path is tested against.

The measures here take the fp64 SVD of the centred data, which is the definition of the truth. `gram` and
`gram_spectrum` are the plain form of what a compiled implementation provides: the second moment of the
smaller side, with what is needed to bound its error.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 256  # rows per partial sum of a Gram matrix; part of the error bound (see README)
_CHUNK = 1 << 22  # elements of fp64 workspace per pass over the batch


def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` in fp64 and, for fp64 input, each matrix over the power of two above its largest magnitude.

    Returns the scaled `[b, n, d]` and the exponents `[b]`. Halves and fp32 cannot leave the fp64 range when
    squared twice, so they are widened only, which is exact. The result is new and contiguous,
    so that what the library makes of it on one thread does not depend on the strides and the address of `x`.
    """
    exponent = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    if x.dtype != torch.float64:
        return x.to(torch.float64, memory_format=torch.contiguous_format), exponent
    x = x.contiguous()
    exponent = torch.frexp(x.abs().amax((-2, -1))).exponent.long().clamp(-1000, 1000)
    return x * ((1023 - exponent) << 52).view(torch.float64)[:, None, None], exponent


def centred(y: Tensor, centering: str) -> tuple[Tensor, Tensor]:
    """fp64 `y[b, n, d]` less its column means, and the squared norm `[b]` of what the means were taken from.

    The first row goes first: an exactly constant column then becomes exactly zero, which a rounded mean does
    not promise, and the mean that follows is of the signal's size whatever the offset was.
    """
    if centering == "mean":
        y = y - y[:, :1]
        mean = y.mean(-2, keepdim=True)
        lost = y.shape[-2] * mean.square().sum((-2, -1))
        y = y - mean
        return y, y.square().sum((-2, -1)) + lost
    return y, y.square().sum((-2, -1))


def rank_limit(y: Tensor, centering: str) -> Tensor:
    """The rank `[b]` that `y[b, n, d]` cannot exceed: live rows (one less when centred), live columns."""
    live = y != 0
    rows = live.any(-1).sum(-1) - (1 if centering == "mean" else 0)
    return torch.minimum(rows.clamp_min(0), live.any(-2).sum(-1))


def gram(
    x: Tensor,
    *,
    centering: str = "mean",
    dtype: torch.dtype = torch.float64,
    means: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Second moment of the smaller side of `x[b, n, d]`, accumulated in `dtype`, not divided by n.

    Returns the Gram matrix `[b, m, m]`, m = min(n, d), of the centred data times 2**-exponent; the trace
    `[b]` of the accumulated shifted moment, not finite exactly where the input is not; the exponents `[b]`;
    and the largest rank possible `[b]`. `means` `[b, d]` (fp64), where given, gets the column means times
    2**-exponent.
    """
    b, n, d = x.shape
    m = min(n, d)
    matrix = torch.empty((b, m, m), dtype=dtype, device=x.device)
    accumulated = torch.empty(b, dtype=torch.float64, device=x.device)
    exponent = torch.empty(b, dtype=torch.int64, device=x.device)
    limit = torch.empty(b, dtype=torch.int64, device=x.device)
    step = max(1, _CHUNK // (n * d))
    for start in range(0, b, step):
        part = slice(start, start + step)
        y, e = scaled(x[part])
        if means is not None:
            means[part] = y[:, 0] + (y - y[:, :1]).mean(1)
        y, accumulated[part] = centred(y, centering)
        limit[part] = rank_limit(y, centering)
        if dtype != torch.float64:
            top = torch.frexp(y.abs().amax((-2, -1))).exponent.long().clamp(-1000, 1000)
            factor = ((1023 - top) << 52).view(torch.float64)
            y = (y * factor[:, None, None]).to(dtype)
            accumulated[part] *= factor.square()
            e = e + top
        exponent[part] = e
        tall = y if n >= d else y.mT
        total = torch.zeros((y.shape[0], m, m), dtype=dtype, device=x.device)
        for row in range(0, max(n, d), TILE):
            rows = tall[:, row : row + TILE]
            total = torch.baddbmm(total, rows.mT, rows)
        matrix[part] = total
    return matrix, accumulated, exponent, limit


def gram_spectrum(
    x: Tensor,
    *,
    centering: str = "mean",
    dtype: torch.dtype = torch.float64,
    raw: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eigenvalues `[b, m]`, ascending, of `gram(x)`, and the rest of what `gram` returns.

    `raw` `[b, d]` (fp64), where given, gets those of the moment of the data as they are, which is that of the
    centred data and n mean mean'; for n >= d and `centering="mean"`.
    """
    b, n, d = x.shape
    means = None if raw is None else torch.empty((b, d), dtype=torch.float64, device=x.device)
    matrix, accumulated, exponent, limit = gram(x, centering=centering, dtype=dtype, means=means)
    matrix = torch.where(torch.isfinite(accumulated)[:, None, None], matrix, 0.0)
    if raw is not None and means is not None:
        means = torch.where(torch.isfinite(means), means, 0.0).to(dtype)
        raw.copy_(eigvalsh(matrix.baddbmm(means[:, :, None], means[:, None, :], alpha=n)))
    return eigvalsh(matrix), accumulated, exponent, limit


def eigvalsh(a: Tensor) -> Tensor:
    """Eigenvalues of symmetric `a[..., d, d]`, ascending, in its dtype; the lower triangle is read."""
    values: Tensor = torch.linalg.eigvalsh(a)
    return values


def singular_values(x: Tensor, *, centering: str = "mean") -> Tensor:
    """Singular values `[b, min(n, d)]` of `x[b, n, d]`, descending: the fp64 SVD of the centred data."""
    y, exponent = scaled(x)
    y, _ = centred(y, centering)
    sigma = torch.linalg.svdvals(y)
    kept = (
        torch.arange(sigma.shape[-1], dtype=torch.int64, device=x.device) < rank_limit(y, centering)[:, None]
    )
    half = exponent // 2  # 2**exponent itself may not be a normal number
    low = ((1023 + half) << 52).view(torch.float64)[:, None]
    high = ((1023 + exponent - half) << 52).view(torch.float64)[:, None]
    return torch.where(kept, sigma, 0.0) * low * high


def effective_rank(x: Tensor, *, spectrum: str = "singular", centering: str = "mean") -> Tensor:
    """exp(H(p)) `[b]`, p the normalised singular values (Roy & Vetterli 2007) or their squares."""
    weight = _unit(singular_values(x, centering=centering))
    if spectrum == "variance":
        weight = weight.square()
    total = weight.sum(-1)
    p = weight / torch.where(total > 0, total, 1.0)[:, None]
    return torch.where(total > 0, torch.special.entr(p).sum(-1).exp(), 0.0)


def participation_ratio(x: Tensor, *, centering: str = "mean") -> Tensor:
    """(sum lambda)^2 / sum lambda^2 `[b]`."""
    weight = _unit(singular_values(x, centering=centering)).square()
    bottom = weight.square().sum(-1)
    return weight.sum(-1).square() / torch.where(bottom > 0, bottom, 1.0)


def stable_rank(x: Tensor, *, centering: str = "mean") -> Tensor:
    """sum lambda / lambda_1 `[b]`."""
    return _unit(singular_values(x, centering=centering)).square().sum(-1)


def numerical_rank(x: Tensor, *, tol: float, centering: str = "mean") -> Tensor:
    """#{sigma_i > tol sigma_1} `[b]`, as fp64."""
    unit = _unit(singular_values(x, centering=centering))
    return (unit > tol).sum(-1).double()


def _unit(sigma: Tensor) -> Tensor:
    top = sigma[:, :1]
    return sigma / torch.where(top > 0, top, 1.0)
