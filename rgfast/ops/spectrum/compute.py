"""What the public functions share: checks, the choice of implementation, and the measure of a batch."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from rgfast.ops.spectrum.call import Again, Measure, Rows, Symmetric
from rgfast.ops.spectrum.impl import library
from rgfast.ops.spectrum.lanczos import effective_rank_estimates
from rgfast.ops.spectrum.measures import default_tolerance, effective_rank_of
from rgfast.ops.spectrum.results import SpectrumInfo
from rgfast.ops.spectrum.selection import EIGVALSH, GRAM, RANKS, SPECTRUM
from rgfast.ops.spectrum.solve import PATHS, SVD, Solved, settle
from rgfast.ops.spectrum.top import top_eigenpair
from rgfast.runtime.threads import one_thread
from rgfast.runtime.waiting import sent, waits_for
from rgfast.validation import as_real_tensor, check_choice, check_number, check_readable

__all__ = [
    "check_options",
    "checked",
    "describe",
    "eigenvalues",
    "estimated",
    "flat",
    "measure_of",
    "refuse_nonfinite",
    "second_moments",
    "spectra",
    "tolerance",
    "value",
]

# Below this the eigenvalues of a Gram matrix cannot tell a small singular value from zero.
_REFINE_UNDER = 1e-7


def value(call: Measure) -> Tensor:
    """One measure of `x[..., n, d]`: `[...]`, or `[..., min(n, d)]` for `"singular_values"`."""
    measure = call.measure
    if measure in ("participation_ratio", "stable_rank"):
        x, matrix = second_moments(call)
        with one_thread():  # the sum over a whole matrix is cut by the number of threads
            trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
            if measure == "stable_rank":
                below, _ = top_eigenpair(matrix)
                above = trace
            else:
                above, below = trace.square(), matrix.square().sum((-2, -1))
        ratio: Tensor = above / torch.where(below > 0, below, 1.0)
        return ratio.reshape(x.shape[:-2])
    if call.method == "lanczos":
        return estimated(call)[0]
    x, dtype = _checked_rows(call)
    if call.method == "auto" and measure != "singular_values":
        variance = measure == "effective_rank_variance"
        ranks = Rows(flat(x), call.centering, dtype, variance=variance, rtol=call.rtol)
        fused = RANKS.find(call.impl, ranks)
        if fused is not None:
            found = RANKS.run(fused, ranks, named=call.impl != "auto")
            if isinstance(found, Tensor):
                return found if x.dim() == 3 else found.reshape(x.shape[:-2])
            return measure_of(_finite(settle(ranks.x, found, call, dtype), x), measure, x.shape)
    return measure_of(_solved(x, call, dtype)[0], measure, x.shape)


def eigenvalues(a: Any, impl: str) -> Tensor:
    """Those of symmetric `a[..., d, d]`: what `rgfast.eigvalsh` returns, without a gradient."""
    a = as_real_tensor(a, "a", min_dim=2)
    check_readable(a, "a")
    if a.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"a must be float64 or float32, got {str(a.dtype).removeprefix('torch.')}")
    *_, rows, columns = a.shape
    if rows != columns:
        raise ValueError(f"a must hold square matrices, got shape {tuple(a.shape)}")
    call = Symmetric(a.detach())
    chosen = EIGVALSH.select(impl, call)
    if a.numel() == 0:
        return torch.empty(a.shape[:-1], dtype=a.dtype, device=a.device)
    try:
        values: Tensor = EIGVALSH.run(chosen, call, named=impl != "auto")
        if values.device.type != "cpu":
            library.finite(values)
    except RuntimeError:  # LinAlgError is one; its message names the matrix
        if bool(torch.isfinite(a).all()):
            raise
        refuse_nonfinite(a, "a")
    return values


def estimated(call: Measure) -> tuple[Tensor, SpectrumInfo]:
    """An effective rank of `x[..., n, d]` by stochastic Lanczos quadrature on its second moment."""
    if call.measure == "singular_values":
        raise ValueError("method='lanczos' estimates effective ranks, not single values: take 'auto'")
    x, matrix = second_moments(call, look=not waits_for(checked(call.x).device))
    spectrum = "variance" if call.measure == "effective_rank_variance" else "singular"
    estimates = effective_rank_estimates(matrix, spectrum)
    found = [each for each in estimates if each is not None]
    if len(found) < len(estimates):
        refuse_nonfinite(x, "x")
    lead, m = tuple(x.shape[:-2]), min(x.shape[-2:])
    each = [(e.value, max(e.high - e.value, e.value - e.low) / max(e.value, 1.0)) for e in found]
    numbers = np.array(each).reshape(-1, 2).T.copy()
    rank, bound = sent(torch.from_numpy(numbers), x.device).reshape(2, *lead)
    unknown = torch.full_like(bound, torch.nan)
    return rank, SpectrumInfo(
        path=np.full(lead, "lanczos"),
        error_bound=bound if spectrum == "singular" else unknown,
        variance_error_bound=bound if spectrum == "variance" else unknown,
        singular_value_error=torch.full((*lead, m), torch.nan, dtype=torch.float64, device=x.device),
        impl=call.impl,
        n=x.shape[-2],
        d=x.shape[-1],
    )


def measure_of(solved: Solved, measure: str, shape: torch.Size) -> Tensor:
    """A measure of a solved spectrum, in the leading shape of the data of this `shape`."""
    if measure == "singular_values":
        return solved.singular_values().reshape(*shape[:-2], min(shape[-2:]))
    spectrum = "variance" if measure == "effective_rank_variance" else "singular"
    value: Tensor = effective_rank_of(solved.sigma, spectrum=spectrum)
    return value.reshape(shape[:-2])


def checked(value: Any) -> Tensor:
    x = as_real_tensor(value, "x", min_dim=2)
    check_readable(x, "x")
    if x.shape[-1] == 0 or x.shape[-2] == 0:
        raise ValueError(f"x must have at least one sample and one feature, got shape {tuple(x.shape)}")
    return x


def flat(x: Tensor) -> Tensor:
    if x.dim() == 3 and not x.requires_grad:
        return x
    return x.detach().reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def check_options(centering: str, precision: str) -> torch.dtype:
    check_choice(centering, "centering", ("mean", "none"))
    check_choice(precision, "precision", ("double", "single"))
    return torch.float64 if precision == "double" else torch.float32


def tolerance(tol: float | None, x: Tensor) -> float:
    if tol is None:
        return default_tolerance(x.shape[-2], x.shape[-1], x.dtype)
    check_number(tol, "tol")
    if not 0 <= tol < 1:
        raise ValueError(f"tol must be at least 0 and less than 1, got {tol!r}")
    return float(tol)


def spectra(call: Measure, tol: float | None = None) -> tuple[Tensor, Solved, str]:
    """The data, their spectra, and the implementation that ran."""
    x, dtype = _checked_rows(call)
    return x, *_solved(x, call, dtype, tol if tol is not None and tol < _REFINE_UNDER else None)


def _solved(x: Tensor, call: Measure, dtype: torch.dtype, tol: float | None = None) -> tuple[Solved, str]:
    rows = flat(x)
    if call.method == "svd":
        whole = torch.arange(len(rows), dtype=torch.int64, device=rows.device)
        dense = Again(rows, whole, call.centering, call.rtol)
        chosen = SVD.select(call.impl, dense)
        finite = bool(torch.isfinite(rows).all())
        solved = _finite(SVD.run(chosen, dense, named=True) if finite else None, x)
        solved.paths = np.full(len(rows), PATHS.index("svd"))
        return solved, "lapack"
    moments = Rows(rows, call.centering, dtype)
    chosen = SPECTRUM.select(call.impl, moments)
    found = SPECTRUM.run(chosen, moments, named=call.impl != "auto")
    return _finite(settle(rows, found, call, dtype, tol), x), chosen.name


def _finite(solved: Solved | None, x: Tensor) -> Solved:
    if solved is None:
        refuse_nonfinite(x, "x")
    return solved


def _checked_rows(call: Measure) -> tuple[Tensor, torch.dtype]:
    """The data and the dtype to compute in."""
    x = checked(call.x)
    dtype = check_options(call.centering, call.precision)
    estimates = ("lanczos",) if call.measure.startswith("effective_rank") else ()  # made elsewhere
    check_choice(call.method, "method", ("auto", "gram", "svd", *estimates))
    check_number(call.rtol, "rtol")
    if not 0 < call.rtol < math.inf:
        raise ValueError(f"rtol must be a positive number, got {call.rtol!r}")
    if call.method == "svd" and call.precision == "single":
        raise ValueError("method='svd' computes in fp64: precision must be 'double', got 'single'")
    return x, dtype


def second_moments(call: Measure, *, look: bool = True) -> tuple[Tensor, Tensor]:
    """The data and their moments; `look` says whether these are made sure to be finite."""
    x = checked(call.x)
    dtype = check_options(call.centering, call.precision)
    matrix, accumulated, _, _ = GRAM(call.impl, Rows(flat(x), call.centering, dtype))
    if look and not bool(torch.isfinite(accumulated).all()):
        refuse_nonfinite(x, "x")
    wide: Tensor = matrix.double()
    return x, wide


def describe(x: Tensor, solved: Solved, impl: str) -> SpectrumInfo:
    lead = x.shape[:-2]
    assert solved.paths is not None
    return SpectrumInfo(
        path=np.array(PATHS)[solved.paths].reshape(tuple(lead)),
        error_bound=solved.bound().reshape(lead),
        variance_error_bound=solved.bound("variance").reshape(lead),
        singular_value_error=solved.singular_value_error().reshape(*lead, min(x.shape[-2:])),
        impl=impl,
        n=x.shape[-2],
        d=x.shape[-1],
    )


def refuse_nonfinite(x: Tensor, name: str) -> NoReturn:
    bad = (~torch.isfinite(x)).sum((-2, -1))
    index = tuple(int(i) for i in (bad > 0).nonzero()[0])
    where = f"matrix {index if len(index) > 1 else index[0]} of the batch" if index else "the matrix"
    others = int((bad > 0).sum()) - 1
    rest = (
        f" ({others} more matrices hold some too)"
        if others > 1
        else " (one more holds some too)"
        if others
        else ""
    )
    raise ValueError(f"{name} must be finite, got {int(bad[index])} NaN or infinite values in {where}{rest}")
