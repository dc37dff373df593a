"""The compiled implementation: second moments, and eigenvalues of many symmetric matrices (see README)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from rgfast.dispatch import Impl
from rgfast.ops.spectrum.call import Again, Doubtful, Groups, Rows, Symmetric
from rgfast.runtime import native

__all__ = [
    "RefineStages",
    "effective_ranks",
    "eigvalsh",
    "gram",
    "gram_spectrum",
    "left_out_spectrum",
    "refine",
    "refined_spectrum",
    "with_second_stage",
    "without_groups",
]

Array = np.ndarray[Any, np.dtype[Any]]

_NOT_CONVERGED = 2
_STAGES = 3  # of refinement, as the compiled module has them
_MOST_IN_LANES = 256  # rows
# Beyond so many bytes a matrix the reduction, which reads all of it at every step, waits for memory.
_LARGEST = 10 << 20
# Seconds a call and a matrix, and rates on one thread of an AVX-512 core (README, "Speed").
_CALL, _EACH = 1e-5, 2e-7
_PRODUCTS, _FLOPS, _FLOPS_FROM_MEMORY = 35e9, 17e9, 13e9


def _eigvalsh_refusal(call: Symmetric) -> str | None:
    a = call.a
    if a.dtype not in (torch.float64, torch.float32):
        return f"it takes float64 and float32, a is {str(a.dtype).removeprefix('torch.')}"
    return f"it takes up to 16 dimensions, a has {a.dim()}" if a.dim() > 16 else None


def _rows_refusal(call: Rows) -> str | None:
    single = call.dtype != torch.float64
    return "it computes in float64, and precision='single' asks for float32" if single else None


def _groups_refusal(call: Groups) -> str | None:
    n, d = call.x.shape[1:]
    if call.x.dtype == torch.float64:
        return "it takes fewer bits than float64"
    left = n - -(-n // call.groups)
    return f"without a group {left} samples are fewer than {d} features" if left < d else None


def _doubtful_refusal(call: Doubtful) -> str | None:
    n, d = call.x.shape[1:]
    return f"{n} samples are fewer than {d} features" if call.uncentred and n < d else None


def _again_refusal(call: Again) -> str | None:
    wide = call.side > _MOST_IN_LANES
    return f"moments of {call.side} rows are too large for its lanes" if wide else None


def _again_cost(call: Again) -> float:
    """Two stages, in whole groups of lanes."""
    groups = -(-len(call.at) // 8)
    work = call.x[0].numel() * call.side
    return _CALL + 2 * len(call.at) * work / _PRODUCTS + 16 * groups * _solving(call.side, 8)


def _solving(d: int, itemsize: int) -> float:
    rate = _FLOPS if d * d * itemsize <= _LARGEST else _FLOPS_FROM_MEMORY
    return _EACH + 4 / 3 * d**3 * itemsize / 8 / rate


def _eigvalsh_cost(call: Symmetric) -> float:
    return _CALL + call.matrices * _solving(call.side, call.a.dtype.itemsize)


def _gram_cost(call: Rows) -> float:
    return _CALL + call.x.numel() * call.side / _PRODUCTS


def _rows_cost(call: Rows) -> float:
    return _gram_cost(call) + len(call.x) * _solving(call.side, 8)


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


def gram(
    x: Tensor, *, centering: str = "mean", means: Tensor | None = None
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
    raw: Tensor | None = None,
    means: Tensor | None = None,
    matrix: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ascending eigenvalues `[b, m]` of `gram(x)`, and the rest of what it returns.

    `raw` as in `reference.gram_spectrum`, from the same tridiagonal form; `means` and `matrix[b, m, m]` get
    what `gram(x)` has.
    """
    values = torch.empty((x.shape[0], min(x.shape[1:])), dtype=torch.float64, device="cpu")
    return values, *_moments(x, centering, values, means, raw, matrix)


def left_out_spectrum(
    x: Tensor, groups: int, raw: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """What `gram_spectrum` returns of `x[b, n, d]` without samples g, g + groups, ... for every g.

    Eigenvalues `[b groups, d]`, from one moment a group: those of a matrix follow each other. `raw` is of
    their shape. None where matrices are too large for lanes.
    """
    b, _, d = x.shape
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


def refined_spectrum(
    x: Tensor, doubt: float, share: float, *, uncentred: bool
) -> tuple[tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor], list[tuple[Array, ...]]] | None:
    """What `gram_spectrum` returns with `raw` second, and what a second stage gives of doubtful matrices.

    The latter is, of centred rows and, if `uncentred`, of rows as they are: eigenvalues `[b, m]`, numbers of
    leading vectors (0: no second stage), norms of their residuals, and traces `[b]`, as of `refine.Stage`.
    None for sizes that do not go in lanes.
    """
    b, m = len(x), min(x.shape[1:])
    values = np.empty((b, m))
    raw = np.empty((b, m)) if uncentred else None
    trace, whole = np.empty(b), np.empty((2, b), dtype=np.int64)
    second: list[tuple[Array, ...]] = [
        (np.empty((b, m)), np.empty(b, dtype=np.int64), np.empty(b), np.empty(b))
        for _ in range(2 if uncentred else 1)
    ]
    addresses = [[array.ctypes.data for array in stage] for stage in second]
    found = native.load().refined_moments(
        native.tensor(x.detach()),
        (doubt, share),
        (values.ctypes.data, 0 if raw is None else raw.ctypes.data),
        (trace.ctypes.data, whole[0].ctypes.data, whole[1].ctypes.data, 0),
        [addresses[0], addresses[-1]],
        native.threads(),
    )
    if found is None:
        return None
    if found[1] == _NOT_CONVERGED:
        raise _stuck(found[0])
    eigenvalues, lifted = torch.from_numpy(values), None if raw is None else torch.from_numpy(raw)
    info = torch.from_numpy(trace), torch.from_numpy(whole[0]), torch.from_numpy(whole[1])
    return (eigenvalues, lifted, *info), second


