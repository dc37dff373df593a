"""Small singular values that a Gram matrix loses, recovered from the data (derivation in the README)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rgfast.ops.spectrum import reference
from rgfast.ops.spectrum.measures import TINY, UNIT_ROUNDOFF, Array, entropy_error

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
    """What one stage has computed of each of `l` matrices.

    `values[l, m]` are the eigenvalues of the moment, ascending, and `trace[l]` its trace; `leading[l]` is the
    number of eigenvectors that are taken out before the next stage, 0 where no value is small, and
    `residual[l]` is the norm of A V - V Lambda of these, as far as it is not the rounding of A itself.
    """

    values: Array
    trace: Array
    leading: Array
    residual: Array


class Stages(Protocol):
    """Moments of a batch, stage after stage, each of what the stage before has left."""

    def __call__(self, live: Array, stage: int) -> Stage:
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
    stages: Stages, terms: int, accumulated: Array, limit: Array, rtol: float, first: Stage
) -> tuple[Array, Array]:
    """Singular values `[b, m]`, descending, no more than `limit[b]` of them not zero, and their error bounds.

    The eigenvectors of the Gram matrix with large eigenvalues span what it knows. Without their directions
    the data have a Gram matrix of their own, in which the values that were small are large. Again, until the
    bound on the relative error of the effective rank is under `rtol` or nothing is left to gain. `first` is
    stage 0 of all matrices, summed over `terms` rows.
    """
    b, m = first.values.shape
    column = np.arange(m)
    sigma, error = np.zeros((2, b, m))
    settled = np.zeros(b, dtype=np.int64)
    live = np.arange(b)
    floor = 2 * _U * np.sqrt(accumulated)
    coupling: list[tuple[Array, Array]] = []
    found, trace = first, accumulated
    for stage in range(STAGES):
        if stage:
            found = stages(live, stage)
            trace = found.trace
        value = np.maximum(found.values[:, ::-1], 0.0)
        epsilon = gram_error(_U, terms, trace, value[:, 0], m)
        doubt = _root_error(value, epsilon[:, None]) + floor[:, None]
        for gap_from, strength in coupling:
            doubt = doubt + _root_error(value, _moved(value, gap_from, strength))
        # What was taken out is as many zeros at the end; the rest follows what is settled.
        place = column - settled[live, None]
        taken = np.maximum(place, 0)
        root = np.take_along_axis(np.sqrt(value), taken, 1)
        sigma[live] = np.where(place < 0, sigma[live], root)
        error[live] = np.where(place < 0, error[live], np.take_along_axis(doubt, taken, 1))
        if stage == STAGES - 1:
            break
        more = found.leading > 0
        if stage:
            known = column < limit[live, None]
            more &= entropy_error(sigma[live] * known, error[live] * known, limit[live]) > rtol
        if not more.any():
            break
        live, k, norm = live[more], found.leading[more], np.sqrt(trace[more])
        coupling = [(gap_from[more], strength[more]) for gap_from, strength in coupling]
        coupling.append((value[more, k - 1], (epsilon + found.residual)[more]))
        settled[live] += k
        floor = floor[more] + norm * _projection_error(m, k)
    return _descending(sigma, error, limit)


def _moved(value: Array, gap_from: Array, strength: Array) -> Array:
    """Bound on what a coupling of given strength moves eigenvalues that lie so far below others."""
    gap = np.maximum(gap_from[:, None] - value, np.maximum(strength[:, None], TINY))
    moved: Array = strength[:, None] * (strength[:, None] / gap)
    return moved


def _projection_error(m: int, k: Array) -> Array:
    """What taking k of m directions out rounds, of the norm of the data.

    Products with k vectors of m entries, their difference from the data, and what the vectors lack in
    orthogonality.
    """
    error: Array = _U * (2 * m * np.sqrt(k) + (k + 2) * (1 + np.sqrt(k)))
    return error


def _descending(sigma: Array, error: Array, limit: Array) -> tuple[Array, Array]:
    order = np.argsort(-sigma, axis=1, kind="stable")
    sigma, error = np.take_along_axis(sigma, order, 1), np.take_along_axis(error, order, 1)
    dead = np.arange(sigma.shape[1]) >= limit[:, None]
    sigma[dead] = error[dead] = 0.0
    return sigma, error


class LibraryStages:
    """Stages by torch's batched products and LAPACK's eigenvectors, of fp64 `tall[b, n, m]`."""

    def __init__(self, tall: Tensor) -> None:
        self._part, self._live = tall, np.arange(len(tall))
        self._settled = np.zeros(len(tall), dtype=np.int64)
        self._leading, self._vectors = self._settled, tall.new_zeros(len(tall), tall.shape[2], 0)

    def __call__(self, live: Array, stage: int) -> Stage:
        at = np.searchsorted(self._live, live)
        here = torch.from_numpy(at).to(self._part.device)
        part, vectors = self._part[here], self._vectors[here]
        if stage:
            part = part - (part @ vectors) @ vectors.mT
        m = part.shape[2]
        matrix = part.new_zeros(len(part), m, m)
        for row in range(0, part.shape[1], reference.TILE):
            rows = part[:, row : row + reference.TILE]
            matrix = torch.baddbmm(matrix, rows.mT, rows)
        eigenvalues, vectors = torch.linalg.eigh(matrix)
        values = eigenvalues.cpu().numpy()
        settled = self._settled[at] + self._leading[at]
        large = (values >= SMALL * values[:, -1:]).sum(1)
        leading = np.where((large + settled < m) & (values[:, -1] > 0), large, 0)
        first = torch.from_numpy(m - leading).to(part.device)
        taken = torch.arange(m, dtype=torch.int64, device=part.device) >= first[:, None]
        self._part, self._live = part, live
        self._settled, self._leading, self._vectors = settled, leading, vectors * taken[:, None, :]
        trace = matrix.diagonal(dim1=1, dim2=2).sum(1).cpu().numpy()
        return Stage(values, trace, leading, np.zeros(len(live)))


def _root_error(value: Array, error: Array) -> Array:
    """Bound on the square root of what errs by `error`: |a - b| / (sqrt a + sqrt b), and sqrt|a - b|."""
    root = np.sqrt(error)
    bound: Array = error / np.maximum(np.sqrt(value), np.maximum(root, TINY))
    return bound
