"""Transition matrices of the named kinds, and the labels that name them.

Every kind but ``zipf-tree`` is a semigroup in 1/xi: its k-th matrix power is the same kind at xi/k. So a
short chain is a long one decimated. A semigroup has one stationary distribution at every xi, and
``zipf-tree`` is there to have another at each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rgfast.validation import check_choice, check_integer

__all__ = ["KINDS", "Kind", "build", "parse_label"]

Array = NDArray[np.float64]

KINDS = ("two-scale", "lazy", "ring-heat", "cyclic", "random-reversible", "zipf-tree", "iid")

# Below, the slow mode sinks into the rounding of the matrix; above, 1 - |lambda_2| does.
SHORTEST, LONGEST = 0.05, 5000.0

_OPTIONS: dict[str, dict[str, Callable[[str], float]]] = {
    "two-scale": {"K": int, "r": float},
    "random-reversible": {"seed": int},
    "zipf-tree": {"spread": float},
}


@dataclass(frozen=True)
class Kind:
    """A kind of chain with its options; ``label`` names those that differ from the default."""

    name: str = "two-scale"
    clusters: int = 4
    fast_exponent: float = 4.0
    seed: int = 0
    spread: float = 5.0

    @property
    def is_semigroup(self) -> bool:
        """Whether the k-th power of the chain at xi is this kind at xi/k."""
        return self.name != "zipf-tree"

    @property
    def label(self) -> str:
        told = []
        if self.name == "two-scale":
            told += [f"K={self.clusters}"] if self.clusters != 4 else []
            told += [f"r={float(self.fast_exponent)!r}".removesuffix(".0")] if self.fast_exponent != 4 else []
        elif self.name == "random-reversible" and self.seed != 0:
            told += [f"seed={self.seed}"]
        elif self.name == "zipf-tree" and self.spread != 5:
            told += [f"spread={float(self.spread)!r}".removesuffix(".0")]
        return ":".join([self.name, *filter(None, [",".join(told)])])


def parse_label(label: str) -> Kind:
    """The kind that ``label`` names, such as ``two-scale:K=2,r=30``.

    Raises TypeError unless ``label`` is a string, ValueError for an unknown kind, option or number.
    """
    if not isinstance(label, str):
        raise TypeError(f"label must be a string such as 'two-scale:r=30', got {label!r}")
    name, colon, tail = label.partition(":")
    if name not in KINDS:
        raise ValueError(f"label must start with one of {', '.join(KINDS)}, got {label!r}")
    allowed = _OPTIONS.get(name, {})
    found: dict[str, float] = {}
    for item in tail.split(",") if colon else []:
        key, _, text = item.partition("=")
        if key not in allowed or key in found:
            takes = f"each of {', '.join(allowed)} once at most" if allowed else "no options"
            raise ValueError(f"label: {name} takes {takes}, got {label!r}")
        try:
            found[key] = allowed[key](text)
        except ValueError:
            raise ValueError(
                f"label: {key} must be a number ({allowed[key].__name__}), got {label!r}"
            ) from None
    return Kind(
        name,
        clusters=int(found.get("K", 4)),
        fast_exponent=found.get("r", 4.0),
        seed=int(found.get("seed", 0)),
        spread=found.get("spread", 5.0),
    )


def build(kind: Kind, xi: float, states: int) -> tuple[Array, NDArray[np.complex128]]:
    """The transition matrix ``[V, V]``, fp64, of ``kind`` at correlation length ``xi``, and its V
    eigenvalues.

    The eigenvalues come from the formula, unsorted. Raises ValueError or TypeError for arguments out of
    range.
    """
    check_choice(kind.name, "kind", KINDS)
    check_integer(states, "states", least=2)
    uniform = np.full((states, states), 1.0 / states)
    if kind.name == "iid":
        return uniform, _with_one(np.zeros(states - 1))
    _check_number(xi, "xi", "positive and finite")
    if not (math.isfinite(xi) and xi > 0):
        raise ValueError(f"xi must be positive and finite, got {xi!r}")
    if not SHORTEST <= xi <= LONGEST:
        raise ValueError(
            f"xi must lie between {SHORTEST:g} and {LONGEST:g}, where a double-precision matrix resolves "
            f"its slowest mode, got {xi!r}"
        )
    xi = float(xi)
    if kind.name == "two-scale":
        return _two_scale(kind, xi, states)
    if kind.name == "lazy":
        slow = math.exp(-1 / xi)
        matrix = uniform * -math.expm1(-1 / xi) + slow * np.eye(states)
        return _stochastic(matrix), _with_one(np.full(states - 1, slow))
    if kind.name == "random-reversible":
        return _random_reversible(kind, xi, states)
    if kind.name == "zipf-tree":
        return _zipf_tree(kind, xi, states)
    return _circulant(kind, xi, states)


def _two_scale(kind: Kind, xi: float, states: int) -> tuple[Array, NDArray[np.complex128]]:
    check_integer(kind.clusters, "clusters", least=2)
    if states % kind.clusters:
        raise ValueError(f"states must be divisible by clusters ({kind.clusters}), got {states}")
    r = kind.fast_exponent
    _check_number(r, "fast_exponent", "at least 1")
    if not (math.isfinite(r) and r >= 1):
        raise ValueError(
            f"fast_exponent must be finite and at least 1 (below 1 the modes within a cluster would be "
            f"the slow ones), got {r!r}"
        )
    slow, fast = math.exp(-1 / xi), math.exp(-r / xi)
    size = states // kind.clusters
    within = np.kron(np.eye(kind.clusters), np.full((size, size), 1.0 / size))
    # 1 - slow by expm1, so that the weights keep their relative precision at long xi.
    matrix = -math.expm1(-1 / xi) / states + (slow - fast) * within + fast * np.eye(states)
    values = np.repeat([slow, fast], [kind.clusters - 1, states - kind.clusters])
    return _stochastic(matrix), _with_one(values)


def _circulant(kind: Kind, xi: float, states: int) -> tuple[Array, NDArray[np.complex128]]:
    """Ring kinds: row 0 is the inverse Fourier transform of the spectrum, exp(-time * rate_k)."""
    if kind.name == "cyclic" and states < 3:
        raise ValueError(f"states must be at least 3 for kind 'cyclic', got {states}")
    angle = 2 * np.pi * np.arange(states // 2 + 1) / states
    # 1 - cos, as 2 sin^2 so that nothing cancels on a long ring.
    rate = 2 * np.sin(angle / 2) ** 2 + 0j
    if kind.name == "cyclic":
        # Poisson-distributed steps forward: the generator is shift - identity. That of the heat kernel,
        # shift + inverse shift - 2 identity, is twice the real part, which its time makes up for.
        rate -= 1j * np.sin(angle)
    values = np.exp(-rate / (xi * rate.real[1]))
    values = np.concatenate([values, values[(states - 1) // 2 : 0 : -1].conj()])
    row = np.maximum(np.fft.fft(values).real / states, 0)
    if kind.name == "ring-heat":
        row = (row + np.roll(row[::-1], 1)) / 2
    return _stochastic(row[(np.arange(states) - np.arange(states)[:, None]) % states]), values


def _random_reversible(kind: Kind, xi: float, states: int) -> tuple[Array, NDArray[np.complex128]]:
    """exp(-tQ) for a random reversible generator: log-normal conductances and stationary weights."""
    check_integer(kind.seed, "seed", least=0)
    rng = np.random.default_rng(kind.seed)
    weight = np.triu(np.exp(rng.standard_normal((states, states))), 1)
    weight += weight.T
    stationary = np.exp(rng.standard_normal(states) / 2)
    root = np.sqrt(stationary / stationary.sum())
    laplacian = (np.diag(weight.sum(1)) - weight) / root / root[:, None]
    rate, modes = np.linalg.eigh(laplacian)
    # The zero mode is known exactly; keeping its computed value would tilt the stationary distribution.
    rate[0], modes[:, 0] = 0.0, root
    values = np.exp(-rate / (xi * rate[1]))
    kernel = (modes * values) @ modes.T
    matrix = np.maximum((kernel + kernel.T) / 2, 0) * root / root[:, None]
    return _stochastic(matrix), values.astype(np.complex128)


def _zipf_tree(kind: Kind, xi: float, states: int) -> tuple[Array, NDArray[np.complex128]]:
    """Sum of (lambda_k - lambda_{k+1}) C_k, C_k the average given the k-th of nested partitions.

    The C_k commute and C_k - C_{k-1} are projectors of rank 1 whatever the weights, so the spectrum and the
    stationary distribution are chosen separately.
    """
    spread = kind.spread
    _check_number(spread, "spread", "at least 1")
    if not (math.isfinite(spread) and spread >= 1):
        raise ValueError(
            f"spread must be finite and at least 1 (the longest over the shortest), got {spread!r}"
        )
    weight = np.arange(1.0, states + 1) ** (-2 / (1 + xi))
    weight /= weight.sum()
    steps = np.arange(states - 1) / max(1, states - 2)
    values = np.exp(-(spread**steps) / xi)
    # 1 - slow by expm1, so that the weights keep their relative precision at long xi.
    drops = np.append(-np.diff(values), values[-1])
    matrix = -math.expm1(-1 / xi) * np.tile(weight, (states, 1))
    cells = [(0, states)]
    for drop in drops:
        low, high = max(cells, key=lambda cell: (cell[1] - cell[0], -cell[0]))
        cells.remove((low, high))
        cells += [(low, (low + high + 1) // 2), ((low + high + 1) // 2, high)]
        for low, high in cells:
            matrix[low:high, low:high] += drop * weight[low:high] / weight[low:high].sum()
    return _stochastic(matrix), _with_one(values)


def _check_number(value: object, name: str, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, {expected}, got {value!r}")


def _with_one(values: Array) -> NDArray[np.complex128]:
    return np.concatenate([np.ones(1), values]).astype(np.complex128)


def _stochastic(matrix: Array) -> Array:
    scaled: Array = matrix / matrix.sum(1, keepdims=True)
    return scaled
