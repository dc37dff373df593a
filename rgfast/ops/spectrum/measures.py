"""Rank measures of given singular values, and the error that they inherit from them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "UNIT_ROUNDOFF",
    "default_tolerance",
    "effective_rank_of",
    "entropy_error",
    "numerical_rank_of",
    "participation_ratio_of",
    "stable_rank_of",
]

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}


def effective_rank_of(sigma: Tensor, *, spectrum: str = "singular") -> Tensor:
    """exp(H(p)) of singular values `sigma[..., m]`, descending, fp64; 0 where all of them are zero.

    p is sigma normalised to sum 1 (`"singular"`, Roy & Vetterli 2007) or sigma squared (`"variance"`).
    """
    weight = _unit(sigma)
    if spectrum == "variance":
        weight = weight.square()
    total = weight.sum(-1)
    p = weight / torch.where(total > 0, total, 1.0).unsqueeze(-1)
    return torch.where(total > 0, torch.special.entr(p).sum(-1).exp(), 0.0)


def participation_ratio_of(sigma: Tensor) -> Tensor:
    """(sum sigma^2)^2 / sum sigma^4 over the last dimension; 0 where all are zero."""
    weight = _unit(sigma).square()
    bottom = weight.square().sum(-1)
    return weight.sum(-1).square() / torch.where(bottom > 0, bottom, 1.0)


def stable_rank_of(sigma: Tensor) -> Tensor:
    """sum sigma^2 / sigma_1^2 over the last dimension; 0 where all are zero."""
    return _unit(sigma).square().sum(-1)


def numerical_rank_of(sigma: Tensor, tol: float) -> Tensor:
    """#{sigma_i > tol sigma_1} over the last dimension, fp64."""
    return (_unit(sigma) > tol).sum(-1).double()


def entropy_error(weight: Tensor, error: Tensor, rank: Tensor) -> Tensor:
    """Bound `[...]` on the relative error of exp(H(weight/sum)) when each weight `[..., m]` errs by `error`.

    Fannes-Audenaert: a change of the distribution by total variation T changes its entropy over r outcomes by
    at most T ln(r-1) + h(T), h the binary entropy, and by at most ln r in any case.
    """
    total = weight.sum(-1)
    t = error.sum(-1) / torch.where(total > 0, total, 1.0)
    t = torch.where(total > 0, t, torch.where(error.sum(-1) > 0, torch.inf, 0.0))
    outcomes = rank.double()
    inner = t.clamp(max=0.5)
    change = t * (outcomes - 1).clamp_min(1).log() + torch.special.entr(inner) + torch.special.entr(1 - inner)
    most = outcomes.clamp_min(1).log()
    change = torch.where(t < 0.5, torch.minimum(change, most), most)
    evaluation = 4 * (rank + 4) * UNIT_ROUNDOFF[torch.float64]
    return torch.expm1(change) + evaluation


def _unit(sigma: Tensor) -> Tensor:
    if sigma.shape[-1] == 0:
        return sigma
    top = sigma[..., :1]
    return sigma / torch.where(top > 0, top, 1.0)


def default_tolerance(n: int, d: int, dtype: torch.dtype) -> float:
    """max(n, d) times the machine epsilon of the data, LAPACK users' habit; halves count as fp32."""
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return max(n, d) * eps
