"""Rank measures from a triangular factor: for streams that kept one where a second moment loses too much."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rgfast.ops.spectrum.measures import (
    UNIT_ROUNDOFF,
    effective_rank_of,
    numerical_rank_of,
    participation_ratio_of,
    stable_rank_of,
)
from rgfast.ops.spectrum.results import RankMeasures
from rgfast.ops.spectrum.solve import PATHS, Solved
from rgfast.runtime.threads import aligned, one_thread
from rgfast.validation import as_real_tensor, check_choice

__all__ = ["rank_measures_from_factor", "solved_factor"]


def rank_measures_from_factor(
    factor: Any,
    n: Tensor,
    *,
    centering: Literal["mean", "none"] = "mean",
    updates: int = 1,
    tol: float = 1e-7,
) -> RankMeasures:
    """Every rank measure `[b]` of the n samples whose triangular factors are given, as a `RankMeasures`.

    `factor[b, r, d]` is fp64 with factorᵀ factor = sum (x - mean)(x - mean)^T of d features (sum x x^T with
    `centering="none"`), r >= d, from `updates` successive QR decompositions; n is an integer tensor `[b]`.
    Singular values are those of the factor by LAPACK, to (d + 50 + updates) u of its Frobenius norm: each
    decomposition adds its backward error. Those beyond what n samples and the live features allow are zero.

    Raises TypeError for a factor that is not fp64, ValueError for a shape that does not fit or negative n.

    >>> import torch
    >>> from rgfast.ops.spectrum.factors import rank_measures_from_factor
    >>> r = torch.diag(torch.tensor([1.0, 1.0, 1e-9], dtype=torch.float64))[None]
    >>> float(rank_measures_from_factor(r, torch.tensor([9])).effective_rank) > 2 + 1e-8
    True
    """
    factor = as_real_tensor(factor, "factor", min_dim=3).detach()
    if factor.dtype != torch.float64:
        raise TypeError(f"factor must be float64, got {str(factor.dtype).removeprefix('torch.')}")
    b, r, d = factor.shape if factor.dim() == 3 else (-1, 0, 0)
    if b < 0 or r < d or d == 0:
        raise ValueError(f"factor must be [b, r, d] with r >= d > 0, got shape {tuple(factor.shape)}")
    check_choice(centering, "centering", ("mean", "none"))
    if n.shape != (b,) or bool((n < 0).any()):
        raise ValueError(f"n must be {b} integers that are not negative, got {n.tolist()}")
    solved = solved_factor(factor, n, centering, updates)
    sigma = solved.sigma

    def shaped(value: Tensor) -> Tensor:
        return torch.where(n > 0, value, torch.nan)

    return RankMeasures(
        effective_rank=shaped(effective_rank_of(sigma)),
        effective_rank_variance=shaped(effective_rank_of(sigma, spectrum="variance")),
        participation_ratio=shaped(participation_ratio_of(sigma)),
        stable_rank=shaped(stable_rank_of(sigma)),
        numerical_rank=shaped(numerical_rank_of(sigma, tol)),
        singular_values=sigma,
        error_bound=shaped(solved.bound()),
        variance_error_bound=shaped(solved.bound("variance")),
        path=np.array(PATHS)[solved.path.cpu().numpy()],
        n=n,
        d=d,
        tol=float(tol),
        baseline=None,
    )


def solved_factor(factor: Tensor, n: Tensor, centering: str, updates: int) -> Solved:
    """The spectra that `rank_measures_from_factor` measures, of arguments that it accepts."""
    b, r, d = factor.shape
    freedom = (n - 1 if centering == "mean" else n).clamp_min(0)
    limit = freedom.minimum((factor != 0).any(1).sum(1))
    unit, sigma = UNIT_ROUNDOFF[torch.float64], torch.zeros_like(factor[:, 0])
    with one_thread():  # the values are those of a new copy that PyTorch makes for LAPACK
        factor = aligned(factor)
        rest = torch.nn.functional.pad(factor.square().sum(2), (0, 1)).flip(1).cumsum(1).flip(1).sqrt()
        # rest[:, k] is the norm of the rows from k on. With n < d samples the rows after the n-th are mostly
        # rounding errors of nothing. Not where columns depend on those before them: a step of the QR that
        # finds nothing new takes a row all the same.
        used = int((rest > d * unit * rest[:, :1]).sum(1).maximum(freedom.clamp_max(r)).max()) if b else 0
        used = max(1, used)
        found = torch.linalg.svdvals(factor[:, :used])
    sigma[:, : found.shape[1]] = found
    error = ((d + 50 + updates) * unit * rest[:, 0] + rest[:, used])[:, None].repeat(1, d)
    dead = torch.arange(d, dtype=torch.int64, device=factor.device) >= limit[:, None]
    path = torch.full((b,), PATHS.index("svd"), dtype=torch.int8, device=factor.device)
    return Solved(
        sigma.masked_fill(dead, 0.0), error.masked_fill(dead, 0.0), torch.zeros_like(n), limit, path
    )
