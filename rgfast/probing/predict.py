"""How long a probe takes: products counted by kind, and what this machine needs for a few of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch

from rgfast.ops.cka.api import alignment
from rgfast.ops.spectrum import eigvalsh
from rgfast.ops.spectrum.rows import refine_spectra, spectra_of_rows
from rgfast.probing.estimators.row_measures import measure_rows
from rgfast.probing.plan import Plan
from rgfast.streaming import pair_keys, state_bytes

__all__ = ["ESTIMATORS", "Foreseen", "Work", "added_seconds", "best_time", "work_of"]

# What is timed is no larger than this: matrices, rows and features of each, layers to compare.
_MATRICES, _ROWS, _FEATURES, _LAYERS = 8, 512, 256, 6
# What eigenvectors cost over a Cholesky factorization and an inverse of the same size.
_EIGENVECTORS = 20


@dataclass(frozen=True)
class Foreseen:
    """The estimator that some sequences lead to, why, what it measures and how many bytes it holds.

    ``deficient`` says of how many spectra of each layer, centered and as they are, moments lose small values,
    as far as these sequences show it (none: it is not known).
    """

    estimator: str
    why: str
    plan: Plan
    state_bytes: int
    deficient: tuple[int, ...] = ()


@dataclass(frozen=True)
class Factors:
    """How much more an estimator takes than is counted for it, by kind, and seconds for the rest."""

    moments: float
    eigenvalues: float
    kernels: float
    copies: float
    factors: float
    fixed: float


# Fitted to the cases of benchmarks/plan_cost.py.
ESTIMATORS = {
    "tiles": Factors(moments=1.0, eigenvalues=1.0, kernels=1.0, copies=1.0, factors=0.0, fixed=0.01),
    "rows": Factors(moments=1.0, eigenvalues=1.0, kernels=1.0, copies=5.0, factors=0.0, fixed=0.01),
    # Every spectrum is solved centred and not, and CKA of moments is taken from their squares.
    "moments": Factors(moments=1.5, eigenvalues=18.0, kernels=0.0, copies=5.0, factors=10.0, fixed=0.01),
}


@dataclass(frozen=True)
class Work:
    """What an estimator computes: fp64 multiplications of moments, (matrices, rows) of eigenvalues,
    multiplications of Grams or of cross moments of rows, bytes that are read or written, multiplications of
    triangular factors, and (matrices, rows, features) of spectra that are refined from their rows."""

    moments: float
    eigenvalues: tuple[tuple[int, int], ...]
    kernels: float
    bytes: float
    factors: float = 0.0
    refined: tuple[tuple[int, int, int], ...] = ()


def work_of(
    estimator: str, plan: Plan, sequences: int, *, uncentred: bool, deficient: Sequence[int] = ()
) -> Work:
    """What measuring ``sequences`` takes by one of ``ESTIMATORS``, beside the model's own forward.

    ``deficient`` is that of :class:`Foreseen`.
    """
    deficient = deficient or (0,) * len(plan.widths)
    if estimator == "moments":
        return _of_moments(plan, sequences, deficient)
    return _of_rows(plan, sequences, uncentred, deficient)


def _data_matrices(plan: Plan, sequences: int) -> list[tuple[int, int]]:
    """(how many, rows of each) that measures are taken of, in all views."""
    positional = sum(view in plan.views for view in ("visible", "masked", "position"))
    found = [(positional * len(plan.positions), sequences)]
    found += [(1, sequences * plan.length)] * (("pooled" in plan.views) + len(plan.chosen))
    return [*found, *[(1, sequences)] * ("mean_pooled" in plan.views)]


def _variants(plan: Plan) -> int:
    return 1 + plan.groups if plan.groups > 1 else 1


def _of_rows(plan: Plan, sequences: int, uncentred: bool, deficient: Sequence[int]) -> Work:
    """Positions and means from their rows; pooled moments are sums of the positions' own."""
    variants, moments, kernels = _variants(plan), _of_maps(plan, sequences, deficient, by_rows=True), 0.0
    eigenvalues: list[tuple[int, int]] = []
    refined: list[tuple[int, int, int]] = []
    for count, rows in _data_matrices(plan, sequences):
        for width, spectra in zip(plan.widths, deficient, strict=True):
            side = min(rows, width)
            if rows == sequences or sequences < width:
                moments += count * rows * width * side
            if spectra and rows > width:  # fewer rows have no value that small
                again = variants if rows == sequences else 1
                refined.append((count * spectra * again, rows, width))
            centrings = 2 if uncentred and rows < width else 1
            eigenvalues.append((count * variants * centrings, side))
        kernels += count * products(rows, plan.widths, plan.pairs)
    moved = 4.0 * sequences * plan.length * sum(plan.widths)
    return Work(moments, tuple(eigenvalues), kernels, moved, refined=tuple(refined))


def _of_maps(plan: Plan, sequences: int, deficient: Sequence[int], *, by_rows: bool) -> float:
    """Multiplications of the maps that predict targets, of every group of every view."""
    total = 0.0
    for count, rows in _data_matrices(plan, sequences) if plan.targets else ():
        for width, spectra in zip(plan.widths, deficient, strict=True):
            side = min(rows, width) if by_rows else width
            singular = spectra > 0 or rows < side
            total += count * plan.groups * side**3 * (_EIGENVECTORS if singular else 1)
            total += 2.0 * count * rows * width * side if by_rows else 0.0
    return total


