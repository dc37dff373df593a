"""From data to singular values with a bound on their error, by more than a Gram matrix only where needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rgfast.dispatch import Impl
from rgfast.ops.spectrum import reference
from rgfast.ops.spectrum.measures import UNIT_ROUNDOFF, entropy_error
from rgfast.ops.spectrum.refine import gram_error, refined
from rgfast.threads import one_thread

__all__ = ["PATHS", "Solved", "from_eigenvalues", "solve"]

PATHS = ("gram", "refined", "svd")


@dataclass
class Solved:
    """Singular values of a batch and what is known about their error; all fp64 but `path` and `rank_limit`.

    `sigma[b, m]` descends and is in units of 2**`exponent[b]`; `error[b, m]` bounds the absolute error of
    each.
    """

    sigma: Tensor
    error: Tensor
    exponent: Tensor
    rank_limit: Tensor
    path: Tensor

    def bound(self, spectrum: str = "singular") -> Tensor:
        """Bound `[b]` on the relative error of the effective rank."""
        if spectrum == "variance":
            error = (2 * self.sigma + self.error) * self.error
            return entropy_error(self.sigma.square(), error, self.rank_limit)
        return entropy_error(self.sigma, self.error, self.rank_limit)

    def singular_values(self) -> Tensor:
        """`sigma` in the units of the data."""
        return self._in_units(self.sigma)

    def singular_value_error(self) -> Tensor:
        """`error` in the units of the data."""
        return self._in_units(self.error)

    def undecided(self, tol: float) -> Tensor:
        """Where `[b]` the errors leave open whether some sigma_i > tol sigma_1."""
        doubt = self.error + tol * self.error[:, :1]
        return ((self.sigma - tol * self.sigma[:, :1]).abs() <= doubt).logical_and(doubt > 0).any(-1)

    def _in_units(self, value: Tensor) -> Tensor:
        half = self.exponent // 2  # 2**exponent itself may not be a normal number
        low = ((1023 + half) << 52).view(torch.float64)
        high = ((1023 + self.exponent - half) << 52).view(torch.float64)
        return value * low[:, None] * high[:, None]

    def put(self, index: Tensor, other: Solved) -> None:
        """Overwrite the matrices at `index`."""
        for name in ("sigma", "error", "exponent", "rank_limit", "path"):
            getattr(self, name)[index] = getattr(other, name)


def from_eigenvalues(
    eigenvalues: Tensor, accumulated: Tensor, exponent: Tensor, rank_limit: Tensor, *, samples: int | Tensor
) -> Solved:
    """Singular values from computed eigenvalues `[b, m]`, ascending, of a moment summed over `samples` terms.

    The moment errs by at most (b + n/b) u times the trace of what was accumulated, its eigenvalues by
    max(50, m/2) u times the largest; data that were shifted in floating point err by 2 u of the same norm.
    """
    unit = UNIT_ROUNDOFF[eigenvalues.dtype]
    m = eigenvalues.shape[-1]
    value = eigenvalues.double().flip(-1)
    # A moment that is not known to be zero beyond the limit could only add rounding error there.
    live = torch.arange(m, device=value.device) < rank_limit[:, None]
    value = torch.where(live, value.clamp_min(0), 0.0)
    terms = torch.as_tensor(samples, device=value.device).double()
    epsilon = gram_error(unit, terms, accumulated, value[:, :1].sum(-1), m)
    sigma = value.sqrt()
    error = torch.minimum(epsilon[:, None] / sigma, epsilon.sqrt()[:, None])  # x/0 is inf: the root is taken
    error = error.nan_to_num(0.0) + 2 * unit * accumulated.sqrt()[:, None]
    error = torch.where(live, error, 0.0)
    path = torch.zeros(value.shape[0], dtype=torch.int8, device=value.device)
    return Solved(sigma, error, exponent, rank_limit, path)


def solve(
    x: Tensor,
    chosen: Impl,
    *,
    centering: str,
    dtype: torch.dtype,
    method: str,
    rtol: float,
    tol: float | None = None,
) -> Solved | None:
    """Spectra of `x[b, n, d]`; None where the data hold NaN or infinity.

    With `method="auto"` in fp64, a matrix whose effective rank may be off by more than `rtol`, or whose
    rank at `tol` is open, is solved again from the data.
    """
    if method == "svd":
        return _from_svd(x, centering) if bool(torch.isfinite(x).all()) else None
    values, accumulated, exponent, limit = chosen.run(x, centering=centering, dtype=dtype)
    if not bool(torch.isfinite(accumulated).all()):
        return None
    solved = from_eigenvalues(values, accumulated, exponent, limit, samples=max(x.shape[-2:]))
    if method == "auto" and dtype == torch.float64:
        wanted = solved.bound() > rtol
        if tol is not None:
            wanted |= solved.undecided(tol)
        again = wanted.nonzero()[:, 0]
        if len(again):
            solved.put(again, _from_refinement(x[again], centering, rtol))
            wanted = solved.bound() > rtol
            if tol is not None:
                wanted |= solved.undecided(tol)
            again = wanted.nonzero()[:, 0]
        if len(again):
            solved.put(again, _from_svd(x[again], centering))
    return solved


def _from_refinement(x: Tensor, centering: str, rtol: float) -> Solved:
    """Spectra of `x[b, n, d]` with small singular values recovered, one matrix at a time."""
    result = _empty(x, "refined")
    with one_thread():
        for i in range(len(x)):
            tall, accumulated = _tall(x, i, centering, result)
            result.sigma[i], result.error[i] = refined(tall, accumulated, result.rank_limit[i], rtol)
    return result


def _from_svd(x: Tensor, centering: str) -> Solved:
    """Singular values of `x[b, n, d]` by QR and LAPACK's SVD in fp64, one matrix at a time."""
    result = _empty(x, "svd")
    m = result.sigma.shape[-1]
    with one_thread():
        for i in range(len(x)):
            tall, accumulated = _tall(x, i, centering, result)
            if len(tall) > 3 * m // 2:
                tall = torch.linalg.qr(tall, mode="r").R
            live = torch.arange(m, device=x.device) < result.rank_limit[i]
            backward = (m + 50) * UNIT_ROUNDOFF[torch.float64] * accumulated.sqrt()
            result.sigma[i] = torch.where(live, torch.linalg.svdvals(tall), 0.0)
            result.error[i] = torch.where(live, backward, 0.0)
    return result


def _empty(x: Tensor, path: str) -> Solved:
    b, m = len(x), min(x.shape[-2:])
    return Solved(
        sigma=torch.empty((b, m), dtype=torch.float64, device=x.device),
        error=torch.empty((b, m), dtype=torch.float64, device=x.device),
        exponent=torch.empty(b, dtype=torch.int64, device=x.device),
        rank_limit=torch.empty(b, dtype=torch.int64, device=x.device),
        path=torch.full((b,), PATHS.index(path), dtype=torch.int8, device=x.device),
    )


def _tall(x: Tensor, i: int, centering: str, result: Solved) -> tuple[Tensor, Tensor]:
    """Matrix i scaled, centred, fp64, with the longer side first, and its accumulated trace."""
    one = slice(i, i + 1)
    y, result.exponent[one] = reference.scaled(x[one])
    y, accumulated = reference.centred(y, centering)
    result.rank_limit[one] = reference.rank_limit(y, centering)
    return (y[0] if y.shape[1] >= y.shape[2] else y[0].mT), accumulated[0]
