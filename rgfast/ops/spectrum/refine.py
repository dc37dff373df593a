"""Small singular values that a Gram matrix loses, recovered from the data (derivation in the README)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgfast.ops.spectrum import reference
from rgfast.ops.spectrum.measures import TINY, UNIT_ROUNDOFF, Array, entropy_error

__all__ = ["gram_error", "refined"]

_U = UNIT_ROUNDOFF[torch.float64]
_SMALL = 1e-6  # eigenvalues under this share of the largest are computed again
_LEVELS = 3  # beyond, what is left is under u sigma_1 and no algorithm knows it


def gram_error(unit: float, terms: Any, accumulated: Any, top: Any, m: int) -> Any:
    """Bound on every eigenvalue of a moment summed over `terms` rows in tiles and then solved."""
    if isinstance(terms, Tensor):
        chain = terms.minimum(reference.TILE + (terms.double() / reference.TILE).ceil()) + 4
    elif isinstance(accumulated, Tensor):
        chain = min(terms, reference.TILE + math.ceil(terms / reference.TILE)) + 4
    else:
        chain = np.minimum(terms, reference.TILE + np.ceil(np.divide(terms, reference.TILE))) + 4
    return unit * (chain * accumulated + max(50, m / 2) * top)


def refined(tall: Tensor, accumulated: Tensor, limit: int, rtol: float) -> tuple[Array, Array]:
    """Singular values `[m]` of fp64 `tall[n, m]`, descending, and a bound `[m]` on the error of each.

    The eigenvectors V_s of the Gram matrix with small eigenvalues span what it has lost; the data times V_s
    have a Gram matrix of their own, in which the same values are large. Again, until the bound on the
    relative error of the effective rank is under `rtol` or nothing is left to gain.
    """
    n = tall.shape[0]
    frobenius = math.sqrt(float(accumulated))
    part, floor = tall, 2 * _U * frobenius
    coupling: list[tuple[float, float]] = []
    sigma: list[Array] = []
    error: list[Array] = []
    for level in range(_LEVELS):
        matrix = _gram(part)
        trace = float(accumulated if level == 0 else matrix.diagonal().sum())
        width = part.shape[1]
        vector: Tensor | None = None
        if level == 0:
            eigenvalues, vector = torch.linalg.eigh(matrix)
        else:
            eigenvalues = torch.linalg.eigvalsh(matrix)
        value = np.maximum(eigenvalues.cpu().numpy()[::-1], 0.0)
        epsilon = float(gram_error(_U, n, trace, float(value[0]), width))
        e = _root_error(value, epsilon) + floor
        for gap_from, strength in coupling:
            gap = np.maximum(gap_from - value, TINY)
            e = e + _root_error(value, np.minimum(strength, strength / gap * strength))
        done, doubt = np.concatenate([*sigma, np.sqrt(value)]), np.concatenate([*error, e])
        small = int((value < _SMALL * value[0]).sum())
        if small == 0:
            break
        if vector is None:
            bound = entropy_error(done[:limit], doubt[:limit], np.int64(limit))
            if level == _LEVELS - 1 or bound <= rtol:
                break
            vector = torch.linalg.eigh(matrix).eigenvectors
        sigma.append(np.sqrt(value[: width - small]))
        error.append(e[: width - small])
        coupling.append((float(value[width - small - 1]), epsilon))
        part = part @ vector[:, :small]
        # Every entry of the product is a sum of `width` terms; the rest is what V lacks in orthogonality.
        floor = floor + width * _U * small**0.5 * (frobenius if level == 0 else math.sqrt(trace))
    order = np.argsort(-done, kind="stable")
    done, doubt = done[order], doubt[order]
    done[limit:] = doubt[limit:] = 0.0
    return done, doubt


def _gram(part: Tensor) -> Tensor:
    total = torch.zeros((part.shape[1], part.shape[1]), dtype=part.dtype, device=part.device)
    for row in range(0, part.shape[0], reference.TILE):
        rows = part[row : row + reference.TILE]
        total = torch.addmm(total, rows.mT, rows)
    return total


def _root_error(value: Array, error: float | Array) -> Array:
    """Bound on the square root of what errs by `error`: |a - b| / (sqrt a + sqrt b), and sqrt|a - b|."""
    root = np.sqrt(error)
    bound: Array = error / np.maximum(np.sqrt(value), np.maximum(root, TINY))
    return bound
