"""The compiled implementation: second moments, and eigenvalues of many symmetric matrices (see README)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from rgfast import native
from rgfast.threads import one_thread

__all__ = [
    "effective_ranks",
    "eigvalsh",
    "eigvalsh_supports",
    "gram",
    "gram_spectrum",
    "gram_supports",
    "left_out_spectrum",
]

_NOT_CONVERGED = 2
# Beyond it the reduction, which reads the whole matrix at every step, loses to LAPACK's blocked one.
_LARGEST = 10 << 20


def _fits(dtype: torch.dtype, d: int) -> bool:
    return d * d * dtype.itemsize <= _LARGEST


def eigvalsh_supports(a: Tensor, **_: Any) -> str | None:
    """None, or why the compiled solver does not take `a[..., d, d]`."""
    if not a.is_cpu:
        return f"it runs on the CPU, a is on {a.device.type}"
    if a.dtype not in (torch.float64, torch.float32):
        return f"it takes float64 and float32, a is {str(a.dtype).removeprefix('torch.')}"
    if a.dim() > 16:
        return f"it takes up to 16 dimensions, a has {a.dim()}"
    if not _fits(a.dtype, a.shape[-1]):
        return f"LAPACK is faster on matrices of {a.shape[-1]} rows"
    return None


def eigvalsh(a: Tensor) -> Tensor:
    """Eigenvalues `[..., d]` of symmetric `a[..., d, d]` (fp64 or fp32, on the CPU), ascending, in its dtype.

    The lower triangle is read; any strides. The bits of a result do not depend on the number of threads, nor
    on the place in the batch or the other matrices of it, but on how many there are: a few are reduced one at
    a time, many side by side, which round differently. Raises `torch.linalg.LinAlgError`, naming the first
    such matrix, where one holds NaN or infinity or does not converge.
    """
    double = a.dtype == torch.float64
    if not (double or a.dtype == torch.float32) or not a.is_cpu:
        kind = str(a.dtype).removeprefix("torch.")
        raise TypeError(f"a must be float64 or float32 on the CPU, got {kind} on {a.device}")
    if a.dim() == 3 or a.dim() == 2:
        shape, strides = a.shape, a.stride()
        d = shape[-1]
        batch, step = (shape[0], strides[0]) if len(shape) == 3 else (1, 0)
        values = a.new_empty((batch, d)) if len(shape) == 3 else a.new_empty(d)
        index, trouble = native.load().eigvalsh_plain(
            a.data_ptr(),
            double,
            *(batch, d, step, strides[-2], strides[-1]),
            values.data_ptr(),
            torch.get_num_threads(),
        )
    else:
        values = a.new_empty(a.shape[:-1])
        index, trouble = native.load().eigvalsh(native.tensor(a), native.tensor(values), native.threads())
    if trouble:
        place = tuple(int(i) for i in np.unravel_index(index, tuple(a.shape[:-2]))) if a.dim() > 2 else ()
        where = f"matrix {place if len(place) > 1 else place[0]} of the batch" if place else "the matrix"
        what = "did not converge on" if trouble == _NOT_CONVERGED else "found NaN or infinity in"
        raise LinAlgError(f"eigvalsh {what} {where}")
    return values


def gram_supports(x: Tensor, *, dtype: torch.dtype = torch.float64, **_: Any) -> str | None:
    """None, or why the compiled second moment does not take `x[b, n, d]`."""
    if not x.is_cpu:
        return f"it runs on the CPU, x is on {x.device.type}"
    if dtype != torch.float64:
        return "it computes in float64, and precision='single' asks for float32"
    return None


def gram(
    x: Tensor,
    *,
    centering: str = "mean",
    dtype: torch.dtype = torch.float64,
    means: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Second moments `[b, m, m]`, m = min(n, d), of `x[b, n, d]` and what bounds their error.

    The same four as `reference.gram` returns, formed in the same tiles.
    """
    b, n, d = x.shape
    matrix = torch.empty((b, min(n, d), min(n, d)), dtype=torch.float64, device="cpu")
    return matrix, *_moments(x, centering, matrix, means)


