"""LAPACK (on a GPU, cuSOLVER) through torch: eigenvalues of symmetric matrices, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from rgfast.dispatch import Impl
from rgfast.ops.spectrum.call import Symmetric
from rgfast.runtime.threads import on_one_thread

__all__ = ["EIGVALSH", "finite", "seconds"]

# Seconds on one thread of an AVX-512 core: a call, of which setting the thread count is a third, a matrix
# of a few rows, and the arithmetic of a large one.
_CALL, _EACH, _FLOP = 2.5e-5, 3e-6, 1.0 / 15e9


def finite(values: Tensor) -> Tensor:
    """`values`; `torch.linalg.LinAlgError` where one is not finite: LAPACK may return NaN without a word."""
    if not bool(torch.isfinite(values).all()):
        raise LinAlgError("eigvalsh gave NaN or infinity")
    return values


def seconds(count: int, d: int, dtype: torch.dtype) -> float:
    """About how long the eigenvalues of `count` matrices of d rows take."""
    return _CALL + count * (_EACH + 4 / 3 * d**3 * _FLOP * dtype.itemsize / 8)


def _cost(call: Symmetric) -> float:
    return seconds(call.matrices, call.side, call.a.dtype)


# LAPACK's bits depend on the number of threads.
EIGVALSH = Impl("library", lambda call: finite(on_one_thread(torch.linalg.eigvalsh, call.a)), cost=_cost)
