"""The code of a probe that runs on a GPU, run on stand-ins of its tensors: what is patched for that."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import gpu_spectrum
import gpu_spectrum_stages
import predict_moments
import torch
from gpu_clock import LEAST_KERNEL, PASS, STAND_IN, VIEW, Clock, uncounted
from torch import Tensor

from rgfast.dispatch import Impl
from rgfast.ops.cka.api import OP as CKA
from rgfast.ops.device import LAUNCH
from rgfast.ops.moments.api import CENTERED, PAIRS, POOLED, POSITIONS, SURVEY
from rgfast.ops.moments.api import OP as MOMENTS
from rgfast.ops.moments.call import Batch, Centered, Moved, Products, Survey, Uncentered
from rgfast.ops.moments.centering import CENTERING
from rgfast.ops.moments.impl import cuda as kernels
from rgfast.ops.moments.impl import library as products
from rgfast.ops.spectrum import measures
from rgfast.ops.spectrum.call import Both, Ranks, Symmetric, Values
from rgfast.ops.spectrum.impl import cuda as eigen
from rgfast.ops.spectrum.impl import library as spectra
from rgfast.ops.spectrum.impl.cuda import kernel_for
from rgfast.ops.spectrum.rank_kernel import KERNEL
from rgfast.ops.spectrum.selection import BOTH, EIGVALSH, GRAM, SPECTRUM, TABLE
from rgfast.ops.spectrum.stages import Stages
from rgfast.probing import measured as measured_views
from rgfast.probing import plan
from rgfast.runtime import cuda, waiting
from rgfast.streaming import MomentAccumulator, Together, algebra, sizes

__all__ = ["as_on_a_gpu", "launches_alone", "solved"]

GPU = torch.device("cuda")


def solved(count: int, d: int, both: int = 1, *, ours: bool = False) -> float:
    """Seconds of the eigenvalues of so many matrices where torch has batches, or by a kernel if there is one
    for them, which then may find two spectra for each (``both`` is 2)."""
    kernel = kernel_for(d, torch.float64) if ours else None
    if kernel is not None:
        staged = isinstance(kernel, Stages)
        return (gpu_spectrum_stages if staged else gpu_spectrum).predicted(d, count, 8, both)
    assert both == 1
    with _torch_with_batches():
        return spectra.solving(count, d, torch.float64, GPU)


@contextlib.contextmanager
def _torch_with_batches() -> Iterator[None]:
    with mock.patch.object(torch, "__version__", "2.13.0"):
        yield


def _real(call: Products, width: int) -> Products:
    """The call at the real width, of tensors without data."""
    shape = Clock(width).shape

    def empty(x: Tensor) -> Tensor:
        return torch.empty(shape(x), dtype=x.dtype, device="meta")

    with uncounted():
        rows, shifts = ([empty(x) for x in some] for some in (call.rows, call.shifts))
        return call._replace(rows=rows, shifts=shifts, sums={key: empty(x) for key, x in call.sums.items()})


def _summed_by_kernels(call: Products, width: int) -> None:
    """The sums of a call, which the package's kernels make where `auto` would take them."""
    real = _real(call, width)
    if kernels.MOMENTS.cost(real) >= products.MOMENTS.cost(real):
        products.MOMENTS.run(call)
        return
    launches, seconds = predict_moments.of_call(real)
    # The table of pairs is sent as well, and memory is taken for norms.
    host = (launches + 1) * LAUNCH + 3 * VIEW
    with uncounted(host=host, device=seconds - launches * LAUNCH, kernels=launches + 1):
        products.MOMENTS.run(call)


def _centered_by_a_kernel(call: Uncentered, width: int) -> Centered:
    """Sums about means by the package's kernel, which reads all moments once, after a table was sent."""
    d, each = Clock(width).size(call.widths[0]), sum(call.positions)
    written = len(call.shifts) * d * (d + 3) / 2
    seconds = 8.0 * each * (len(call.sums) * (d + 2) ** 2 + written) / PASS
    with uncounted(host=2 * LAUNCH + 3 * VIEW, device=max(seconds, LEAST_KERNEL), kernels=2):
        found: Centered = products.CENTERED.run(call)
    return found


