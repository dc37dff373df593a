"""The few small singular values of data that are large in all other directions, as after a LayerNorm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rgfast.ops.moments.api import add_products
from rgfast.ops.spectrum import reference
from rgfast.ops.spectrum.measures import array_on_cpu
from rgfast.ops.spectrum.refine import Stage, refined
from rgfast.ops.spectrum.solve import PATHS, Solved
from rgfast.runtime.threads import no_autocast, one_thread
from rgfast.runtime.waiting import sent

__all__ = ["few_small", "with_trailing"]

_NARROWEST = 96  # features; below, the compiled stages are as fast
_MOST = 16  # small values; of more, the large ones are taken out of the rows instead
_GAP, _LOST = 1e3, 1e-15  # from the least other eigenvalue; share of the largest that a moment does not tell
_ROWS = 4096  # rows that are widened at a time
_STEPS = 3  # of inverse iteration, each of which takes off a factor of _GAP at least
_SHIFT = 1e-13  # of the trace: more than rounding takes from an eigenvalue, and no more than is lost anyway


def few_small(x: Tensor, solved: Solved) -> Tensor:
    """How many singular values `[b]` of `x[b, n, d]` are far below all others, 0 where that is none or many.

    Also 0 where samples are fewer than features: the moment is then that of samples.
    """
    n, d = x.shape[1:]
    if not n >= d >= _NARROWEST:
        return torch.zeros_like(solved.rank_limit)
    values = solved.sigma.square()
    # What is below is rounding, and no gap.
    values = values.maximum(_LOST * values[:, :1])
    ratio, last = (values[:, -_MOST - 1 : -1] / values[:, -_MOST:]).max(1)
    return torch.where(ratio > _GAP, _MOST - last, 0)


def with_trailing(
    x: Tensor,
    at: Tensor,
    solved: Solved,
    small: int,
    centering: str,
    moments: tuple[Tensor, Tensor] | None = None,
) -> Solved:
    """Spectra of matrices `at` of `x[b, n, d]`, n ≥ d, with the `small` least values from the rows.

    `solved` are these matrices' spectra by their moments. `moments`, if given, are the centered moments
    `[b, d, d]` of x and its column means `[b, d]`, in units of the spectra's exponents. Inverse iteration has
    a moment's eigenvectors V of the least eigenvalues for one factorization, and x V has a moment of its own,
    in which they are large: what `refined` otherwise gets by taking all other directions out of the rows.
    """
    d = solved.sigma.shape[1]
    told = torch.zeros(len(at), 3 + small, dtype=torch.float64, device=x.device)
    kind = x.device.type
    for k, (index, exponent) in enumerate(torch.stack([at, solved.exponent], 1).cpu().tolist()):
        rows = x[index]
        if moments is None:
            moment, shift, lost = _moment_of(rows, exponent, centering)
        else:
            moment, shift, lost = _moment_from(
                moments[0][index], moments[1][index], rows, exponent, centering
            )
        with one_thread(), no_autocast(kind):
            told[k] = _of_moment(moment, rows, shift, lost, exponent, small)
    # What was taken out counts as so many zeros.
    values = torch.nn.functional.pad(told[:, 3:], (d - small, 0))
    by_moment = solved.sigma.square().flip(1)
    accumulated, residual, trace = told[:, 0], told[:, 1], told[:, 2]
    leading = torch.full_like(at, d - small)
    first = Stage(*map(array_on_cpu, (by_moment, accumulated, leading, residual)))
    rest = Stage(*map(array_on_cpu, (values, trace, torch.zeros_like(at), torch.zeros_like(trace))))
    limit = array_on_cpu(solved.rank_limit)
    found = refined(lambda live, stage: rest, x.shape[1], first.trace, limit, math.inf, first)
    sigma, error = map(torch.as_tensor, found)
    path = torch.full_like(solved.path, PATHS.index("refined"))
    return Solved(sigma, error, solved.exponent, solved.rank_limit, path)


def _moment_of(x: Tensor, exponent: int, centering: str) -> tuple[Tensor, Tensor, Tensor]:
    """The moment `[d, d]` of `x[n, d]` 2^-exponent, and what `_shift_of` returns."""
    d = x.shape[1]
    with one_thread(), no_autocast(x.device.type):
        shift, lost = _shift_of(x, exponent, centering)
    sums = torch.zeros(1, d + 2, d + 2, dtype=torch.float64, device=x.device)
    add_products({(0, 0): sums}, [x[None]], [shift[None] * 2.0**exponent], exponents=[exponent])
    return sums[0, :d, :d].contiguous(), shift, lost


def _moment_from(
    centered: Tensor, mean: Tensor, x: Tensor, exponent: int, centering: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_moment_of` returns, from the centered moment and the column means."""
    lost = len(x) * (mean - _widened(x[0], exponent)).square().sum()
    if centering == "mean":
        return centered, mean, lost
    return torch.addr(centered, mean, mean, alpha=len(x)), torch.zeros_like(mean), lost


def _shift_of(x: Tensor, exponent: int, centering: str) -> tuple[Tensor, Tensor]:
    """The means `[d]` of `x[n, d]` 2^-exponent, or zeros, and what taking them off the first row has lost."""
    nothing = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    if centering != "mean":
        return nothing, nothing.sum()
    # The first row goes first, see `reference.centred`.
    first = _widened(x[0], exponent)
    mean = sum(((_widened(rows, exponent) - first).sum(0) for rows in torch.split(x, _ROWS)), nothing)
    mean = mean / len(x)
    return first + mean, len(x) * mean.square().sum()


def _of_moment(moment: Tensor, x: Tensor, shift: Tensor, lost: Tensor, exponent: int, small: int) -> Tensor:
    """All that was accumulated, ‖A V − V Λ‖, ‖x V‖² and the eigenvalues of the moment of x V."""
    vectors = _trailing_vectors(moment, small)
    image = moment @ vectors
    residual = torch.linalg.matrix_norm(image - vectors @ (vectors.mT @ image))
    part = torch.zeros(small, small, dtype=torch.float64, device=x.device)
    for rows in torch.split(x, _ROWS):
        for y in torch.split((_widened(rows, exponent) - shift) @ vectors, reference.TILE):
            part += y.mT @ y
    told = torch.stack([moment.trace() + lost, residual, part.trace()])
    return torch.cat([told, torch.linalg.eigvalsh(part)])


def _trailing_vectors(moment: Tensor, small: int) -> Tensor:
    """Orthonormal vectors `[d, small]` that about span the eigenspace of the least eigenvalues."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(len(moment), small, generator=draw, dtype=torch.float64, device="cpu")
    vectors = sent(start, moment.device)
    shifted = moment.clone()
    shifted.diagonal().add_(_SHIFT * moment.trace())
    factor, _ = torch.linalg.cholesky_ex(shifted)
    for _ in range(_STEPS):
        vectors, _ = torch.linalg.qr(torch.cholesky_solve(vectors, factor))
    return vectors


def _widened(x: Tensor, exponent: int) -> Tensor:
    return x.to(torch.float64) * 2.0**-exponent if exponent else x.to(torch.float64)
