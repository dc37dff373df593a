"""The ops of this room and their implementations.

`spectrum` and `gram` take a call `Rows` and return (eigenvalues `[b, m]` or Gram matrix `[b, m, m]`,
accumulated trace `[b]`, exponent `[b]`, rank limit `[b]`) as described in `reference.py`; `eigvalsh` takes a
`Symmetric`. `RANKS` is the fused variant of `spectrum` that goes on to effective ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rgfast.dispatch import Impl, Op
from rgfast.ops.device import LAUNCH, STREAM, TRANSFER, WAIT
from rgfast.ops.spectrum import ranks, reference
from rgfast.ops.spectrum.call import Both, Ranks, Rows, Symmetric, Values
from rgfast.ops.spectrum.impl import cuda, library, native
from rgfast.ops.spectrum.rank_kernel import table_cost
from rgfast.runtime.threads import no_autocast, on_one_thread, one_thread

__all__ = ["BOTH", "EIGVALSH", "GRAM", "RANKS", "SPECTRUM", "TABLE"]

Found = tuple[Tensor, Tensor, Tensor, Tensor]

# fp64 products of PyTorch on one thread, and how much longer its passes over the data take (README, "Speed").
_PRODUCTS, _PASSES = 12e9, 30.0
_CORES = 8


def _reference_gram(call: Rows) -> Found:
    with one_thread(), no_autocast(call.device.type):  # the library's bits depend on the number of threads
        return reference.gram(call.x, centering=call.centering, dtype=call.dtype, means=call.means)


def _reference_spectrum(call: Rows) -> Found:
    with one_thread(), no_autocast(call.device.type):
        if call.matrix is not None:
            found = reference.gram(call.x, centering=call.centering, dtype=call.dtype, means=call.means)
            call.matrix.copy_(found[0])
        return reference.gram_spectrum(call.x, centering=call.centering, dtype=call.dtype, raw=call.raw)


def _gram_cost(call: Rows) -> float:
    if call.device.type != "cpu":  # twice the passes and launches
        return 2.0 * library.GRAM.cost(call)
    return 1e-4 + call.x.numel() * (call.side + _PASSES) / _PRODUCTS


def _solving_cost(call: Rows) -> float:
    return library.solving(len(call.x), call.side, call.dtype, call.device)


def _reference_eigvalsh(call: Symmetric) -> Tensor:
    return library.finite(on_one_thread(reference.eigvalsh, call.a))


def _solved_on_the_cpu(call: Symmetric) -> Tensor:
    """By the fastest for matrices on the CPU, which they are copied to."""
    values: Tensor = EIGVALSH("auto", Symmetric(call.a.to("cpu")))
    return values.to(call.device)


def _on_the_cpu_cost(call: Symmetric) -> float:
    """Two copies, and compiled kernels on cores such as a GPU usually comes with."""
    solving = native.EIGVALSH.cost(call) / _CORES
    return 4 * WAIT + call.a.nbytes / TRANSFER + solving


def _in_parts(call: Rows) -> Found:
    """The moment, then its eigenvalues, each by the fastest for it: for matrices too large for one pass."""
    means = call.means
    if call.raw is not None and means is None:
        means = torch.empty((len(call.x), call.side), dtype=torch.float64, device=call.device)
    matrix, accumulated, exponent, limit = GRAM("auto", call._replace(raw=None, means=means, matrix=None))
    if call.matrix is not None:
        call.matrix.copy_(matrix)
    bad = ~torch.isfinite(accumulated)
    matrix[bad] = 0.0
    values = EIGVALSH("auto", Symmetric(matrix))
    if call.raw is not None and means is not None:
        means[bad] = 0.0
        with one_thread():  # new tensors, whose product is the library's
            lifted = matrix.baddbmm_(means[:, :, None], means[:, None, :], alpha=call.x.shape[1])
        call.raw.copy_(EIGVALSH("auto", Symmetric(lifted)))
    return values, accumulated, exponent, limit


EIGVALSH = Op(
    "eigvalsh",
    [
        native.EIGVALSH,
        cuda.EIGVALSH,
        library.EIGVALSH,
        Impl(
            "on the CPU",
            _solved_on_the_cpu,
            lambda call: None if library.loops("cuda") else "torch solves whole batches on the GPU",
            cost=_on_the_cpu_cost,
            devices=("cuda",),
            missing=native.EIGVALSH.missing,
            route=True,
        ),
        Impl("reference", _reference_eigvalsh, cost=library.EIGVALSH.cost),
    ],
)


def _in_one_batch(call: Both) -> Tensor:
    """A batch of all takes a device little longer than half of it."""
    a, mean = call.a, call.mean
    both = a.new_empty(2, *a.shape)
    both[0] = a
    torch.addcmul(a, mean[:, :, None], mean[:, None], out=both[1])
    values: Tensor = EIGVALSH("auto", Symmetric(both))
    return values


def _in_one_batch_cost(call: Both) -> float:
    """Of twice the matrices, which are written first."""
    a = call.a
    return 3 * LAUNCH + 5 * a.nbytes / STREAM + EIGVALSH.cost(Symmetric(a.expand(2, *a.shape)))


BOTH = Op(
    "both eigvalsh",
    [cuda.BOTH, Impl("in one batch", _in_one_batch, cost=_in_one_batch_cost, route=True)],
    part_of="eigvalsh",
)
GRAM = Op("gram", [native.GRAM, library.GRAM, Impl("reference", _reference_gram, cost=_gram_cost)])
SPECTRUM = Op(
    "spectrum",
    [
        native.SPECTRUM,
        cuda.SPECTRUM,
        library.SPECTRUM,
        Impl(
            "parts",
            _in_parts,
            lambda call: "precision='single' is the reference's" if call.dtype != torch.float64 else None,
            lambda call: 1e-5 + GRAM.cost(call) + _solving_cost(call),
            ("cpu",),
            route=True,
        ),
        Impl("reference", _reference_spectrum, cost=lambda call: _gram_cost(call) + _solving_cost(call)),
    ],
)
RANKS = Op("effective ranks", [native.RANKS], part_of="spectrum")


def _by_itself(run: Callable[[Values], Ranks]) -> Callable[[Values], Ranks]:
    def outside_autocast(call: Values) -> Ranks:
        with no_autocast(call.device.type):
            return run(call)

    return outside_autocast


TABLE = Op(
    "rank table",
    [
        cuda.TABLE,
        Impl("library", _by_itself(ranks.together), cost=lambda call: table_cost(call, 90)),
        Impl("reference", _by_itself(ranks.by_kind), cost=lambda call: table_cost(call, 120)),
    ],
    part_of="spectrum",
)
