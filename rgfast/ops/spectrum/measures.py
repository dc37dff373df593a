"""Rank measures of given singular values, and the error that they inherit from them.

They take small fp64 arrays or tensors `[..., m]` and give what they take. On the CPU NumPy computes both:
it costs a fraction of what tensor operators do, and its order of summation is that of all results there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "TINY",
    "UNIT_ROUNDOFF",
    "Array",
    "array_on_cpu",
    "at_least",
    "default_tolerance",
    "effective_rank_of",
    "entropy_error",
    "largest_entropy_error",
    "library_of",
    "numerical_rank_of",
    "numpy_on_cpu",
    "participation_ratio_of",
    "stable_rank_of",
    "times_power",
]

Array = np.ndarray[Any, np.dtype[Any]]

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
_U = UNIT_ROUNDOFF[torch.float64]
TINY = float(np.finfo(np.float64).tiny)

# Results of numpy are a kind of array, those of torch tensors.
_Call = TypeVar("_Call", bound=Callable[..., Any])


def numpy_on_cpu(function: _Call) -> _Call:
    """`function` of arrays or tensors, called with arrays that share the memory of tensors on the CPU."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if not any(isinstance(arg, Tensor) for arg in args) or _elsewhere(args):
            return function(*args, **options)
        found = function(*(arg.numpy() if isinstance(arg, Tensor) else arg for arg in args), **options)
        if isinstance(found, tuple):
            return tuple(map(torch.from_numpy, found))
        return torch.from_numpy(np.asarray(found))

    return call  # type: ignore[return-value]  # it has the signature of what it wraps


def array_on_cpu(x: Tensor) -> Any:
    """A tensor on the CPU as an array that shares its memory, any other as it is."""
    return x.numpy() if x.is_cpu else x


def _elsewhere(args: tuple[Any, ...]) -> bool:
    """Whether a tensor is on another device than the CPU."""
    return any(isinstance(arg, Tensor) and not arg.is_cpu for arg in args)


@numpy_on_cpu
def effective_rank_of(sigma: Any, *, spectrum: str = "singular") -> Any:
    """exp(H(p)) of singular values `sigma[..., m]`, descending; 0 where all of them are zero.

    p is sigma normalised to sum 1 (`"singular"`, Roy & Vetterli 2007) or sigma squared (`"variance"`).
    """
    xp = library_of(sigma)
    weight = sigma if spectrum == "singular" else xp.square(_unit(sigma))
    total = weight.sum(-1)[..., None]
    p = weight / at_least(total, TINY)
    if isinstance(p, Tensor):  # in few launches
        rank = torch.special.entr(p).sum(-1).exp()
    else:
        rank = np.exp(-(p * np.log(np.maximum(p, TINY))).sum(-1))
    return xp.where(total[..., 0] > 0, rank, 0.0)


@numpy_on_cpu
def participation_ratio_of(sigma: Any) -> Any:
    """(sum sigma^2)^2 / sum sigma^4 over the last dimension; 0 where all are zero."""
    xp = library_of(sigma)
    weight = xp.square(_unit(sigma))
    return xp.square(weight.sum(-1)) / at_least(xp.square(weight).sum(-1), TINY)


@numpy_on_cpu
def stable_rank_of(sigma: Any) -> Any:
    """sum sigma^2 / sigma_1^2 over the last dimension; 0 where all are zero."""
    return library_of(sigma).square(_unit(sigma)).sum(-1)


@numpy_on_cpu
def numerical_rank_of(sigma: Any, tol: float) -> Any:
    """#{sigma_i > tol sigma_1} over the last dimension, as fp64."""
    return _double((_unit(sigma) > tol).sum(-1))


@numpy_on_cpu
def entropy_error(weight: Any, error: Any, rank: Any) -> Any:
    """Bound `[...]` on the relative error of exp(H(weight/sum)) when each weight `[..., m]` errs by `error`.

    Fannes-Audenaert: a change of the distribution by total variation T changes its entropy over r outcomes by
    at most T ln(r-1) + h(T), h the binary entropy, and by at most ln r in any case.
    """
    xp, rank = library_of(weight), _double(rank)
    t = _variation(weight, error)
    inner = _at_most(t, 0.5)
    binary = -inner * xp.log(at_least(inner, TINY)) - (1 - inner) * xp.log1p(-inner)
    most = xp.log(at_least(rank, 1))
    change = xp.where(t < 0.5, xp.minimum(t * xp.log(at_least(rank - 1, 1)) + binary, most), most)
    return xp.expm1(change) + 4 * (rank + 4) * _U


@numpy_on_cpu
def times_power(x: Any, exponent: Any) -> Any:
    """`x · 2^exponent`, infinite or zero where that is no fp64 number."""
    if isinstance(x, np.ndarray):
        return np.ldexp(x, exponent)
    half = exponent // 2  # 2^exponent itself may be none
    return x * torch.exp2(half.double()) * torch.exp2((exponent - half).double())


def largest_entropy_error(weight: Any, error: Any) -> float:
    """A number that no `entropy_error` of the batch `[b, m]` exceeds, at a fraction of their cost."""
    if 0 in weight.shape:
        return 0.0
    t, m = float(_variation_of(weight, error).max()), int(weight.shape[-1])
    if not 0 < t < 0.5:
        change = 0.0 if t == 0 else math.log(m)
    else:
        change = t * math.log(max(m - 1, 1)) - t * math.log(t) - (1 - t) * math.log1p(-t)
    return math.expm1(change) + 4 * (m + 4) * _U


def default_tolerance(n: int, d: int, dtype: torch.dtype) -> float:
    """max(n, d) times the machine epsilon of the data, LAPACK users' habit; halves count as fp32."""
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return max(n, d) * eps


def _variation(weight: Any, error: Any) -> Any:
    total, spread = weight.sum(-1), error.sum(-1)
    return _at_most(spread / at_least(total, TINY), 1.0)


_variation_of = numpy_on_cpu(_variation)


def _unit(sigma: Any) -> Any:
    return sigma / at_least(sigma[..., :1], TINY) if sigma.shape[-1] else sigma


def library_of(x: Any) -> Any:
    """NumPy or torch, whose functions x takes."""
    return torch if isinstance(x, Tensor) else np


def at_least(x: Any, low: float) -> Any:
    """x, or `low` where it is less."""
    return x.clamp_min(low) if isinstance(x, Tensor) else np.maximum(x, low)


def _at_most(x: Any, high: float) -> Any:
    return x.clamp_max(high) if isinstance(x, Tensor) else np.minimum(x, high)


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) else np.float64(x)
