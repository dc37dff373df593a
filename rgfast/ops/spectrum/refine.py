"""Small singular values that a Gram matrix loses, recovered from the data (derivation in the README).

Arithmetic on values and bounds is NumPy's on the CPU. Those of a GPU stay there, and all that is read of them
is which matrices go on to another stage, once a stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rgfast.ops.spectrum import reference
from rgfast.ops.spectrum.measures import (
    TINY,
    UNIT_ROUNDOFF,
    array_on_cpu,
    at_least,
    entropy_error,
    library_of,
)

__all__ = [
    "SMALL",
    "STAGES",
    "LibraryStages",
    "Stage",
    "Stages",
    "gram_error",
    "refined",
]

_U = UNIT_ROUNDOFF[torch.float64]
SMALL = 1e-6  # eigenvalues under this share of the largest are computed again
STAGES = 3  # beyond, what is left is under u sigma_1 and no algorithm knows it


@dataclass(frozen=True)
class Stage:
    """What one stage has computed of each of `l` matrices, as arrays or, off the CPU, tensors.

    `values[l, m]` are the eigenvalues of the moment, ascending, and `trace[l]` its trace; `leading[l]` is the
    number of eigenvectors that are taken out before the next stage, 0 where no value is small, and
    `residual[l]` is the norm of A V - V Lambda of these, as far as it is not the rounding of A itself.
    """

    values: Any
    trace: Any
    leading: Any
    residual: Any


class Stages(Protocol):
    """Moments of a batch, stage after stage, each of what the stage before has left."""

    def __call__(self, live: Any, stage: int) -> Stage:
        """The next stage of matrices `live[l]`, a subset of those of the stage before."""


def gram_error(unit: float, terms: Any, accumulated: Any, top: Any, m: int) -> Any:
    """Bound on every eigenvalue of a moment summed over `terms` rows in tiles and then solved."""
    if isinstance(terms, Tensor):
        chain = terms.minimum(reference.TILE + (terms.double() / reference.TILE).ceil()) + 4
    elif isinstance(accumulated, Tensor):
        chain = min(terms, reference.TILE + math.ceil(terms / reference.TILE)) + 4
    else:
        chain = np.minimum(terms, reference.TILE + np.ceil(np.divide(terms, reference.TILE))) + 4
    return unit * (chain * accumulated + max(50, m / 2) * top)


def refined(
    stages: Stages, terms: int, accumulated: Any, limit: Any, rtol: float, first: Stage
) -> tuple[Any, Any]:
    """Singular values `[b, m]`, descending, no more than `limit[b]` of them not zero, and their error bounds.

    The eigenvectors of the Gram matrix with large eigenvalues span what it knows. Without their directions
    the data have a Gram matrix of their own, in which the values that were small are large. Again, until the
    bound on the relative error of the effective rank is under `rtol` or nothing is left to gain. `first` is
    stage 0 of all matrices, summed over `terms` rows. Arrays give arrays, tensors tensors where they are.
    """
    xp = library_of(first.values)
    b, m = first.values.shape
    column, live = _count(m, first.values), _count(b, first.values)
    sigma, error = xp.zeros_like(first.values), xp.zeros_like(first.values)
    settled = xp.zeros_like(live)
    floor = 2 * _U * xp.sqrt(accumulated)
    coupling: list[tuple[Any, Any]] = []
    found, trace = first, accumulated
    for stage in range(STAGES):
        if stage:
            found = stages(live, stage)
            trace = found.trace
        value = at_least(xp.flip(found.values, (1,)), 0.0)
        epsilon = gram_error(_U, terms, trace, value[:, 0], m)
        doubt = _root_error(value, epsilon[:, None]) + floor[:, None]
        for gap_from, strength in coupling:
            doubt = doubt + _root_error(value, _moved(value, gap_from, strength))
        # What was taken out is as many zeros at the end; the rest follows what is settled.
        place = column - settled[live, None]
        taken = at_least(place, 0)
        sigma[live] = xp.where(place < 0, sigma[live], _along(xp.sqrt(value), taken))
        error[live] = xp.where(place < 0, error[live], _along(doubt, taken))
        if stage == STAGES - 1 or (stage and rtol == math.inf):
            break
        more = found.leading > 0
        if stage:
            known = column < limit[live, None]
            more &= entropy_error(sigma[live] * known, error[live] * known, limit[live]) > rtol
        at = np.flatnonzero(more) if xp is np else more.nonzero()[:, 0]
        if not len(at):
            break
        live, k, norm = live[at], found.leading[at], xp.sqrt(trace[at])
        coupling = [(gap_from[at], strength[at]) for gap_from, strength in coupling]
        coupling.append((value[at, k - 1], (epsilon + found.residual)[at]))
        settled[live] += k
        floor = floor[at] + norm * _projection_error(m, k)
    return _descending(sigma, error, limit)


def _count(n: int, like: Any) -> Any:
    """0 to n − 1, as an array or a tensor."""
    if isinstance(like, Tensor):
        return torch.arange(n, dtype=torch.int64, device=like.device)
    return np.arange(n)


def _along(x: Any, column: Any) -> Any:
    """The entries of `x[l, m]` in these columns of their rows."""
    return x.gather(1, column) if isinstance(x, Tensor) else np.take_along_axis(x, column, 1)


def _moved(value: Any, gap_from: Any, strength: Any) -> Any:
    """Bound on what a coupling of given strength moves eigenvalues that lie so far below others."""
    gap = library_of(value).maximum(gap_from[:, None] - value, at_least(strength[:, None], TINY))
    return strength[:, None] * (strength[:, None] / gap)


def _projection_error(m: int, k: Any) -> Any:
    """What taking k of m directions out rounds, of the norm of the data.

    Products with k vectors of m entries, their difference from the data, and what the vectors lack in
    orthogonality.
    """
    root = k.double().sqrt() if isinstance(k, Tensor) else np.sqrt(k)
    return _U * (2 * m * root + (k + 2) * (1 + root))


def _descending(sigma: Any, error: Any, limit: Any) -> tuple[Any, Any]:
    xp = library_of(sigma)
    by = {"dim": 1, "stable": True} if xp is torch else {"axis": 1, "kind": "stable"}
    order = xp.argsort(-sigma, **by)
    known = _count(sigma.shape[1], sigma) < limit[:, None]
    return xp.where(known, _along(sigma, order), 0.0), xp.where(known, _along(error, order), 0.0)


class LibraryStages:
    """Stages by torch's batched products and eigenvectors, of fp64 `tall[b, n, m]`."""

    def __init__(self, tall: Tensor) -> None:
        self._part, self._live = tall, _count(len(tall), tall)
        self._settled = torch.zeros_like(self._live)
        self._leading, self._vectors = self._settled, tall.new_zeros(len(tall), tall.shape[2], 0)

    def __call__(self, live: Any, stage: int) -> Stage:
        live = torch.as_tensor(live, dtype=torch.int64, device=self._live.device)
        at = torch.searchsorted(self._live, live)
        part, vectors = self._part[at], self._vectors[at]
        if stage:
            part = part - (part @ vectors) @ vectors.mT
        m = part.shape[2]
        matrix = part.new_zeros(len(part), m, m)
        for row in range(0, part.shape[1], reference.TILE):
            rows = part[:, row : row + reference.TILE]
            matrix = torch.baddbmm(matrix, rows.mT, rows)
        values, vectors = torch.linalg.eigh(matrix)
        settled = self._settled[at] + self._leading[at]
        large = (values >= SMALL * values[:, -1:]).sum(1)
        leading = torch.where((large + settled < m) & (values[:, -1] > 0), large, 0)
        taken = _count(m, part) >= (m - leading)[:, None]
        self._part, self._live = part, live
        self._settled, self._leading, self._vectors = settled, leading, vectors * taken[:, None, :]
        trace = matrix.diagonal(dim1=1, dim2=2).sum(1)
        return Stage(*map(array_on_cpu, (values, trace, leading, torch.zeros_like(trace))))


def _root_error(value: Any, error: Any) -> Any:
    """Bound on the square root of what errs by `error`: |a - b| / (sqrt a + sqrt b), and sqrt|a - b|."""
    xp = library_of(value)
    return error / xp.maximum(xp.sqrt(value), at_least(xp.sqrt(error), TINY))
