"""What the public functions share: checks, the choice of implementation, and the measure of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from rgfast.dispatch import Impl
from rgfast.ops.spectrum import native
from rgfast.ops.spectrum.lanczos import effective_rank_estimate
from rgfast.ops.spectrum.measures import Array, default_tolerance, effective_rank_of
from rgfast.ops.spectrum.results import SpectrumInfo
from rgfast.ops.spectrum.selection import GRAM, SPECTRUM
from rgfast.ops.spectrum.solve import PATHS, Solved, settle, solve
from rgfast.ops.spectrum.top import top_eigenpair
from rgfast.threads import one_thread
from rgfast.validation import as_real_tensor, check_choice

__all__ = [
    "check_options",
    "checked",
    "describe",
    "estimated",
    "flat",
    "measure_of",
    "on_device",
    "refuse_nonfinite",
    "second_moments",
    "spectra",
    "tolerance",
    "value",
]

# Below this the eigenvalues of a Gram matrix cannot tell a small singular value from zero.
_REFINE_UNDER = 1e-7


def value(
    x: Any, measure: str, centering: str, precision: str, rtol: float, method: str, impl: str
) -> Tensor:
    """One measure of `x[..., n, d]`: `[...]`, or `[..., min(n, d)]` for `"singular_values"`."""
    if measure in ("participation_ratio", "stable_rank"):
        x, matrix = second_moments(x, centering, precision, impl)
        with one_thread():  # the sum over a whole matrix is cut by the number of threads
            trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
            if measure == "stable_rank":
                below, _ = top_eigenpair(matrix)
                above = trace
            else:
                above, below = trace.square(), matrix.square().sum((-2, -1))
        ratio: Tensor = above / torch.where(below > 0, below, 1.0)
        return ratio.reshape(x.shape[:-2])
    if method == "lanczos":
        return estimated(x, measure, centering, precision, impl)[0]
    x, rows, dtype, chosen = _chosen(x, centering, precision, rtol, method, impl)
    options: dict[str, Any] = {"centering": centering, "dtype": dtype, "method": method, "rtol": rtol}
    found = None
    if chosen.name == "native" and method == "auto" and measure != "singular_values":
        variance = measure == "effective_rank_variance"
        found = native.effective_ranks(rows, centering=centering, variance=variance, rtol=rtol)
    if isinstance(found, Tensor):
        return found if x.dim() == 3 else found.reshape(x.shape[:-2])
    solved = solve(rows, chosen, **options) if found is None else settle(rows, found, **options)
    if solved is None:
        refuse_nonfinite(x, "x")
    return measure_of(solved, measure, x.shape, x.device)


def estimated(x: Any, measure: str, centering: str, precision: str, impl: str) -> tuple[Tensor, SpectrumInfo]:
    """An effective rank of `x[..., n, d]` by stochastic Lanczos quadrature on its second moment."""
    if measure == "singular_values":
        raise ValueError("method='lanczos' estimates effective ranks, not single values: take 'auto'")
    x, matrix = second_moments(x, centering, precision, impl)
    spectrum = "variance" if measure == "effective_rank_variance" else "singular"
    found = [effective_rank_estimate(a, spectrum=spectrum) for a in matrix]
    lead, m = tuple(x.shape[:-2]), min(x.shape[-2:])
    rank = torch.tensor([e.value for e in found], dtype=torch.float64, device=x.device).reshape(lead)
    bound = torch.tensor(
        [max(e.high - e.value, e.value - e.low) / max(e.value, 1.0) for e in found],
        dtype=torch.float64,
        device=x.device,
    ).reshape(lead)
    unknown = torch.full_like(bound, torch.nan)
    return rank, SpectrumInfo(
        path=np.full(lead, "lanczos"),
        error_bound=bound if spectrum == "singular" else unknown,
        variance_error_bound=bound if spectrum == "variance" else unknown,
        singular_value_error=torch.full((*lead, m), torch.nan, dtype=torch.float64, device=x.device),
        impl=impl,
        n=x.shape[-2],
        d=x.shape[-1],
    )


def measure_of(solved: Solved, measure: str, shape: torch.Size, device: torch.device) -> Tensor:
    """A measure of a solved spectrum, in the leading shape of the data of this `shape`."""
    if measure == "singular_values":
        return on_device(solved.singular_values(), (*shape[:-2], min(shape[-2:])), device)
    spectrum = "variance" if measure == "effective_rank_variance" else "singular"
    return on_device(effective_rank_of(solved.sigma, spectrum=spectrum), shape[:-2], device)


def on_device(value: Array, shape: Sequence[int], device: torch.device) -> Tensor:
    """A result as a tensor of this shape beside the data."""
    made = torch.from_numpy(np.ascontiguousarray(value).reshape(tuple(shape)))
    return made if device.type == "cpu" else made.to(device)


def checked(value: Any) -> Tensor:
    x = as_real_tensor(value, "x", min_dim=2)
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
    if not 0 <= tol < 1:
        raise ValueError(f"tol must be at least 0 and less than 1, got {tol!r}")
    return float(tol)


def spectra(
    x: Any,
    centering: str,
    precision: str,
    rtol: float,
    method: str,
    impl: str,
    tol: float | None = None,
) -> tuple[Tensor, Solved, str]:
    x, rows, dtype, chosen = _chosen(x, centering, precision, rtol, method, impl)
    sharp = tol if tol is not None and tol < _REFINE_UNDER else None
    solved = solve(rows, chosen, centering=centering, dtype=dtype, method=method, rtol=rtol, tol=sharp)
    if solved is None:
        refuse_nonfinite(x, "x")
    return x, solved, "lapack" if method == "svd" else chosen.name


def _chosen(
    x: Any, centering: str, precision: str, rtol: float, method: str, impl: str
) -> tuple[Tensor, Tensor, torch.dtype, Impl]:
    """The data, the same as `[b, n, d]`, the dtype to compute in, and the implementation to run."""
    x = checked(x)
    dtype = check_options(centering, precision)
    check_choice(method, "method", ("auto", "gram", "svd"))
    if not (isinstance(rtol, (int, float)) and 0 < rtol < math.inf):
        raise ValueError(f"rtol must be a positive number, got {rtol!r}")
    if method == "svd" and precision == "single":
        raise ValueError("method='svd' computes in fp64: precision must be 'double', got 'single'")
    rows = flat(x)
    chosen = SPECTRUM.select(impl, x.device, rows, centering=centering, dtype=dtype, method=method)
    return x, rows, dtype, chosen


def second_moments(x: Any, centering: str, precision: str, impl: str) -> tuple[Tensor, Tensor]:
    x = checked(x)
    dtype = check_options(centering, precision)
    rows = flat(x)
    chosen = GRAM.select(impl, x.device, rows, centering=centering, dtype=dtype)
    matrix, accumulated, _, _ = chosen.run(rows, centering=centering, dtype=dtype)
    if not bool(torch.isfinite(accumulated).all()):
        refuse_nonfinite(x, "x")
    wide: Tensor = matrix.double()
    return x, wide


def describe(x: Tensor, solved: Solved, impl: str) -> SpectrumInfo:
    lead = x.shape[:-2]
    return SpectrumInfo(
        path=np.array(PATHS)[solved.path].reshape(tuple(lead)),
        error_bound=on_device(solved.bound(), lead, x.device),
        variance_error_bound=on_device(solved.bound("variance"), lead, x.device),
        singular_value_error=on_device(solved.singular_value_error(), (*lead, min(x.shape[-2:])), x.device),
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
