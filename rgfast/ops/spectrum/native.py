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
    "eigvalsh",
    "eigvalsh_supports",
    "gram",
    "gram_spectrum",
    "gram_supports",
]

_NOT_CONVERGED = 2
# Beyond it the reduction, which reads the whole matrix at every step, loses to LAPACK's blocked one.
_LARGEST = 10 << 20


def _fits(dtype: torch.dtype, d: int) -> bool:
    return d * d * dtype.itemsize <= _LARGEST


def eigvalsh_supports(a: Tensor, **_: Any) -> str | None:
    """None, or why the compiled solver does not take `a[..., d, d]`."""
    if a.device.type != "cpu":
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

    The lower triangle is read; any strides. Every matrix is computed by itself: its bits depend neither on
    its place in the batch nor on the number of threads. Raises `torch.linalg.LinAlgError`, naming the first
    such matrix, where one holds NaN or infinity or does not converge.
    """
    values = torch.empty(a.shape[:-1], dtype=a.dtype)
    index, trouble = native.load().eigvalsh(native.tensor(a), native.tensor(values), native.threads())
    if trouble:
        place = tuple(int(i) for i in np.unravel_index(index, tuple(a.shape[:-2]))) if a.dim() > 2 else ()
        where = f"matrix {place if len(place) > 1 else place[0]} of the batch" if place else "the matrix"
        what = "did not converge on" if trouble == _NOT_CONVERGED else "found NaN or infinity in"
        raise LinAlgError(f"eigvalsh {what} {where}")
    return values


def gram_supports(x: Tensor, *, dtype: torch.dtype = torch.float64, **_: Any) -> str | None:
    """None, or why the compiled second moment does not take `x[b, n, d]`."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, x is on {x.device.type}"
    if dtype != torch.float64:
        return "it computes in float64, and precision='single' asks for float32"
    return None


def gram(
    x: Tensor, *, centering: str = "mean", dtype: torch.dtype = torch.float64, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Second moments `[b, m, m]`, m = min(n, d), of `x[b, n, d]` and what bounds their error.

    The same four as `reference.gram` returns, formed in the same tiles.
    """
    b, n, d = x.shape
    matrix = torch.empty((b, min(n, d), min(n, d)), dtype=torch.float64)
    return matrix, *_moments(x, centering, matrix)


def gram_spectrum(
    x: Tensor, *, centering: str = "mean", dtype: torch.dtype = torch.float64, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ascending eigenvalues `[b, m]` of `gram(x)`, and the rest of what it returns."""
    m = min(x.shape[1:])
    if not _fits(torch.float64, m):
        matrix, accumulated, exponent, limit = gram(x, centering=centering)
        finite = torch.isfinite(accumulated)[:, None, None]
        with one_thread():  # LAPACK's bits depend on the number of threads
            return torch.linalg.eigvalsh(torch.where(finite, matrix, 0.0)), accumulated, exponent, limit
    values = torch.empty((x.shape[0], m), dtype=torch.float64)
    return values, *_moments(x, centering, values)


def _moments(x: Tensor, centering: str, result: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach()
    accumulated = torch.empty(len(x), dtype=torch.float64)
    exponent, limit = torch.empty((2, len(x)), dtype=torch.int64)
    index, trouble = native.load().moments(
        native.tensor(x),
        centering == "mean",
        result.dim() == 2,
        native.tensor(result),
        (accumulated.data_ptr(), exponent.data_ptr(), limit.data_ptr()),
        native.threads(),
    )
    if trouble == _NOT_CONVERGED:
        raise LinAlgError(
            f"the eigenvalues of the second moment did not converge on matrix {index} of the batch"
        )
    return accumulated, exponent, limit
