"""Linear algebra of a stochastic matrix: stationary distribution, spectrum, eigenspaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

__all__ = [
    "Eigenspace",
    "eigenspaces",
    "is_reversible",
    "sort_spectrum",
    "spectrum",
    "stationary_distribution",
]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Eigenspace:
    """One eigenvalue of a chain (a complex pair counts as one) with everything that belongs to it.

    ``eigenvalue``: complex, with imaginary part >= 0. ``modulus``: its absolute value.
    ``multiplicity``: dimension of the space (a simple complex pair has 2).
    ``projector`` ``[V, V]``, fp64, real: the spectral projector, which commutes with the transition matrix;
    row s is what state s looks like in this space, so ``projector[tokens]`` are features of tokens and
    ``posterior @ projector`` their conditional expectations.
    ``basis`` ``[V, multiplicity]``, fp64, real: eigenfunctions spanning the same features, orthonormal under
    the stationary distribution (white when the chain is stationary; under the uniform one where some state is
    never visited).
    """

    eigenvalue: complex
    multiplicity: int
    projector: Tensor
    basis: Tensor

    @property
    def modulus(self) -> float:
        return abs(self.eigenvalue)


def stationary_distribution(matrix: Array) -> Array:
    """The stationary distribution ``[V]``, entrywise accurate: Grassmann, Taksar & Heyman, Oper. Res. 33
    (1985).

    Raises ValueError when there is more than one recurrent class.
    """
    count, member = _components(matrix > 0, directed=True, connection="strong")
    leaves = [np.any((matrix > 0)[member == c][:, member != c]) for c in range(count)]
    closed = [c for c in range(count) if not leaves[c]]
    if len(closed) != 1:
        shown = "; ".join(str(np.flatnonzero(member == c).tolist()) for c in closed[:3])
        raise ValueError(
            f"transition must have a unique stationary distribution, got {len(closed)} recurrent classes "
            f"(states {shown}{'; ...' if len(closed) > 3 else ''})"
        )
    recurrent = np.flatnonzero(member == closed[0])
    a = matrix[np.ix_(recurrent, recurrent)].copy()
    size = len(recurrent)
    for k in range(size - 1, 0, -1):
        a[:k, k] /= a[k, :k].sum()
        a[:k, :k] += np.outer(a[:k, k], a[k, :k])
    weight = np.ones(size)
    for k in range(1, size):
        weight[k] = weight[:k] @ a[:k, k]
    out = np.zeros(len(matrix))
    out[recurrent] = weight / weight.sum()
    return out


def is_reversible(matrix: Array, stationary: Array) -> bool:
    """Whether detailed balance holds to rounding and every state is visited."""
    flow = stationary[:, None] * matrix
    rounding = 8 * len(matrix) * np.finfo(np.float64).eps
    return bool(stationary.min() > 0 and np.abs(flow - flow.T).max() <= rounding * flow.max())


def _symmetrised(matrix: Array, stationary: Array) -> Array:
    root = np.sqrt(stationary)
    flow = stationary[:, None] * matrix
    out: Array = (flow + flow.T) / 2 / root / root[:, None]
    return out


def spectrum(matrix: Array, stationary: Array) -> NDArray[np.complex128]:
    """All eigenvalues, complex: exactly 1 first, then by falling modulus, a pair's upper half before its
    lower.

    Values below the rounding of the computation count as zero. A reversible chain goes through its symmetric
    form, whose eigenvalues are real and accurate to rounding.
    """
    if is_reversible(matrix, stationary):
        values = np.linalg.eigvalsh(_symmetrised(matrix, stationary)).astype(np.complex128)
    else:
        values = np.linalg.eigvals(matrix).astype(np.complex128)
    values[np.abs(values) <= 4 * len(matrix) * np.finfo(np.float64).eps] = 0
    return sort_spectrum(values)


def sort_spectrum(values: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """``values`` with the one nearest to 1 first and made exact, then by falling modulus."""
    values = np.delete(values, np.argmin(np.abs(values - 1)))
    order = np.lexsort((-values.imag, -values.real, -np.abs(values)))
    return np.concatenate([np.ones(1, np.complex128), values[order]])


def eigenspaces(matrix: Array, stationary: Array, tolerance: float) -> list[Eigenspace]:
    """Eigenspaces by falling modulus, the constant one first; see :meth:`MarkovChain.eigenspaces`."""
    if is_reversible(matrix, stationary):
        root = np.sqrt(stationary)
        values, vectors = np.linalg.eigh(_symmetrised(matrix, stationary))
        found = []
        for group in _groups(values.astype(np.complex128), tolerance):
            block = vectors[:, group]
            projector = (block @ block.T) * root / root[:, None]
            found.append((complex(values[group].mean()), len(group), projector))
    else:
        found = _schur_eigenspaces(matrix, tolerance)
    found.sort(key=lambda item: (-abs(item[0]), -item[0].real))
    # The space of the eigenvalue 1 comes first even when others share its modulus (a periodic chain).
    found.insert(0, found.pop(int(np.argmin([abs(value - 1) for value, _, _ in found]))))
    weight = stationary if stationary.min() > 0 else np.full(len(matrix), 1 / len(matrix))
    return [
        Eigenspace(value, count, from_numpy(projector), from_numpy(_basis(projector, count, weight)))
        for value, count, projector in found
    ]


def _groups(values: NDArray[np.complex128], tolerance: float) -> list[list[int]]:
    """Indices of eigenvalues that hang together within ``tolerance``, conjugates taken as one."""
    folded = values.real + 1j * np.abs(values.imag)
    near = np.abs(folded[:, None] - folded) <= tolerance
    count, member = _components(near, directed=False)
    return [np.flatnonzero(member == c).tolist() for c in range(count)]


def _components(graph: NDArray[np.bool_], **kind: Any) -> tuple[int, NDArray[np.int32]]:
    from scipy.sparse.csgraph import connected_components  # here, as in _schur_eigenspaces

    count, member = connected_components(graph, **kind)
    return int(count), member


def _schur_eigenspaces(matrix: Array, tolerance: float) -> list[tuple[complex, int, Array]]:
    """Spectral projectors from ordered Schur forms: they exist where eigenvectors do not (Jordan blocks).

    With T = [[A, B], [0, C]] and the group's eigenvalues in A, the projector is Z [[I, X], [0, 0]] Z^H, where
    A X - X C = B (Golub & Van Loan, Matrix Computations, 7.6).
    """
    from scipy import linalg  # here, since few chains need it and importing it takes 10 MB

    values = np.linalg.eigvals(matrix).astype(np.complex128)
    folded = values.real + 1j * np.abs(values.imag)
    found = []
    for group in _groups(values, tolerance):
        members = folded[group]

        others = np.delete(folded, group)

        def belongs(
            value: complex, mine: NDArray[np.complex128] = members, rest: NDArray[np.complex128] = others
        ) -> bool:
            point = complex(value.real, abs(value.imag))
            return bool(len(rest) == 0 or np.abs(mine - point).min() < np.abs(rest - point).min())

        t, z, m = _ordered_schur(matrix, belongs)
        if m == len(matrix):
            projector = np.eye(len(matrix))
        else:
            x = linalg.solve_sylvester(t[:m, :m], -t[m:, m:], t[:m, m:])
            projector = (z[:, :m] @ (z[:, :m].conj().T + x @ z[:, m:].conj().T)).real
        if m != len(group) or np.abs(projector @ projector - projector).max() > 1e-6:
            raise ValueError(
                f"tolerance must be large enough to keep eigenvalues near {members.mean():.6g} together "
                f"that double precision cannot tell apart, got {tolerance!r}"
            )
        found.append((complex(members.mean()), len(group), projector))
    return found


def _ordered_schur(
    matrix: Array, belongs: Callable[[complex], bool]
) -> tuple[NDArray[np.complex128], NDArray[np.complex128], int]:
    from scipy import linalg

    # scipy passes one complex number to the callback for output="complex"; its stubs know the real form only.
    t, z, count = linalg.schur(matrix.astype(np.complex128), output="complex", sort=belongs)  # type: ignore[call-overload]
    return t, z, int(count)


def _basis(projector: Array, count: int, weight: Array) -> Array:
    root = np.sqrt(weight)
    left: Array = np.linalg.svd(root[:, None] * projector)[0][:, :count] / root[:, None]
    # A sign for each function that does not depend on the LAPACK build: its largest value is positive.
    peak = np.abs(left).argmax(0)
    out: Array = left * np.sign(left[peak, np.arange(count)])
    return out