def gram_spectrum(
    x: Tensor,
    *,
    centering: str = "mean",
    dtype: torch.dtype = torch.float64,
    raw: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ascending eigenvalues `[b, m]` of `gram(x)`, and the rest of what it returns.

    `raw` as in `reference.gram_spectrum`; where the compiled solver runs, from the same tridiagonal form.
    """
    m = min(x.shape[1:])
    if not _fits(torch.float64, m):
        means = None if raw is None else torch.empty((len(x), m), dtype=torch.float64, device="cpu")
        matrix, accumulated, exponent, limit = gram(x, centering=centering, means=means)
        bad = ~torch.isfinite(accumulated)
        matrix[bad] = 0.0
        with one_thread():  # LAPACK's bits depend on the number of threads; it gets new copies of `matrix`
            values = torch.linalg.eigvalsh(matrix)
            if raw is not None and means is not None:
                means[bad] = 0.0
                lifted = matrix.baddbmm_(means[:, :, None], means[:, None, :], alpha=x.shape[1])
                torch.linalg.eigvalsh(lifted, out=raw)
        return values, accumulated, exponent, limit
    values = torch.empty((x.shape[0], m), dtype=torch.float64, device="cpu")
    return values, *_moments(x, centering, values, raw=raw)


def left_out_spectrum(
    x: Tensor, groups: int, raw: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """What `gram_spectrum` returns of `x[b, n, d]` without samples g, g + groups, ... for every g.

    Eigenvalues `[b groups, d]`, from one moment a group: those of a matrix follow each other. `raw` is of
    their shape. None where that is not done: for fp64, fewer samples left than features, matrices too large
    for lanes.
    """
    b, n, d = x.shape
    if x.dtype == torch.float64 or not x.is_cpu or n - -(-n // groups) < d:
        return None
    values = torch.empty((b * groups, d), dtype=torch.float64, device="cpu")
    accumulated = torch.empty(b * groups, dtype=torch.float64, device="cpu")
    exponent, limit = torch.empty((2, b * groups), dtype=torch.int64, device="cpu")
    info = (
        native.address(accumulated, torch.float64, b * groups, "accumulated"),
        native.address(exponent, torch.int64, b * groups, "exponent"),
        native.address(limit, torch.int64, b * groups, "limit"),
        0,
    )
    found = native.load().left_out_moments(
        native.tensor(x.detach()),
        groups,
        native.address(values, torch.float64, b * groups * d, "values"),
        native.address(raw, torch.float64, b * groups * d, "raw"),
        info,
        native.threads(),
    )
    if found is None:
        return None
    if found[1] == _NOT_CONVERGED:
        raise _stuck(found[0] // groups)
    return values, accumulated, exponent, limit


def effective_ranks(
    x: Tensor, *, centering: str, variance: bool, rtol: float
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Effective ranks `[b]` of `x[b, n, d]` where their error is known to be within `rtol`.

    In one call, for many small matrices. Where the bound on the relative error of a singular effective rank,
    as `solve.from_eigenvalues` leads to it, exceeds `rtol`, or data are not finite: what `gram_spectrum`
    returns. None for matrices that are too large.
    """
    b, n, d = x.shape
    m = min(n, d)
    if not _fits(torch.float64, m):
        return None
    rank = torch.empty(b, dtype=torch.float64, device="cpu")
    scratch = torch.empty(b * (4 + m), dtype=torch.float64, device="cpu")
    index, trouble, worst = native.load().effective_ranks(
        native.tensor(x),
        centering == "mean",
        variance,
        native.address(rank, torch.float64, b, "rank"),
        native.address(scratch, torch.float64, b * (4 + m), "scratch"),
        native.threads(),
    )
    if trouble == _NOT_CONVERGED:
        raise _stuck(index)
    if worst <= rtol:
        return rank
    whole = scratch[b : 3 * b].view(torch.int64)
    return scratch[4 * b :].view(b, m), scratch[:b], whole[:b], whole[b:]


def _stuck(index: int) -> Exception:
    message = f"the eigenvalues of the second moment did not converge on matrix {index} of the batch"
    error: Exception = LinAlgError(message)
    return error


def _moments(
    x: Tensor, centering: str, result: Tensor, means: Tensor | None = None, raw: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach()
    b, m = len(x), min(x.shape[1:])
    accumulated = torch.empty(len(x), dtype=torch.float64, device="cpu")
    exponent, limit = torch.empty((2, len(x)), dtype=torch.int64, device="cpu")
    index, trouble = native.load().moments(
        native.tensor(x),
        centering == "mean",
        result.dim() == 2,
        native.tensor(result),
        native.address(raw, torch.float64, b * m, "raw"),
        (
            native.address(accumulated, torch.float64, b, "accumulated"),
            native.address(exponent, torch.int64, b, "exponent"),
            native.address(limit, torch.int64, b, "limit"),
            native.address(means, torch.float64, b * x.shape[2], "means"),
        ),
        native.threads(),
    )
    if trouble == _NOT_CONVERGED:
        raise _stuck(index)
    return accumulated, exponent, limit
