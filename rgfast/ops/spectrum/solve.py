"""From data to singular values with a bound on their error, by more than a Gram matrix only where needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgfast.dispatch import Impl, Op
from rgfast.ops.spectrum import reference
from rgfast.ops.spectrum.call import Again, Measure
from rgfast.ops.spectrum.impl import library, native
from rgfast.ops.spectrum.measures import (
    TINY,
    UNIT_ROUNDOFF,
    Array,
    array_on_cpu,
    entropy_error,
    largest_entropy_error,
    numpy_on_cpu,
    times_power,
)
from rgfast.ops.spectrum.refine import SMALL, LibraryStages, Stage, gram_error, refined
from rgfast.runtime.threads import no_autocast, one_thread
from rgfast.runtime.waiting import sent

__all__ = ["PATHS", "REFINE", "SVD", "Solved", "all_finite", "from_eigenvalues", "settle"]

PATHS = ("gram", "refined", "svd")
# Elements of eigenvectors, and of fp64 copies of the data on the CPU and elsewhere, refined at a time.
_VECTORS, _CHUNK, _CHUNK_ELSEWHERE = 1 << 20, 1 << 22, 1 << 25
_FIELDS = ("sigma", "error", "exponent", "rank_limit", "path")


@dataclass
class Solved:
    """Singular values of a batch and what is known about their error, on the device of the data.

    `sigma[b, m]`, fp64, descends and is in units of 2**`exponent[b]`; `error[b, m]` bounds the absolute error
    of each. `paths[b]` is `path` on the host, where it is known there.
    """

    sigma: Tensor
    error: Tensor
    exponent: Tensor
    rank_limit: Tensor
    path: Tensor
    paths: Array | None = field(default=None, kw_only=True)

    def bound(self, spectrum: str = "singular") -> Tensor:
        """Bound `[b]` on the relative error of the effective rank."""
        found: Tensor
        if spectrum == "variance":
            error = (2 * self.sigma + self.error) * self.error
            found = entropy_error(self.sigma.square(), error, self.rank_limit)
        else:
            found = entropy_error(self.sigma, self.error, self.rank_limit)
        return found

    def doubtful(self, rtol: float, tol: float | None) -> Tensor:
        """Whether an effective rank `[b]` may be off by more, or the rank at `tol` is open."""
        wanted = self.bound() > rtol
        if tol is not None:
            doubt = self.error + tol * self.error[:, :1]
            near = (self.sigma - tol * self.sigma[:, :1]).abs() <= doubt
            wanted |= (near & (doubt > 0)).any(-1)
        return wanted

    def singular_values(self) -> Tensor:
        """`sigma` in the units of the data."""
        return self._in_units(self.sigma)

    def singular_value_error(self) -> Tensor:
        """`error` in the units of the data."""
        return self._in_units(self.error)

    def _in_units(self, value: Tensor) -> Tensor:
        found: Tensor = times_power(value, self.exponent[:, None])
        return found

    def put(self, index: Tensor, other: Solved) -> None:
        """Overwrite the matrices at `index`."""
        for name in _FIELDS:
            getattr(self, name)[index] = getattr(other, name)

    def write(self, index: slice, sigma: Any, error: Any, exponent: Any, rank_limit: Any) -> None:
        """Overwrite all but the path of the matrices at `index`, by arrays or by tensors of the device."""
        for name, value in zip(_FIELDS, (sigma, error, exponent, rank_limit), strict=False):
            own = getattr(self, name)
            own[index] = torch.as_tensor(value, dtype=own.dtype, device=own.device)

    def of(self, index: Tensor | slice) -> Solved:
        """The matrices at `index`, or where it is true; those of a slice share memory."""
        return Solved(*(getattr(self, name)[index] for name in _FIELDS))

    def take(self, index: slice) -> Solved:
        """A copy of the matrices at `index`."""
        return Solved(*(getattr(self, name)[index].clone() for name in _FIELDS))


def from_eigenvalues(
    eigenvalues: Tensor, accumulated: Tensor, exponent: Tensor, rank_limit: Tensor, *, samples: int | Tensor
) -> Solved:
    """Singular values from computed eigenvalues `[b, m]`, ascending, of a moment summed over `samples` terms.

    The moment errs by at most (b + n/b) u times the trace of what was accumulated, its eigenvalues by
    max(50, m/2) u times the largest; data that were shifted in floating point err by 2 u of the same norm.
    """
    unit = UNIT_ROUNDOFF[eigenvalues.dtype]
    sigma, error = _roots(eigenvalues.double(), accumulated, rank_limit, samples, unit)
    path = torch.zeros(len(sigma), dtype=torch.int8, device=eigenvalues.device)
    return Solved(sigma, error, exponent, rank_limit, path)


@numpy_on_cpu
def _roots(eigenvalues: Any, accumulated: Any, limit: Any, samples: Any, unit: float) -> Any:
    m = eigenvalues.shape[1]
    if isinstance(eigenvalues, Tensor):
        value = eigenvalues.flip(1).clamp_min(0.0)
        epsilon = gram_error(unit, samples, accumulated, value[:, 0] if m else accumulated, m)
        sigma, root = value.sqrt(), epsilon.sqrt()
        error = epsilon[:, None] / sigma.maximum(root.clamp_min(TINY)[:, None])
        error += (2 * unit * accumulated.sqrt())[:, None]
        dead = torch.arange(m, dtype=torch.int64, device=limit.device) >= limit[:, None]
        return sigma.masked_fill(dead, 0.0), error.masked_fill(dead, 0.0)
    value = np.maximum(eigenvalues[:, ::-1], 0.0)
    epsilon = gram_error(unit, samples, accumulated, value[:, 0] if m else accumulated, m)
    sigma, root = np.sqrt(value), np.sqrt(epsilon)
    # epsilon / sigma, but no more than the root of epsilon
    error = epsilon[:, None] / np.maximum(sigma, np.maximum(root, TINY)[:, None])
    error += (2 * unit * np.sqrt(accumulated))[:, None]
    if len(limit) and int(limit.min()) < m:
        # What is known to be zero beyond the limit could only add rounding error.
        dead = np.arange(m) >= limit[:, None]
        sigma[dead] = error[dead] = 0.0
    return sigma, error


def all_finite(values: Tensor, accumulated: Tensor) -> bool:
    """Whether the data were finite, whose moments have these eigenvalues and accumulated traces.

    Raises `torch.linalg.LinAlgError` where eigenvalues off the CPU are not finite although the data are.
    """
    if accumulated.device.type == "cpu":  # there every solver raises by itself
        return bool(torch.isfinite(accumulated).all())
    data = torch.isfinite(accumulated).all()
    if bool(data & torch.isfinite(values).all()):
        return True
    if bool(data):
        library.finite(values)
    return False


def settle(
    x: Tensor,
    found: tuple[Tensor, Tensor, Tensor, Tensor],
    call: Measure,
    dtype: torch.dtype,
    tol: float | None = None,
) -> Solved | None:
    """Spectra of `x[b, n, d]` from what the op `spectrum` has found; None where data hold NaN or infinity.

    With `method="auto"` in fp64, a matrix whose effective rank may be off by more than `rtol`, or whose
    rank at `tol` is open, is solved again from the data. A GPU is read once, and once more for each way on.
    """
    values, accumulated, exponent, limit = found
    here = accumulated.is_cpu
    if here and not all_finite(values, accumulated):
        return None
    solved = from_eigenvalues(values, accumulated, exponent, limit, samples=max(x.shape[-2:]))
    solved.paths = np.zeros(len(solved.path), dtype=np.int8)
    if call.method != "auto" or dtype != torch.float64:
        return solved if here or all_finite(values, accumulated) else None
    if here and tol is None and largest_entropy_error(solved.sigma, solved.error) <= call.rtol:
        return solved
    wanted = solved.doubtful(call.rtol, tol)
    if not here:
        finite = torch.stack([torch.isfinite(each).all() for each in (accumulated, values)])
        wanted = torch.cat([finite, wanted])
    told = wanted.cpu().numpy()
    if not here:
        data, solution, *_ = told
        if not data:
            return None
        if not solution:
            library.finite(values)
        told = told[2:]
    ways = (REFINE, "library" if call.impl == "reference" else "auto"), (SVD, "library")
    for path, (op, impl) in enumerate(ways, 1):
        again = np.flatnonzero(told)
        if not len(again):
            break
        at = sent(torch.from_numpy(again), x.device)
        solved.put(at, op(impl, Again(x, at, call.centering, call.rtol)))
        solved.paths[again] = path
        if op is REFINE:
            told = solved.doubtful(call.rtol, tol).cpu().numpy()
    return solved


def _refine_natively(call: Again) -> Solved:
    """Refined spectra, some at a time, of which the compiled module makes moments, values and vectors."""
    result = _empty(call, "refined")
    m, at = call.side, call.at.numpy()
    for start in range(0, len(at), step := max(8, _VECTORS // (m * m) // 8 * 8)):
        part = slice(start, start + step)
        stages = native.RefineStages(call.x, at[part], call.centering, SMALL)
        first = Stage(*stages(np.arange(len(at[part])), 0))
        accumulated, exponent, limit = stages.info
        found = refined(
            lambda live, stage, stages=stages: Stage(*stages(live, stage)),
            max(call.x.shape[1:]),
            accumulated,
            limit,
            call.rtol,
            first,
        )
        result.write(part, *found, exponent, limit)
    return result


def _refine(call: Again) -> Solved:
    """The same by torch, in fp64 on the device of the data."""
    result = _empty(call, "refined")
    with one_thread(), no_autocast(call.device.type):
        chunk = _CHUNK if call.x.is_cpu else _CHUNK_ELSEWHERE
        for start in range(0, len(call.at), step := max(1, chunk // call.x[0].numel())):
            part = slice(start, start + step)
            y, exponent = reference.scaled(call.x[call.at[part]])
            y, accumulated = reference.centred(y, call.centering)
            limit = reference.rank_limit(y, call.centering)
            stages = LibraryStages(y if y.shape[1] >= y.shape[2] else y.mT)
            known = array_on_cpu(accumulated), array_on_cpu(limit)
            every = torch.arange(len(y), dtype=torch.int64, device=y.device)
            found = refined(stages, max(y.shape[1:]), *known, call.rtol, stages(every, 0))
            result.write(part, *found, exponent, limit)
    return result


def _from_svd(call: Again) -> Solved:
    """Singular values by torch's QR and SVD in fp64, on the CPU one matrix at a time."""
    result = _empty(call, "svd")
    m = result.sigma.shape[-1]
    column = torch.arange(m, dtype=torch.int64, device=call.device)
    step = 1 if call.x.is_cpu else max(1, _CHUNK_ELSEWHERE // max(1, call.x[:1].numel()))
    with one_thread(), no_autocast(call.device.type):
        for start in range(0, len(call.at), step):
            part = slice(start, start + step)
            y, exponent = reference.scaled(call.x[call.at[part]])
            y, accumulated = reference.centred(y, call.centering)
            limit = reference.rank_limit(y, call.centering)
            tall = y if y.shape[1] >= y.shape[2] else y.mT
            if tall.shape[1] > 3 * m // 2:
                tall = torch.linalg.qr(tall, mode="r").R
            error = (m + 50) * UNIT_ROUNDOFF[torch.float64] * accumulated.sqrt()
            known = column < limit[:, None]
            sigma, error = known * torch.linalg.svdvals(tall), known * error[:, None]
            result.write(part, sigma, error, exponent, limit)
    return result


def _empty(call: Again, path: str) -> Solved:
    b, m = len(call.at), call.side

    def values(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=call.device)

    return Solved(
        sigma=values(b, m, dtype=torch.float64),
        error=values(b, m, dtype=torch.float64),
        exponent=values(b, dtype=torch.int64),
        rank_limit=values(b, dtype=torch.int64),
        path=values(b, dtype=torch.int8).fill_(PATHS.index(path)),
    )


def _library_cost(call: Again) -> float:
    """Eigenvectors cost LAPACK about ten times what values do."""
    n, m = max(call.x.shape[1:]), call.side
    return 1e-4 + len(call.at) * (1e-4 + 10 * m**3 / 5e9 + 4 * n * m * m / 12e9)


REFINE = Op("refine", [native.refine(_refine_natively), Impl("library", _refine, cost=_library_cost)])
# torch's LAPACK whatever implementation found the eigenvalues, and recorded as such.
SVD = Op("svd", [Impl(name, _from_svd) for name in ("library", "reference")])
