"""How far below 1 the slowest mode of a chain is, where its eigenvalue rounds to 1.

The eigenvalues 1 − z of a matrix say nothing of a z below 1e-16. The transition probabilities between its
nearly closed classes do, since they are small numbers of full precision: elimination without subtractions
(Grassmann, Taksar & Heyman, Oper. Res. 33, 1985; O'Cinneide, Numer. Math. 65, 1993) keeps their digits.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rgfast.chains.modes import Array

__all__ = ["period", "slowest_gap"]

# Beside the largest eigenvalue of the group inverse the others are known to this fraction of it.
_KNOWN = 1e-6


def period(matrix: Array, stationary: Array) -> int:
    """The greatest common divisor of the lengths of all cycles through recurrent states."""
    live = np.flatnonzero(stationary > 0)
    follows = matrix[np.ix_(live, live)] > 0
    level = np.full(len(live), -1)
    level[0], front, found = 0, [0], 0
    while front:
        state = front.pop()
        for after in np.flatnonzero(follows[state]):
            if level[after] < 0:
                level[after] = level[state] + 1
                front.append(int(after))
            else:
                found = math.gcd(found, abs(int(level[state] + 1 - level[after])))
    return found


def slowest_gap(matrix: Array, stationary: Array, values: NDArray[np.complex128], near: float) -> float:
    """1 − |λ| of the slowest mode of an aperiodic chain with the eigenvalues ``values``, 1 first.

    At least one other must have a modulus within ``near`` of 1. Such a value is close to a root of unity of
    an order up to the number of states, so that its power by that order is close to 1 itself.
    """
    close = values[1:][1 - np.abs(values[1:]) <= near]
    orders = sorted({_order(value, len(matrix), near) for value in close})
    gaps = []
    for order in orders:
        gap = _gap_near_one(np.linalg.matrix_power(matrix, order), stationary)
        gaps.append(-math.expm1(math.log1p(-min(gap, 0.5)) / order))
    return min(gaps)


def _order(value: complex, most: int, near: float) -> int:
    turns = np.angle(value) / (2 * np.pi) * np.arange(1, most + 1)
    off = np.abs(turns - np.round(turns))
    return int(np.argmax(off <= max(near, off.min()))) + 1


def _gap_near_one(matrix: Array, stationary: Array) -> float:
    """1 − |λ| of the eigenvalue other than 1 that is nearest to 1, to about 1e-10 of itself."""
    with np.errstate(all="ignore"):
        inverse = _group_inverse(matrix, stationary)
    if not np.isfinite(inverse).all():
        return math.ulp(0.0)  # a way out at the end of the range of fp64
    scale = float(np.abs(inverse).max())
    found = np.linalg.eigvals(inverse / scale)
    found = found[np.abs(found) >= _KNOWN * np.abs(found).max()]
    z = 1 / found / scale
    # 1 − |1 − z|² without the 1.
    gap: Array = (2 * z.real - np.abs(z) ** 2) / (1 + np.abs(1 - z))
    return float(gap.min())


def _group_inverse(matrix: Array, stationary: Array) -> Array:
    """(I − P)^# ``[V, V]``, whose eigenvalues are 1/(1 − λ), and 0 for the eigenvalue 1."""
    order = np.argsort(stationary == 0, kind="stable")  # recurrent states are eliminated last
    a, size = matrix[np.ix_(order, order)].copy(), len(matrix)
    x = np.eye(size) - stationary[order]
    leaving = np.ones(size)
    for k in range(size - 1, 0, -1):
        leaving[k] = a[k, :k].sum()
        share = a[:k, k] / leaving[k]
        a[:k, :k] += np.outer(share, a[k, :k])
        x[:k] += np.outer(share, x[k])
    x[0] = 0
    for k in range(1, size):
        x[k] = (x[k] + a[k, :k] @ x[:k]) / leaving[k]
    x -= stationary[order] @ x
    out = np.empty_like(x)
    out[np.ix_(order, order)] = x
    return out
