"""torch's own routines: LAPACK on the CPU, cuSOLVER's batches and cuBLAS's fp64 products on a GPU.

Nothing here reads a value on a device. What went wrong there is NaN in the result, which `finite` looks for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from rgfast.dispatch import Impl
from rgfast.ops.device import LAUNCH, between, by_itself, by_name_on_cpu, memory_bytes
from rgfast.ops.spectrum import products
from rgfast.ops.spectrum.call import Rows, Symmetric
from rgfast.runtime.threads import no_autocast, on_one_thread

__all__ = ["EIGVALSH", "GRAM", "SPECTRUM", "eigenvalues", "finite", "loops", "on_cpu", "solving"]

# Seconds on one thread of an AVX-512 core: a call, of which setting the thread count is a third, a matrix
# of a few rows, and the arithmetic of a large one.
_CALL, _EACH, _FLOP = 2.5e-5, 3e-6, 1.0 / 15e9
# Milliseconds that an H100 takes for batches of 64 and of 400 fp64 matrices with so many rows, and fp32's
# share of it; and microseconds for each matrix where torch solves one after another.
_BATCHED: dict[int, tuple[float, ...]] = {
    16: (0.153, 0.189, 0.85),
    32: (0.240, 0.413, 0.70),
    64: (0.410, 1.17, 0.60),
    100: (0.864, 3.37, 0.55),
    128: (1.05, 4.45, 0.52),
    200: (10.4, 23.0, 0.43),
    256: (14.7, 31.5, 0.40),
    384: (25.6, 76.6, 0.82),
    512: (39.8, 140.0, 0.74),
    1024: (141.0, 881.0, 0.84),
}
_ONE_BY_ONE: dict[int, tuple[float, ...]] = {
    16: (68.0,),
    32: (140.0,),
    64: (335.0,),
    128: (733.0,),
    256: (1980.0,),
    512: (4460.0,),
    1024: (10200.0,),
}
# cuSOLVER's batches have a limit near 32 k matrices, and take about so many times their own memory to work,
# of which a GPU's quarter is given.
_MOST, _WORK = 16_384, 20
_CHECKS = 25  # operators of a call, with its checks


def loops(device_type: str) -> bool:
    """Whether torch solves the matrices of a batch one after another on a type of device."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return device_type != "cpu" and (major, minor) < (2, 12)


def finite(values: Tensor) -> Tensor:
    """`values`; `torch.linalg.LinAlgError` where one is not finite: LAPACK may return NaN without a word."""
    if values.numel() and not bool(values.abs().amax() < torch.inf):
        where = ""
        if values.dim() > 1:
            bad = ~torch.isfinite(values)
            first = tuple(int(i) for i in bad.any(-1).nonzero()[0])
            where = f" for matrix {first[0] if len(first) == 1 else first} of the batch"
        raise LinAlgError(f"eigvalsh gave NaN or infinity{where}")
    return values


def on_cpu(count: int, d: int, dtype: torch.dtype) -> float:
    """About how long LAPACK takes for the eigenvalues of `count` matrices of d rows."""
    return _CALL + count * (_EACH + 4 / 3 * d**3 * _FLOP * dtype.itemsize / 8)


def solving(count: int, d: int, dtype: torch.dtype, device: torch.device) -> float:
    """About how long torch takes for the eigenvalues of `count` matrices of d rows."""
    if device.type == "cpu":
        return on_cpu(count, d, dtype)
    beyond = max(1.0, d / max(_BATCHED)) ** 3
    if loops(device.type):
        return 1e-6 * count * beyond * between(_ONE_BY_ONE, d)[0]
    few, many, single = between(_BATCHED, d)
    slope = (many - few) / (400 - 64)
    # Every call has to fill its pipelines, and few matrices do not.
    calls = -(-count // at_once(d, device)) if count else 0
    milliseconds = calls * max(few - 64 * slope, 0.0) + count * slope
    share = single if dtype == torch.float32 else 1.0
    return _CHECKS * LAUNCH * calls + 1e-3 * milliseconds * share * beyond


def at_once(d: int, device: torch.device) -> int:
    """Matrices of d rows in one call of cuSOLVER."""
    return max(1, min(_MOST, memory_bytes(device) // 4 // (_WORK * 8 * max(1, d * d))))


def eigenvalues(a: Tensor) -> Tensor:
    """Eigenvalues of symmetric `a[..., d, d]`, ascending, by the lower triangle; NaN where they are not good.

    On a device other than the CPU every matrix is scaled by a power of two, and what comes back is compared
    with its trace and its norm: batched solvers have returned wrong values without an error.
    """
    if a.device.type == "cpu":
        return on_one_thread(torch.linalg.eigvalsh, a)
    d = a.shape[-1]
    flat = a.reshape(math.prod(a.shape[:-2]), d, d)
    with no_autocast(a.device.type):
        parts = [_checked(part) for part in torch.split(flat, at_once(d, a.device))]
    values = parts[0] if len(parts) == 1 else torch.cat(parts)
    return values.reshape(a.shape[:-1])


def _checked(a: Tensor) -> Tensor:
    if not a.numel():
        return a.new_empty(a.shape[:-1])
    d, lower = a.shape[-1], a.tril()
    largest = lower.abs().amax((-2, -1))
    known = largest < torch.inf  # the maximum is NaN if any entry is
    exponent = torch.frexp(torch.where(known, largest, 1.0)).exponent.long().clamp(-1000, 1000)
    up = ((1023 + exponent) << 52).view(torch.float64)
    down = up.reciprocal()
    scaled = torch.where(known[:, None, None], lower, 0.0).double() * down[:, None, None]
    values = torch.linalg.eigvalsh(scaled.to(a.dtype)).double()
    diagonal = scaled.diagonal(dim1=-2, dim2=-1)
    norm = 2 * scaled.square().sum((-2, -1)) - diagonal.square().sum(-1)
    each = max(50, d / 2) * torch.finfo(a.dtype).eps / 2 * norm.sqrt()  # what an eigenvalue may be off by
    off_trace = (values.sum(-1) - diagonal.sum(-1)).abs()
    off_norm = (values.square().sum(-1) - norm).abs()
    good = known & (off_trace <= 2 * d * each) & (off_norm <= 4 * math.sqrt(d) * each * norm.sqrt())
    return torch.where(good[:, None], values * up[:, None], torch.nan).to(a.dtype)


def _eigvalsh(call: Symmetric) -> Tensor:
    values = eigenvalues(call.a)
    return finite(values) if call.device.type == "cpu" else values


def _cost(call: Symmetric) -> float:
    return solving(call.matrices, call.side, call.a.dtype, call.device)


# LAPACK's bits depend on the number of threads.
EIGVALSH = Impl("library", _eigvalsh, cost=_cost)


def spectrum(call: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `reference.gram_spectrum` returns."""
    matrix, means, accumulated, exponent, limit = products.moments(call)
    values = eigenvalues(matrix)
    if call.raw is not None and means is not None:
        with by_itself(call.device.type):
            lifted = matrix.baddbmm_(means[:, :, None], means[:, None, :], alpha=call.x.shape[1])
        call.raw.copy_(eigenvalues(lifted))
    return values, accumulated, exponent, limit


def _spectrum_cost(call: Rows) -> float:
    return products.cost(call) + solving(len(call.x), call.side, torch.float64, call.device)


GRAM = Impl("library", products.gram, products.refusal, products.cost, by_name_only=by_name_on_cpu)
SPECTRUM = Impl("library", spectrum, products.refusal, _spectrum_cost, by_name_only=by_name_on_cpu)