def _of_moments(plan: Plan, sequences: int, deficient: Sequence[int]) -> Work:
    """Sums as the batches come, in fp64; then every state is read for eigenvalues and kernels."""
    variants = _variants(plan)
    eigenvalues = [
        (count * variants, width) for count, _ in _data_matrices(plan, sequences) for width in plan.widths
    ]
    state = sum(state_bytes(h.widths, h.positions, h.pairs) for h in plan.accumulators)
    moved = 8.0 * sequences * plan.length * sum(plan.widths) + 8.0 * variants * state
    summed = replace(plan, refine=False).flops_per_sequence * sequences / 2
    factors = plan.flops_per_sequence * sequences / 2 - summed
    if sequences >= max(plan.widths) and not plan.refine:  # layers that are not deficient drop theirs
        factors *= sum(spectra > 0 for spectra in deficient) / len(deficient)
    summed += _of_maps(plan, sequences, deficient, by_rows=False)
    return Work(summed, tuple(eigenvalues), 0.0, moved, factors)


def products(rows: int, widths: tuple[int, ...], pairs: Any) -> float:
    """Multiplications of the kernels of some pairs of layers, over samples or features, the fewer."""
    keys = pair_keys(pairs, len(widths))
    features = sum(float(widths[i]) * widths[j] * (1 if i == j else 2) for i, j in keys)
    return 0.5 * rows * min(rows * (sum(widths) + 2.0 * len(keys)), features)


def added_seconds(
    estimator: str, plan: Plan, sequences: int, *, uncentred: bool, deficient: Sequence[int] = ()
) -> float:
    """Seconds that measuring adds to the forward, by the speed of a few products of each kind."""
    work = work_of(estimator, plan, sequences, uncentred=uncentred, deficient=deficient)
    factors = ESTIMATORS[estimator]
    width = max(plan.widths)
    threads = torch.get_num_threads()
    spent = factors.moments * work.moments + factors.factors * work.factors
    multiplication = _moment(min(width, _FEATURES), threads)
    spent *= multiplication
    for count, side in work.eigenvalues:
        timed = min(side, _FEATURES)
        spent += factors.eigenvalues * count * _eigenvalue(timed, threads) * (side / timed) ** 3
    # Moments that are pooled come first, and without a second stage.
    alone = plan.groups == 1 and "pooled" in plan.views
    for count, of, side in work.refined:
        rows, timed = min(of, _ROWS), min(side, _FEATURES)
        each = _refinement(rows, timed, alone, threads) * (side / timed) ** 2
        spent += count * (each + (of - rows) * side**2 * multiplication)
    if work.kernels:
        rows, layers = min(sequences, _ROWS), min(len(plan.widths), _LAYERS)
        each = _kernel(rows, min(width, _FEATURES), layers, plan.pairs != "all", threads)
        spent += factors.kernels * work.kernels * each
    return spent + factors.copies * work.bytes * _byte(threads) + factors.fixed


def best_time(run: Callable[[], object], *, budget: float = 0.05, most: int = 5) -> float:
    """The least seconds of a few runs after a first one, of one if they take longer than ``budget``."""
    run()
    best, begun = float("inf"), time.perf_counter()
    for _ in range(most):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begun > budget:
            break
    return best


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")


# Seconds of one multiplication or eigenvalue problem, once for each size and number of threads.


@lru_cache(maxsize=64)
def _eigenvalue(side: int, threads: int) -> float:
    """Of a matrix of ``side`` rows, several at once."""
    x = _random(_MATRICES, 2 * side, side).double()
    grams = x.mT @ x
    return best_time(lambda: eigvalsh(grams)) / _MATRICES


@lru_cache(maxsize=64)
def _moment(width: int, threads: int) -> float:
    x = _random(_MATRICES, _ROWS, width)
    both = best_time(lambda: spectra_of_rows(x, uncentred=True))
    alone = _MATRICES * _eigenvalue(min(_ROWS, width), threads)
    return max(both - alone, 0.1 * both) / (_MATRICES * _ROWS * width * min(_ROWS, width))


@lru_cache(maxsize=64)
def _refinement(rows: int, width: int, alone: bool, threads: int) -> float:
    """Of one spectrum of rows of which one direction is rounding, as a LayerNorm leaves them: ``alone``, or
    along with its moment."""
    full = _random(_MATRICES, rows, width)
    lacking = full.clone()
    lacking[..., -1] = -lacking[..., :-1].sum(-1)
    if alone:
        every = torch.arange(_MATRICES, dtype=torch.int64, device="cpu")
        found = spectra_of_rows(lacking, uncentred=False)
        assert found is not None
        solved = found[0]
        return best_time(lambda: refine_spectra(lacking, solved.of(every), every, centering="mean")) / len(
            every
        )
    measure = partial(measure_rows, adjacent=True, uncentred=True, compared=False)
    plain, again = (best_time(partial(measure, x[None])) for x in (full, lacking))
    return max(again - plain, 0.0) / (2 * _MATRICES)


@lru_cache(maxsize=64)
def _kernel(rows: int, width: int, layers: int, adjacent: bool, threads: int) -> float:
    # Layers far apart: none is read again in fp64.
    states = list(_random(layers, 2, max(rows, 4), width))
    pairs = "adjacent" if adjacent else "all"
    counted = 2 * products(max(rows, 4), (width,) * layers, pairs)
    return best_time(lambda: alignment(states, adjacent=adjacent)) / counted


@lru_cache(maxsize=4)
def _byte(threads: int) -> float:
    x = torch.empty(1 << 21, dtype=torch.float32, device="cpu").fill_(1.0)
    return best_time(x.clone) / (2 * x.nbytes)