def _pooled_by_kernels(call: Moved, width: int) -> Tensor:
    """Sums of all positions by the package's kernels, of which the first reads all moments once."""
    positions, d, _ = call.sizes
    d = Clock(width).size(d)
    seconds = 8.0 * len(call.sums) * positions * (d + 2) ** 2 / PASS
    with uncounted(
        host=3 * LAUNCH + 3 * VIEW, device=max(seconds, LEAST_KERNEL) + 2 * LEAST_KERNEL, kernels=3
    ):
        found: Tensor = products.POOLED.run(call)
    return found


def _surveyed_by_a_kernel(call: Batch, width: int) -> Survey:
    """What is not finite and means of sequences by the package's kernel, which reads the rows that count
    once, after a table was sent; counts are zeroed before and added up after it."""
    clock, (sequences, positions) = Clock(width), call.lead
    rows, counts, strips = 0.0, 0.0, -(-max(clock.size(x.shape[2]) for x in call.layers) // 128)
    for x, keep in zip(call.layers, call.keeps, strict=True):
        with uncounted():
            some = 1.0 if keep is None else float(keep.double().mean())
        wide = clock.size(x.shape[2])
        rows += some * sequences * positions * wide * x.element_size() + 8.0 * sequences * wide * call.means
        counts += 4.0 * sequences * strips * positions
    seconds = max(rows / PASS, LEAST_KERNEL) + 2 * max(counts / PASS, LEAST_KERNEL) + LEAST_KERNEL
    host = 4 * LAUNCH + len(call.layers) * VIEW * call.means
    with uncounted(host=host, device=seconds, kernels=4):
        found: Survey = products.SURVEY.run(call)
    return found


def _solved_by_a_kernel(call: Symmetric, width: int) -> Tensor:
    """Eigenvalues by the package's kernel, or the library's where there is none for the size."""
    kernel = kernel_for(_side(call.a, width), torch.float64)
    launches = 0 if kernel is None else 3 if isinstance(kernel, Stages) else 1
    with uncounted(host=launches * LAUNCH, kernels=launches) if launches else contextlib.nullcontext():
        values: Tensor = spectra.EIGVALSH.run(call)
    return values


def _both_by_a_kernel(call: Both, width: int, counted: Counter[tuple[int, ...]]) -> Tensor:
    """The same of both spectra."""
    kernel = kernel_for(_side(call.a, width), torch.float64)
    if kernel is None:
        found: Tensor = BOTH.impls["in one batch"].run(call)
        return found
    launches = 4 if isinstance(kernel, Stages) else 2  # one puts both below each other
    with uncounted(host=launches * LAUNCH, kernels=launches):
        raw = torch.baddbmm(call.a, call.mean[:, :, None], call.mean[:, None])
        found = torch.linalg.eigvalsh(torch.stack([call.a, raw]))
    counted[len(call.a), _side(call.a, width), 2] += 1
    return found


def _table_by_a_kernel(run: Callable[[Values], Ranks], call: Values) -> Ranks:
    """All rank measures by the package's kernel; the diagonals that it reads are copied before."""
    with uncounted(host=2 * LAUNCH + 2 * VIEW, device=2 * LEAST_KERNEL, kernels=2):
        return run(call)


def _side(a: Tensor, width: int) -> int:
    return width if a.shape[-1] == STAND_IN else a.shape[-1]


@contextlib.contextmanager
def launches_alone() -> Iterator[None]:
    """Means and what is not finite, sums about means and of all positions, both spectra and rank measures go
    the way of the package's kernels, whose launches do nothing but fill what the host reads: what is left is
    the host's part. To be entered in :func:`as_on_a_gpu`."""

    def launch(kernel: str, *arguments: Any, device: torch.device) -> None:
        # Whatever is in memory may be numbers that take the host many times as long.
        if kernel in (KERNEL, CENTERING):
            arguments[-1 if kernel == KERNEL else -3].fill_(1.0)

    def survey(call: Batch) -> Survey:
        found: Survey = kernels.SURVEY.run(call)
        if found.means:
            torch._foreach_zero_(found.means)
        return found

    ops = (CENTERED, kernels.CENTERED), (POOLED, kernels.POOLED), (BOTH, eigen.BOTH), (TABLE, eigen.TABLE)
    ops += ((SURVEY, Impl("cuda", survey)),)
    with contextlib.ExitStack() as stack:
        for where, name, value in (
            (cuda, "launch", launch),
            (cuda, "capturing", lambda device: False),
            *((op, "impls", {"cuda": Impl("cuda", impl.run)}) for op, impl in ops),
            *((op, "_chosen", {}) for op, _ in ops),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        yield


@contextlib.contextmanager
def as_on_a_gpu(
    width: int, pending: int = plan._PENDING_BYTES, *, ours: bool = False
) -> Iterator[Counter[tuple[int, ...]]]:
    """The library's implementations are all there are, or those of the package's kernels (``ours``), no
    forward looks at values, and views, blocks of rows and products are cut as they would be at their real
    ``width``, with ``pending`` bytes of rows held back. Yields how often so many matrices of so many rows
    were solved at once, with a third number 2 if both spectra were found for each."""
    counted: Counter[tuple[int, ...]] = Counter()
    narrower = STAND_IN / width
    original, cut, add = spectra.eigenvalues, products.positions_at_once, products._add
    fits = products._fits_together

    def eigenvalues(a: Tensor) -> Tensor:
        counted[a.shape[:-2].numel(), _side(a, width)] += 1
        return original(a)

    def at_once(call: Products) -> int:
        return cut(_real(call, width))

    def few(part: MomentAccumulator) -> bool:
        return (rows := part.few) is not None and not part.factored and 2 * rows[0][0].shape[1] <= width

    def may_be_few(sums: MomentAccumulator) -> bool:
        return not sums._sums.summed and 2 * sums.rows_at_once <= width

    changes: list[tuple[Any, str, Any]] = [
        (Together, "few", staticmethod(few)),
        (MomentAccumulator, "_may_be_few", property(may_be_few)),
        (waiting, "_EVERYWHERE", True),
        (measures, "_elsewhere", lambda args: True),
        (products, "_APART", 0 if width >= products._APART else 1 << 30),
        (products, "_add", lambda *args, **given: add(*args, **given | {"here": False})),
        (products, "positions_at_once", at_once),
        (products, "_fits_together", lambda call: fits(_real(call, width))),
        (algebra, "_SMALL", int(algebra._SMALL * narrower)),
        (spectra, "eigenvalues", eigenvalues),
        (measured_views, "on_host", lambda found: found),  # all views have been brought together
        (plan, "_FLATTENED_WIDTH", int(plan._FLATTENED_WIDTH * narrower)),
        (plan, "_PENDING_BYTES", int(pending * narrower)),
        (sizes, "_AT_ONCE", int(sizes._AT_ONCE * narrower**2)),
    ]
    for op in (CENTERED, POOLED, SURVEY, MOMENTS, PAIRS, POSITIONS, EIGVALSH, GRAM, SPECTRUM, CKA):
        library = dataclasses.replace(
            op.impls["library"], by_name_only=lambda call: None, cost=lambda call: 0.0
        )
        if ours and op is MOMENTS:
            library = dataclasses.replace(library, run=partial(_summed_by_kernels, width=width))
        elif ours and op is CENTERED:
            library = dataclasses.replace(library, run=partial(_centered_by_a_kernel, width=width))
        elif ours and op is POOLED:
            library = dataclasses.replace(library, run=partial(_pooled_by_kernels, width=width))
        elif ours and op is SURVEY:
            library = dataclasses.replace(library, run=partial(_surveyed_by_a_kernel, width=width))
        elif ours and op is EIGVALSH:
            library = dataclasses.replace(library, run=partial(_solved_by_a_kernel, width=width))
        changes += [(op, "impls", {"library": library, "reference": op.impls["reference"]})]
        changes += [(op, "_chosen", {})]
    if ours:
        table = Impl("by a kernel", partial(_table_by_a_kernel, TABLE.impls["library"].run))
        changes += [(TABLE, "impls", TABLE.impls | {"by a kernel": table}), (TABLE, "_chosen", {})]
        run = partial(_both_by_a_kernel, width=width, counted=counted)
        alone = Impl("by a kernel", run)
        changes += [(BOTH, "impls", BOTH.impls | {"by a kernel": alone})]
        changes += [(BOTH, "_chosen", {})]
    with contextlib.ExitStack() as stack:
        for where, name, value in changes:
            stack.enter_context(mock.patch.object(where, name, value))
        yield counted
