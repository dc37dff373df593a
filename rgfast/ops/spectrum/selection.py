"""The ops of this room and their implementations.

`spectrum` and `gram` take a call `Rows` and return (eigenvalues `[b, m]` or Gram matrix `[b, m, m]`,
accumulated trace `[b]`, exponent `[b]`, rank limit `[b]`) as described in `reference.py`; `eigvalsh` takes a
`Symmetric`. `RANKS` is the fused variant of `spectrum` that goes on to effective ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgfast.dispatch import Impl, Op
from rgfast.ops.device import TRANSFER, WAIT
from rgfast.ops.spectrum import reference
from rgfast.ops.spectrum.call import Rows, Symmetric
from rgfast.ops.spectrum.impl import cuda, library, native
from rgfast.runtime.threads import no_autocast, on_one_thread, one_thread

__all__ = ["EIGVALSH", "GRAM", "RANKS", "SPECTRUM"]

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
