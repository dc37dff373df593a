"""Rank measures from second moments: for streams, whose data are gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rgfast.ops.spectrum.baseline import isotropic_baseline
from rgfast.ops.spectrum.call import Both, Symmetric, Values
from rgfast.ops.spectrum.impl import library
from rgfast.ops.spectrum.measures import (
    effective_rank_of,
    numerical_rank_of,
    numpy_on_cpu,
    participation_ratio_of,
    stable_rank_of,
)
from rgfast.ops.spectrum.ranks import solved
from rgfast.ops.spectrum.results import RankMeasures
from rgfast.ops.spectrum.selection import BOTH, EIGVALSH
from rgfast.ops.spectrum.solve import PATHS, Solved, from_eigenvalues
from rgfast.runtime.waiting import read, sent, waits_for
from rgfast.validation import as_floats, as_real_tensor, as_tensor, check_choice, check_number

__all__ = [
    "centered_values",
    "rank_measures_from_moment",
    "sample_values",
    "singular_values_from_moment",
    "solved_moment",
    "solved_values",
]

Centering = Literal["mean", "none"]

# A moment cannot tell smaller singular values from its own rounding error.
_DEFAULT_TOL = 1e-7


def singular_values_from_moment(
    scatter: Any,
    n: int | Tensor,
    *,
    centering: Centering = "mean",
    accumulated: Any = None,
    impl: str = "auto",
) -> Tensor:
    """Singular values `[..., d]` of the n samples whose second moment is given, fp64, descending.

    `scatter[..., d, d]` is sum (x - mean)(x - mean)^T in fp64, not divided by n (sum x x^T with
    `centering="none"`); n is an integer or an integer tensor `[...]`. Values beyond the largest rank that n
    samples can have (n - 1 if centred), and those of features without variance, are zero. See
    `rank_measures_from_moment` for `accumulated` and the errors.

    >>> import rgfast, torch
    >>> rgfast.singular_values_from_moment(torch.diag(torch.tensor([9.0, 4.0], dtype=torch.float64)), 8)
    tensor([3., 2.], dtype=torch.float64)
    """
    scatter, solved, _ = _measured(scatter, n, centering, accumulated, impl)
    return solved.singular_values().reshape(scatter.shape[:-1])


def rank_measures_from_moment(
    scatter: Any,
    n: int | Tensor,
    *,
    centering: Centering = "mean",
    accumulated: Any = None,
    tol: float = _DEFAULT_TOL,
    impl: str = "auto",
) -> RankMeasures:
    """Every rank measure `[...]` of the n samples whose second moment is given, as a `RankMeasures`.

    `scatter[..., d, d]` is sum (x - mean)(x - mean)^T in fp64, not divided by n (sum x x^T with
    `centering="none"`); n is an integer or an integer tensor `[...]`. Nothing can be refined without the
    data: the bound on the error of the effective ranks is in the result, evaluated for this spectrum.
    `accumulated` `[...]` is the trace of what was really summed, sum |x - shift|^2, where that is larger
    than the trace of `scatter`. Where n is 0 every measure is NaN; where it is 1 (centred), or all variance
    is 0, it is 0. A moment on a GPU stays there, its eigenvalues as in `eigvalsh`, and the host reads once.

    Raises TypeError for a `scatter` that is not fp64 or an n that is not integer; ValueError for matrices
    that are not square, negative n, a shape that does not fit, or NaN or infinity.

    >>> import rgfast, torch
    >>> m = rgfast.rank_measures_from_moment(torch.eye(4, dtype=torch.float64), 100)
    >>> float(m.participation_ratio), bool(m.error_bound < 1e-6)
    (4.0, True)
    """
    check_number(tol, "tol")
    if not 0 <= tol < 1:
        raise ValueError(f"tol must be at least 0 and less than 1, got {tol!r}")
    scatter, solved, count = _measured(scatter, n, centering, accumulated, impl)
    lead, d = scatter.shape[:-2], scatter.shape[-1]
    known = sent(count > 0, scatter.device)

    def shaped(value: Tensor) -> Tensor:
        return torch.where(known, value, torch.nan).reshape(lead)

    same = int(count[0]) if len(count) and bool((count == count[0]).all()) else 0
    return RankMeasures(
        effective_rank=shaped(effective_rank_of(solved.sigma)),
        effective_rank_variance=shaped(effective_rank_of(solved.sigma, spectrum="variance")),
        participation_ratio=shaped(participation_ratio_of(solved.sigma)),
        stable_rank=shaped(stable_rank_of(solved.sigma)),
        numerical_rank=shaped(numerical_rank_of(solved.sigma, tol)),
        singular_values=solved.singular_values().reshape(*lead, d),
        error_bound=shaped(solved.bound()),
        variance_error_bound=shaped(solved.bound("variance")),
        path=np.array(PATHS)[np.zeros(tuple(lead), dtype=np.int8)],
        n=n if isinstance(n, int) else sent(count, scatter.device).reshape(lead),
        d=d,
        tol=float(tol),
        baseline=None if same == 0 else isotropic_baseline(same, d, centering=centering),
    )


def solved_moment(
    scatter: Tensor, n: Tensor, centering: Centering, accumulated: Tensor | None = None
) -> Solved:
    """The spectra `[b]` that `rank_measures_from_moment` measures, of `scatter[b, d, d]` and n `[b]`.

    Where reading waits for a device, the eigenvalues alone are looked at, once.
    """
    scatter, count = _checked(scatter, n, centering, values=not waits_for(scatter.device))
    return _solved(scatter, count, centering, accumulated, "auto")


def centered_values(a: Tensor, n: Tensor, accumulated: Tensor, mean: Tensor | None) -> Values:
    """Of centered moments `a[b, d, d]`, whose lower triangles are read, and if their means are given of the
    raw ones, a + mean mean^T. `mean[b, d]` is that of n `[b]` samples times the root of n."""
    variance = a.diagonal(dim1=-2, dim2=-1)
    if mean is None:
        return Values(EIGVALSH("auto", Symmetric(a)), variance, accumulated, n)
    values = BOTH("auto", Both(a, mean)).flatten(0, 1)
    variance = torch.cat([variance, torch.addcmul(variance, mean, mean)])
    return Values(values, variance, accumulated, n)


def sample_values(products: Tensor, variances: Tensor, n: Tensor, accumulated: Tensor) -> Values:
    """Of products of centered samples, not more than features, and if there are two of raw ones,
    `products[kinds, b, m, m]` of the same n `[b]` of them, with the sums of squares of every feature
    `variances[kinds, b, d]`."""
    values = EIGVALSH("auto", Symmetric(products.flatten(0, 1)))
    return Values(values, variances.flatten(0, 1), accumulated, n, by_features=True)


def solved_values(call: Values) -> Solved:
    """`solved_moment` of centered moments and, if there are two kinds, of the raw ones below them."""
    if call.device.type != "cpu":
        library.finite(call.values)
    return solved(call)


def _measured(
    scatter: Any, n: int | Tensor, centering: str, accumulated: Any, impl: str
) -> tuple[Tensor, Solved, Tensor]:
    """Checked moments, their spectra, and counts ``[b]`` on the host. A device is read once."""
    there = waits_for(scatter.device) if isinstance(scatter, Tensor) else False
    scatter, count = _checked(scatter, n, centering, values=not there)
    if not there:
        return scatter, _solved(scatter, count, centering, accumulated, impl), count
    counts = count

    def look(values: Tensor) -> None:
        nonlocal counts
        # The upper triangle is not read by solvers.
        finite, counts = read([torch.isfinite(values).all() & torch.isfinite(scatter).all(), count])
        _refuse_negative(counts)
        if not finite:
            _refuse_nonfinite(scatter)
            library.finite(values)

    return scatter, _solved(scatter, count, centering, accumulated, impl, look), counts


def _checked(scatter: Any, n: int | Tensor, centering: str, *, values: bool = True) -> tuple[Tensor, Tensor]:
    """Moments and counts ``[b]``, checked; ``values`` says whether their values are looked at."""
    scatter = as_real_tensor(scatter, "scatter", min_dim=2).detach()
    if scatter.dtype != torch.float64:
        raise TypeError(f"scatter must be float64, got {str(scatter.dtype).removeprefix('torch.')}")
    if scatter.shape[-1] != scatter.shape[-2] or scatter.shape[-1] == 0:
        raise ValueError(f"scatter must hold square matrices, got shape {tuple(scatter.shape)}")
    check_choice(centering, "centering", ("mean", "none"))
    count = sent(as_tensor(n, "n"), scatter.device)
    if count.dtype == torch.bool or count.is_floating_point() or count.is_complex():
        raise TypeError(f"n must be an integer or an integer tensor, got {count.dtype}")
    lead = scatter.shape[:-2]
    if count.dim() and tuple(count.shape) != tuple(lead):
        raise ValueError(f"n must be one integer or have shape {tuple(lead)}, got {tuple(count.shape)}")
    counts = count.long().expand(lead).reshape(-1)
    if not values:
        return scatter, counts
    _refuse_negative(counts)
    _refuse_nonfinite(scatter)
    return scatter, counts


def _refuse_negative(counts: Tensor) -> None:
    if bool((counts < 0).any()):
        raise ValueError(f"n must not be negative, got {int(counts.min())}")


def _refuse_nonfinite(scatter: Tensor) -> None:
    lead = scatter.shape[:-2]
    bad = (~torch.isfinite(scatter)).sum((-2, -1)).reshape(-1)
    if bool(bad.any()):
        at = int(bad.argmax())
        index = tuple(int(i) for i in np.unravel_index(at, tuple(lead))) if lead else ()
        where = f" in matrix {index if len(index) > 1 else index[0]} of the batch" if index else ""
        raise ValueError(f"scatter must be finite, got {int(bad[at])} NaN or infinite values{where}")


def _look(values: Tensor) -> None:
    if values.device.type != "cpu":
        library.finite(values)


def _solved(
    scatter: Tensor,
    count: Tensor,
    centering: str,
    accumulated: Any,
    impl: str,
    look: Callable[[Tensor], object] = _look,
) -> Solved:
    flat = scatter.reshape(len(count), *scatter.shape[-2:])
    if accumulated is not None:
        given, lead = _floats(accumulated, "accumulated"), scatter.shape[:-2]
        if given.shape not in ((), lead):
            raise ValueError(
                f"accumulated must be one number or have shape {tuple(lead)}, got {tuple(given.shape)}"
            )
        accumulated = given.to(flat.device).expand(lead).reshape(-1)
    values = EIGVALSH(impl, Symmetric(flat))
    look(values)
    return _from_values(values, flat.diagonal(dim1=-2, dim2=-1), count, centering, accumulated)


def _from_values(
    values: Tensor, variance: Tensor, count: Tensor, centering: str, accumulated: Tensor | None
) -> Solved:
    trace: Tensor = _sum(variance)
    if accumulated is not None:
        trace = trace.maximum(accumulated)
    return _within(values, trace, count - 1 if centering == "mean" else count, variance, count)


def _within(values: Tensor, trace: Tensor, freedom: Tensor, variance: Tensor, samples: Tensor) -> Solved:
    """Singular values of which no more are not zero than there are degrees of freedom and features that
    vary."""
    limit = freedom.clamp_min(0).minimum((variance > 0).sum(-1))
    return from_eigenvalues(values, trace, torch.zeros_like(samples), limit, samples=samples)


def _floats(value: Any, name: str) -> Tensor:
    """``value`` as fp64; a real tensor stays on its device."""
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex():
        return value.to(torch.float64)
    return torch.from_numpy(as_floats(value, name))


@numpy_on_cpu
def _sum(x: Any) -> Any:
    return x.sum(-1)
