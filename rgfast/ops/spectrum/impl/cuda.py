"""Eigenvalues by the package's own kernels on a GPU, csrc/cuda/spectrum.cu: one launch for a whole batch.

Larger matrices take three launches, in fp64 (`stages.py`). The kernels that a matrix gets depend on its rows
and dtype alone, so that it has the same values in any batch. Nothing is read on the device: a matrix with an
entry that is not finite has NaN for eigenvalues.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rgfast.dispatch import Impl, Unproven, is_plain
from rgfast.ops.device import LAUNCH, between
from rgfast.ops.spectrum import products, rank_kernel
from rgfast.ops.spectrum.call import Both, Rows, Symmetric
from rgfast.ops.spectrum.stages import BANDS, STAGES, Stages
from rgfast.runtime import cuda, known_answers, measured
from rgfast.runtime.known_answers import KnownAnswer

__all__ = ["BOTH", "EIGVALSH", "KERNELS", "SPECTRUM", "TABLE", "Kernel", "kernel_for"]

Launch = Callable[[Tensor, Tensor | None, float], tuple[Tensor, Tensor]]


class Kernel(NamedTuple):
    """A kernel of spectrum.cu: the rows it takes at most, and how it is launched."""

    name: str
    rows: int
    block: int
    per_block: int  # matrices
    shared: int  # bytes, without a packed matrix
    packed: bool  # whether the lower triangle is in shared memory, too
    tried: int  # rows of the problem with a known answer

    def shared_bytes(self, d: int, dtype: torch.dtype) -> int:
        """Of a block that solves matrices of d rows."""
        groups = -(-d // 4)
        entries = 4 * (d * groups - 2 * groups * (groups - 1)) if self.packed else 0
        return self.shared + entries * dtype.itemsize

    def launches(self, d: int, dtype: torch.dtype) -> list[tuple[str, int, int]]:
        """Names, threads and bytes of shared memory."""
        return [(self.name, self.block, self.shared_bytes(d, dtype))]

    def launch(self, a: Tensor, means: Tensor | None = None, samples: float = 0.0) -> tuple[Tensor, Tensor]:
        """Eigenvalues `[b, d]`, ascending, of `a[b, d, d]` and, if given means, of a + samples mean mean'."""
        b, d = a.shape[:2]
        values = torch.empty((b, d), dtype=a.dtype, device=a.device)
        raw = values if means is None else torch.empty_like(values)
        if not b:
            return values, raw
        cuda.launch(
            self.name,
            (-(-b // self.per_block), 1, 1),
            self.block,
            self.shared_bytes(d, a.dtype),
            a.contiguous(),
            0 if means is None else means.contiguous(),
            d,
            b,
            float(samples),
            values,
            raw,
            device=a.device,
        )
        return values, raw


def _named(suffix: str, *kernels: Kernel) -> tuple[Kernel, ...]:
    return tuple(each._replace(name=f"rgfast_spectrum_{each.name}_{suffix}") for each in kernels)


# By their rows; spectrum.cu compares its side of these numbers with its sources.
KERNELS: dict[torch.dtype, tuple[Kernel, ...]] = {
    torch.float64: _named(
        "f64",
        Kernel("lanes8", 8, 128, 16, 8192, False, 7),
        Kernel("lanes16", 16, 128, 8, 6144, False, 13),
        Kernel("lanes32", 32, 128, 4, 6144, False, 29),
        Kernel("shared64", 64, 64, 1, 5696, True, 45),
        Kernel("shared96", 96, 96, 1, 9296, True, 77),
        Kernel("shared102", 102, 128, 1, 13408, True, 99),
        Kernel("registers128", 128, 128, 1, 21600, False, 105),
    ),
    torch.float32: _named(
        "f32",
        Kernel("lanes8", 8, 128, 16, 3584, False, 7),
        Kernel("lanes16", 16, 128, 8, 3584, False, 13),
        Kernel("lanes32", 32, 128, 4, 3584, False, 29),
        Kernel("registers64", 64, 64, 1, 4656, False, 45),
        Kernel("shared96", 96, 96, 1, 5040, True, 75),
        Kernel("shared128", 128, 128, 1, 7232, True, 101),
        Kernel("shared160", 160, 160, 1, 9664, True, 135),
        Kernel("shared192", 192, 192, 1, 12368, True, 165),
        Kernel("shared222", 222, 224, 1, 15312, True, 197),
        Kernel("registers256", 256, 256, 1, 30816, False, 225),
    ),
}
# Microseconds that an H100 takes for one batch, however small, and for each matrix, by rows. Predicted, as
# `python benchmarks/gpu_spectrum_sizes.py --times` prints it: none was measured.
_TIMES: dict[torch.dtype, dict[int, tuple[float, ...]]] = {
    torch.float64: {
        1: (8.6, 0.00082),
        8: (13.0, 0.001),
        9: (15.0, 0.0039),
        16: (19.0, 0.0048),
        17: (28.0, 0.02),
        32: (43.0, 0.028),
        33: (58.0, 0.092),
        64: (120.0, 0.19),
        65: (120.0, 0.33),
        96: (190.0, 0.58),
        97: (210.0, 0.71),
        102: (220.0, 0.75),
        103: (210.0, 0.95),
        128: (270.0, 1.2),
        129: (520.0, 1.9),
        272: (1500.0, 7.1),
        273: (1500.0, 8.8),
        512: (3900.0, 40.0),
        513: (4100.0, 43.0),
        1024: (16000.0, 210.0),
    },
    torch.float32: {
        1: (4.1, 7.1e-05),
        8: (7.7, 0.00029),
        9: (10.0, 0.0013),
        16: (14.0, 0.0019),
        17: (18.0, 0.0085),
        32: (30.0, 0.015),
        33: (35.0, 0.051),
        64: (74.0, 0.11),
        65: (84.0, 0.18),
        96: (130.0, 0.26),
        97: (140.0, 0.38),
        128: (190.0, 0.56),
        129: (210.0, 0.79),
        160: (260.0, 1.1),
        161: (300.0, 1.3),
        192: (350.0, 1.8),
        193: (400.0, 2.2),
        222: (460.0, 2.5),
        223: (450.0, 3.4),
        256: (510.0, 3.8),
        257: (1400.0, 7.2),
        272: (1500.0, 7.4),
        273: (1500.0, 9.1),
        512: (4000.0, 41.0),
        513: (4200.0, 44.0),
        1024: (16000.0, 210.0),
    },
}


def kernel_for(d: int, dtype: torch.dtype) -> Kernel | Stages | None:
    """What solves matrices of d rows, None if they are too large."""
    kernels: list[Kernel | Stages] = [*KERNELS[dtype], STAGES]
    return next((each for each in kernels if each.rows >= d), None)


def _refusal(d: int, dtype: torch.dtype, device: torch.device) -> str | None:
    kernel = kernel_for(d, dtype)
    if kernel is None:
        return f"its kernels take matrices of up to {STAGES.rows} rows, not of {d}"
    return _cannot_run(kernel.launches(d, dtype), device)


def _cannot_run(launches: list[tuple[str, int, int]], device: torch.device) -> str | None:
    reasons = (cuda.refusal(name, device, block=block, shared=shared) for name, block, shared in launches)
    return next(filter(None, reasons), None)


def _unproven(d: int, dtype: torch.dtype, device: torch.device) -> Unproven | None:
    kernel = kernel_for(d, dtype)
    names = [] if kernel is None else [name for name, _, _ in kernel.launches(d, dtype)]
    return None if kernel is None else known_answers.unproven(device, *names)


def _solving(count: int, d: int, dtype: torch.dtype) -> float:
    alone, each = between(_TIMES[dtype], d)
    return LAUNCH + 1e-6 * (alone + count * each)


def _eigvalsh(call: Symmetric) -> Tensor:
    a, d = call.a.detach(), call.side
    kernel = kernel_for(d, a.dtype)
    assert kernel is not None
    values, _ = kernel.launch(a.reshape(call.matrices, d, d))
    return values.reshape(a.shape[:-1])


def _both(call: Both) -> Tensor:
    kernel = kernel_for(call.side, call.a.dtype)
    assert kernel is not None
    return torch.stack(kernel.launch(call.a, call.mean, 1.0))


def _spectrum(call: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `reference.gram_spectrum` returns: moments by torch's products, both spectra solved at once."""
    kernel = kernel_for(call.side, torch.float64)
    assert kernel is not None
    matrix, means, accumulated, exponent, limit = products.moments(call)
    values, raw = kernel.launch(matrix, means, call.x.shape[1])
    if call.raw is not None:
        call.raw.copy_(raw)
    return values, accumulated, exponent, limit


def _unmeasured(op: str, x: Tensor, side: int) -> str | None:
    """Why rows speak against the kernels at this size; in a traced graph, whose sizes may vary, at any."""
    return measured.refusal(op, "cuda", x.device, side if is_plain(x) else None)


EIGVALSH = Impl(
    "cuda",
    _eigvalsh,
    lambda call: _refusal(call.side, call.a.dtype, call.device),
    lambda call: _solving(call.matrices, call.side, call.a.dtype),
    devices=("cuda",),
    missing=cuda.missing,
    by_name_only=lambda call: _unmeasured("eigvalsh", call.a, call.side),
    unproven=lambda call: _unproven(call.side, call.a.dtype, call.device),
)
BOTH = dataclasses.replace(
    EIGVALSH, run=_both, cost=lambda call: _solving(len(call.a), call.side, call.a.dtype)
)
TABLE = dataclasses.replace(
    EIGVALSH,
    run=rank_kernel.launched,
    can_run=lambda call: cuda.device_refusal(call.device),
    cost=lambda call: rank_kernel.table_cost(call, 3),
    by_name_only=lambda call: _unmeasured("eigvalsh", call.values, call.values.shape[-1]),
    unproven=lambda call: known_answers.unproven(call.device, rank_kernel.KERNEL),
)
SPECTRUM = Impl(
    "cuda",
    _spectrum,
    lambda call: products.refusal(call) or _refusal(call.side, torch.float64, call.device),
    lambda call: products.cost(call) + _solving(len(call.x), call.side, torch.float64),
    devices=("cuda",),
    missing=cuda.missing,
    by_name_only=lambda call: _unmeasured("spectrum", call.x, call.side),
    unproven=lambda call: _unproven(call.side, torch.float64, call.device),
)


def _answer(
    kernel: Kernel | Stages, dtype: torch.dtype, launches: list[tuple[str, int, int]], launch: Launch
) -> KnownAnswer:
    """Of min(i, j), the inverse of a second difference, and of its negative, whose values have a formula.

    Once more of both, less something that the means give back, and of more of the first than a block takes,
    which must have its bits. All entries are whole numbers.
    """
    d = kernel.tried

    def run(device: torch.device) -> Tensor:
        index = torch.arange(1, d + 1, dtype=dtype, device=device)
        plain = torch.minimum(index[:, None], index)
        mean = (index % 3) - 1
        taken = 4.0 * mean[:, None] * mean
        a = torch.stack([plain, -plain, plain - taken, -plain - taken, *[plain] * kernel.per_block])
        a = a.tril() + torch.full_like(plain, torch.nan).triu(1)
        means = torch.zeros((len(a), d), dtype=dtype, device=device)
        means[2:4] = mean
        values, raw = launch(a, means, 4.0)
        alone, _ = launch(a, None, 0.0)
        same = torch.stack([values[4:] == values[0], raw[4:] == values[0], alone[4:] == alone[0]]).all()
        return torch.cat([values[0], values[1], raw[2], raw[3], alone[0], same[None]])

    values = sorted(0.25 / math.sin((k - 0.5) * math.pi / (2 * d + 1)) ** 2 for k in range(1, d + 1))
    negative = [-value for value in reversed(values)]
    allowed = max(50, d / 2) * torch.finfo(dtype).eps / 2 * values[-1]
    expected = (*values, *negative, *values, *negative, *values, 1.0)
    names = tuple(name for name, _, _ in launches)
    return KnownAnswer(names, run, expected, allowed, lambda device: _cannot_run(launches, device))


def _answers() -> Iterator[KnownAnswer]:
    for dtype, kernels in KERNELS.items():
        for kernel in kernels:
            yield _answer(kernel, dtype, kernel.launches(kernel.tried, dtype), kernel.launch)
    known: set[str] = set()
    for band in BANDS:
        launches = STAGES.launches(STAGES.tried, torch.float64, band.rows)
        new = [each for each in launches if each[0] not in known]
        known.update(name for name, _, _ in new)
        yield _answer(STAGES, torch.float64, new, partial(STAGES.launch, like=band.rows))
    yield KnownAnswer((rank_kernel.KERNEL,), rank_kernel.tried, rank_kernel.ANSWER, 1e-11)


known_answers.register(*_answers())
