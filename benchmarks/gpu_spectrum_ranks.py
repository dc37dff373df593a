"""What effective ranks of a batch, and estimates of very wide ones, are predicted to take on an H100.

    python benchmarks/gpu_spectrum_ranks.py

No GPU is needed and none is used: every figure of the package is PREDICTED. Its own code is run on tensors
without data, operator by operator (`gpu_clock.py`), with the eigenvalue kernels' model of time
(`gpu_spectrum.py`, `gpu_spectrum_stages.py`) in place of their launches.

`effective_rank` of fp32 data is compared with `torch.linalg.svdvals` of the same, which was measured on an
H100 for few matrices of each size and solves one after another: its time for a batch is taken to be so many
times that of one. `torch.linalg.eigvalsh` of 4,096 rows was not measured: it is extrapolated from the times
of cuSOLVER's batches at 512 and 1,024 rows, once as they grow between these and once by operations, n³.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from gpu_clock import Cost, timed, uncounted
from gpu_spectrum import measured
from gpu_stand_in import solved
from torch import Tensor

import rgfast
from rgfast.ops.device import LAUNCH
from rgfast.ops.spectrum.impl import cuda
from rgfast.ops.spectrum.impl.cuda import kernel_for
from rgfast.ops.spectrum.lanczos import effective_rank_estimates
from rgfast.ops.spectrum.selection import SPECTRUM
from rgfast.ops.spectrum.stages import Stages

BATCH, SIDES, WANTED = 400, (64, 128, 256), 100
WIDE, FEW, WIDE_WANTED = 4096, 25, 10
# How many times as long cuSOLVER takes for eigenvectors, too. Assumed.
VECTORS = 3.0


class _Launched(NamedTuple):
    """Stands for the kernels of a size: they take what their model says, and give nothing."""

    name: str
    launches: int

    def launch(self, a: Tensor, means: Tensor | None, samples: float) -> tuple[Tensor, Tensor]:
        b, d = a.shape[:2]
        seconds = solved(b, d, ours=True) - LAUNCH
        with uncounted(host=self.launches * LAUNCH, device=seconds, kernels=self.launches):
            values = torch.empty_like(a[..., 0])
        return values, values


def _kernel_for(d: int, dtype: torch.dtype) -> _Launched:
    return _Launched("of this size", 3 if isinstance(kernel_for(d, dtype), Stages) else 1)


def _nothing(*args: Any) -> None:
    return None


def _in_order(x: Tensor) -> Tensor:
    """What the host is told of a batch: all is finite, and no matrix is in doubt."""
    told = torch.zeros(x.shape, dtype=x.dtype)
    told[:2] = 1
    return told


@contextlib.contextmanager
def _on_a_gpu() -> Iterator[None]:
    """Tensors without data are those of a GPU that has the kernels of eigenvalues."""
    there = dataclasses.replace(
        cuda.SPECTRUM, devices=("meta",), missing=_nothing, can_run=_nothing, unproven=_nothing
    )
    with (
        mock.patch.object(cuda, "kernel_for", _kernel_for),
        mock.patch.dict(SPECTRUM.impls, {"cuda": there}),
        mock.patch.object(SPECTRUM, "_chosen", {}),
        mock.patch.object(Tensor, "cpu", _in_order),
    ):
        yield


@functools.cache
def ranks(batch: int, d: int) -> Cost:
    """Of the effective ranks of fp32 data of 4 d rows."""
    x = torch.empty(batch, 4 * d, d, device="meta")
    with _on_a_gpu():
        return timed(lambda: rgfast.effective_rank(x, impl="cuda"))


@contextlib.contextmanager
def _solving() -> Iterator[None]:
    """Eigenvectors take what cuSOLVER does for eigenvalues, several times, and a wait."""

    def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
        seconds = VECTORS * solved(math.prod(a.shape[:-2]), a.shape[-1])
        with uncounted(host=LAUNCH, device=seconds, waits=1):
            return torch.empty_like(a[..., 0]), torch.empty_like(a)

    with mock.patch.object(torch.linalg, "eigh", eigh):
        yield


@functools.cache
def estimates(batch: int, d: int) -> Cost:
    """Of the effective ranks of moments of d rows by Lanczos, with their intervals."""
    moments = torch.empty(batch, d, d, dtype=torch.float64, device="meta")
    with _on_a_gpu(), _solving():
        return timed(lambda: effective_rank_estimates(moments, "singular"))


def by_svdvals(d: int) -> float:
    """Seconds of one matrix, as measured."""
    return 1e-6 * dict(measured()["svdvals"])[d]


def by_eigvalsh(d: int) -> tuple[float, float]:
    """Seconds of one fp64 matrix in a batch, extrapolated: as measured times grow, and by n³."""
    each = {n: us for size, n, batch, us, _ in measured()["cusolver_staged"] if (size, batch) == (8, 64)}
    grows = math.log2(each[1024] / each[512])
    known = 1e-6 * each[1024]
    return known * (d / 1024) ** grows, known * (d / 1024) ** 3


def table_of_ranks() -> str:
    """Over `torch.linalg.svdvals`."""
    lines = ["| d, n = 4 d | `svdvals`, measured | ours | of that eigenvalues | times faster | wanted |"]
    lines.append("|---|---|---|---|---|---|")
    for d in SIDES:
        theirs, ours, kernel = (
            by_svdvals(d),
            ranks(BATCH, d).seconds / BATCH,
            solved(BATCH, d, ours=True) / BATCH,
        )
        each = f"{1e6 * theirs:.0f} | {1e6 * ours:.3g} | {1e6 * kernel:.3g}"
        lines.append(f"| {d} | {each} | {theirs / ours:.0f} | {WANTED} |")
    return "\n".join(lines)


def table_of_estimates() -> str:
    """Over `torch.linalg.eigvalsh`."""
    lines = [
        "| matrices | ours, ms | `eigvalsh`, extrapolated, ms | times faster | wanted |",
        "|---|---|---|---|---|",
    ]
    for batch in (1, FEW):
        ours, theirs = estimates(batch, WIDE).seconds, [batch * each for each in by_eigvalsh(WIDE)]
        low, high = (f"{1e3 * each:.0f}" for each in theirs)
        times = " to ".join(f"{each / ours:.1f}" for each in theirs)
        lines.append(
            f"| {batch} of {WIDE:,} | {1e3 * ours:.0f} | {low} to {high} | {times} | {WIDE_WANTED} |"
        )
    return "\n".join(lines)


def main() -> None:
    print(f"PREDICTED, not run on a GPU: effective ranks of {BATCH} matrices of fp32 data, us per matrix\n")
    print(table_of_ranks())
    print("\nPREDICTED, not run on a GPU: effective ranks of moments by Lanczos, with their intervals\n")
    print(table_of_estimates())
    cost = estimates(FEW, WIDE)
    print(f"\nOf {FEW}: {cost.kernels} kernels, {cost.waits} waits, {1e3 * cost.host:.0f} ms of the host and")
    left = ", ".join(f"{name} x {count}" for name, count in cost.unknown.items()) or "nothing"
    print(f"{1e3 * cost.device:.0f} ms of the device; left out: {left}")


if __name__ == "__main__":
    main()
