"""Rank measures from a triangular factor: for streams that kept one where a second moment loses too much."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rgfast.ops.spectrum.compute import on_device
from rgfast.ops.spectrum.measures import (
    UNIT_ROUNDOFF,
    effective_rank_of,
    numerical_rank_of,
    participation_ratio_of,
    stable_rank_of,
)
from rgfast.ops.spectrum.results import RankMeasures
from rgfast.ops.spectrum.solve import PATHS, Solved
from rgfast.threads import aligned, one_thread
from rgfast.validation import as_real_tensor, check_choice

__all__ = ["rank_measures_from_factor"]


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
    count = n.cpu().numpy()
    if count.shape != (b,) or (count < 0).any():
        raise ValueError(f"n must be {b} integers that are not negative, got {n.tolist()}")
    freedom = np.maximum(count - 1 if centering == "mean" else count, 0)
    limit = np.minimum(freedom, (factor != 0).any(1).sum(1).cpu().numpy())
    unit, sigma = UNIT_ROUNDOFF[torch.float64], np.zeros((b, d))
    with one_thread():  # the values are those of a new copy that PyTorch makes for LAPACK
        factor = aligned(factor)
        rest = torch.nn.functional.pad(factor.square().sum(2), (0, 1)).flip(1).cumsum(1).flip(1).sqrt()
        size = rest[:, 0].cpu().numpy()  # rest[:, k] is the norm of the rows from k on
        # With n < d samples the rows after the n-th are mostly rounding errors of nothing. Not where columns
        # depend on those before them: a step of the QR that finds nothing new takes a row all the same.
        used = int((rest > d * unit * rest[:, :1]).sum(1).max()) if b else 0
        used = max(1, used, min(r, int(freedom.max(initial=0))))
        found = torch.linalg.svdvals(factor[:, :used]).cpu().numpy()
    sigma[:, : found.shape[1]] = found
    lost = (d + 50 + updates) * unit * size + rest[:, used].cpu().numpy()
    error = np.repeat(lost[:, None], d, axis=1)
    dead = np.arange(d) >= limit[:, None]
    sigma[dead] = error[dead] = 0.0
    path = np.full(b, PATHS.index("svd"), dtype=np.int8)
    solved = Solved(sigma, error, np.zeros(b, dtype=np.int64), limit, path)

    def shaped(value: np.ndarray[Any, Any]) -> Tensor:
        return on_device(np.where(count > 0, value, math.nan), (b,), factor.device)

    return RankMeasures(
        effective_rank=shaped(effective_rank_of(sigma)),
        effective_rank_variance=shaped(effective_rank_of(sigma, spectrum="variance")),
        participation_ratio=shaped(participation_ratio_of(sigma)),
        stable_rank=shaped(stable_rank_of(sigma)),
        numerical_rank=shaped(numerical_rank_of(sigma, tol)),
        singular_values=on_device(sigma, (b, d), factor.device),
        error_bound=shaped(solved.bound()),
        variance_error_bound=shaped(solved.bound("variance")),
        path=np.array(PATHS)[path],
        n=n,
        d=d,
        tol=float(tol),
        baseline=None,
    )
