"""Rank measures of given singular values, and the error that they inherit from them.

These work on small fp64 arrays `[..., m]`, where numpy costs a fraction of what tensor operators do.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

__all__ = [
    "TINY",
    "UNIT_ROUNDOFF",
    "Array",
    "default_tolerance",
    "effective_rank_of",
    "entropy_error",
    "largest_entropy_error",
    "numerical_rank_of",
    "participation_ratio_of",
    "stable_rank_of",
]

Array = np.ndarray[Any, np.dtype[Any]]

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
_U = UNIT_ROUNDOFF[torch.float64]
TINY = float(np.finfo(np.float64).tiny)


def effective_rank_of(sigma: Array, *, spectrum: str = "singular") -> Array:
    """exp(H(p)) of singular values `sigma[..., m]`, descending; 0 where all of them are zero.

    p is sigma normalised to sum 1 (`"singular"`, Roy & Vetterli 2007) or sigma squared (`"variance"`).
    """
    weight = sigma if spectrum == "singular" else np.square(_unit(sigma))
    total = weight.sum(-1, keepdims=True)
    p = weight / np.maximum(total, TINY)
    rank: Array = np.exp(-(p * np.log(np.maximum(p, TINY))).sum(-1))
    return np.where(total[..., 0] > 0, rank, 0.0)


def participation_ratio_of(sigma: Array) -> Array:
    """(sum sigma^2)^2 / sum sigma^4 over the last dimension; 0 where all are zero."""
    weight = np.square(_unit(sigma))
    ratio: Array = np.square(weight.sum(-1)) / np.maximum(np.square(weight).sum(-1), TINY)
    return ratio


def stable_rank_of(sigma: Array) -> Array:
    """sum sigma^2 / sigma_1^2 over the last dimension; 0 where all are zero."""
    rank: Array = np.square(_unit(sigma)).sum(-1)
    return rank


def numerical_rank_of(sigma: Array, tol: float) -> Array:
    """#{sigma_i > tol sigma_1} over the last dimension, as fp64."""
    rank: Array = (_unit(sigma) > tol).sum(-1).astype(np.float64)
    return rank


def entropy_error(weight: Array, error: Array, rank: Array) -> Array:
    """Bound `[...]` on the relative error of exp(H(weight/sum)) when each weight `[..., m]` errs by `error`.

    Fannes-Audenaert: a change of the distribution by total variation T changes its entropy over r outcomes by
    at most T ln(r-1) + h(T), h the binary entropy, and by at most ln r in any case.
    """
    t = _variation(weight, error)
    inner = np.minimum(t, 0.5)
    binary = -inner * np.log(np.maximum(inner, TINY)) - (1 - inner) * np.log1p(-inner)
    most = np.log(np.maximum(rank, 1))
    change = np.where(t < 0.5, np.minimum(t * np.log(np.maximum(rank - 1, 1)) + binary, most), most)
    bound: Array = np.expm1(change) + 4 * (rank + 4) * _U
    return bound


def largest_entropy_error(weight: Array, error: Array) -> float:
    """A number that no `entropy_error` of the batch `[b, m]` exceeds, at a fraction of their cost."""
    if weight.size == 0:
        return 0.0
    t, m = float(_variation(weight, error).max()), int(weight.shape[-1])
    if not 0 < t < 0.5:
        change = 0.0 if t == 0 else math.log(m)
    else:
        change = t * math.log(max(m - 1, 1)) - t * math.log(t) - (1 - t) * math.log1p(-t)
    return math.expm1(change) + 4 * (m + 4) * _U


def default_tolerance(n: int, d: int, dtype: torch.dtype) -> float:
    """max(n, d) times the machine epsilon of the data, LAPACK users' habit; halves count as fp32."""
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return max(n, d) * eps


def _variation(weight: Array, error: Array) -> Array:
    total, spread = weight.sum(-1), error.sum(-1)
    variation: Array = np.minimum(spread / np.maximum(total, TINY), 1.0)
    return variation


def _unit(sigma: Array) -> Array:
    return sigma / np.maximum(sigma[..., :1], TINY) if sigma.shape[-1] else sigma