def effective_ranks(
    x: Tensor, *, centering: str, variance: bool, rtol: float
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
    """Effective ranks `[b]` of `x[b, n, d]` where their error is known to be within `rtol`.

    In one call, for many small matrices. Where the bound on the relative error of a singular effective rank,
    as `solve.from_eigenvalues` leads to it, exceeds `rtol`, or data are not finite: what `gram_spectrum`
    returns.
    """
    b, n, d = x.shape
    m = min(n, d)
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


class RefineStages:
    """Stages of refinement (see `refine.Stages`) of matrices `at` of `x[b, n, d]`, by their indices in x.

    A call returns eigenvalues `[l, m]`, ascending, traces, numbers of leading vectors and the norms of their
    residuals as arrays; `info` are accumulated traces, exponents and rank limits after stage 0.
    """

    def __init__(self, x: Tensor, at: Array, centering: str, share: float) -> None:
        self._x, self._at, self._centering, self._share = native.tensor(x.detach()), at, centering, share
        self._m, b = min(x.shape[1:]), len(at)
        self._vectors = np.empty((b, self._m, -(-self._m // 8) * 8))
        self._ends = np.zeros((b, _STAGES), dtype=np.int64)
        self._live = np.arange(b)

    def __call__(self, live: Array, stage: int) -> tuple[Array, Array, Array, Array]:
        here = np.searchsorted(self._live, live)
        if len(here) < len(self._live):
            self._vectors, self._ends = self._vectors[here], self._ends[here]
        self._live, count = live, len(live)
        values, residual = np.empty((count, self._m)), np.empty(count)
        trace, whole, at = np.empty(count), np.empty((2, count), dtype=np.int64), self._at[live]
        index, trouble = native.load().refine(
            self._x,
            at.ctypes.data,
            count,
            self._centering == "mean",
            (stage, self._share),
            [array.ctypes.data for array in (values, self._vectors, self._ends, residual)],
            (trace.ctypes.data, whole[0].ctypes.data, whole[1].ctypes.data, 0),
            native.threads(),
        )
        if trouble == _NOT_CONVERGED:
            raise _stuck(int(at[index]))
        if stage == 0:
            self.info = trace, whole[0], whole[1]
        before = self._ends[:, stage - 1] if stage else 0
        return values, trace, self._ends[:, stage] - before, residual


def _stuck(index: int) -> Exception:
    message = f"the eigenvalues of the second moment did not converge on matrix {index} of the batch"
    error: Exception = LinAlgError(message)
    return error


def _moments(
    x: Tensor,
    centering: str,
    result: Tensor,
    means: Tensor | None = None,
    raw: Tensor | None = None,
    matrix: Tensor | None = None,
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
        0,
        native.address(matrix, torch.float64, b * m * m, "matrix"),
    )
    if trouble == _NOT_CONVERGED:
        raise _stuck(index)
    return accumulated, exponent, limit


def _leave_to_parts(call: Rows) -> str | None:
    wide = call.side**2 * 8 > _LARGEST
    return f"the eigenvalues of {call.side} rows take less time apart from the moment" if wide else None


def _impl(run: Any, can_run: Any, cost: Any, by_name_only: Any = lambda call: None) -> Impl:
    missing, isa = native.unavailable_reason, native.active_isa
    return Impl("native", run, can_run, cost, ("cpu",), missing, by_name_only, isa)


EIGVALSH = _impl(lambda call: eigvalsh(call.a), _eigvalsh_refusal, _eigvalsh_cost)
GRAM = _impl(lambda call: gram(call.x, centering=call.centering, means=call.means), _rows_refusal, _gram_cost)
SPECTRUM = _impl(
    lambda call: gram_spectrum(
        call.x, centering=call.centering, raw=call.raw, means=call.means, matrix=call.matrix
    ),
    _rows_refusal,
    _rows_cost,
)
RANKS = _impl(
    lambda call: effective_ranks(call.x, centering=call.centering, variance=call.variance, rtol=call.rtol),
    _rows_refusal,
    _rows_cost,
    _leave_to_parts,
)


def without_groups(run: Any) -> Impl:
    """The fused form of spectra without each group: `run(call)` makes its result of `left_out_spectrum`."""
    return _impl(run, _groups_refusal, lambda call: 0.0)


def with_second_stage(run: Any) -> Impl:
    """Spectra with a second stage of refinement: `run(call)` makes its result of `refined_spectrum`."""
    return _impl(run, _doubtful_refusal, lambda call: 0.0)


def refine(run: Any) -> Impl:
    """Refinement in lanes: `run(call)` makes its result of `RefineStages`."""
    return _impl(run, _again_refusal, _again_cost)
