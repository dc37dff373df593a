"""The registry of measures: what each is called, what it is computed from and what it is held against.

A new measure is one entry at the end of this file. The probe then computes it on every route, ``measures=``
knows its name, and the dataset, tables, figures and page show it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from rgfast.ops.spectrum import isotropic_baseline
from rgfast.ops.spectrum.measures import (
    effective_rank_of,
    numerical_rank_of,
    participation_ratio_of,
    stable_rank_of,
)
from rgfast.ops.spectrum.solve import Solved

__all__ = ["MEASURES", "Kernels", "Kind", "Measure", "are_built_in", "asked_measures", "named", "register"]

Kind = Literal["rank", "drift", "pair"]


@dataclass(frozen=True)
class Kernels:
    """What is known of the centred kernels K_l of all layers, fp64, on the device of the activations.

    ``debiased`` and ``biased`` are CKA ``[L, L, P]`` and NaN where a pair was not asked for; ``change`` is
    ‖K_{l+1} − K_l‖ / ‖K_l‖ ``[L-1, P]``.
    """

    debiased: Tensor
    biased: Tensor
    change: Tensor


@dataclass(frozen=True)
class Measure:
    """One measure.

    Args:
        name: its name in the dataset.
        kind: ``"rank"`` by layer, ``"drift"`` by transition, ``"pair"`` by two layers.
        label: its name in figures and tables.
        needs: ``"centred"`` or ``"uncentred"`` singular values, or ``"kernels"``.
        of: the values ``[N]`` of singular values ``[N, d]``, descending, zero beyond the largest rank; or
            ``[L-1, P]`` or ``[L, L, P]`` of :class:`Kernels`. It takes and gives tensors, on any device.
        baseline: what n isotropic Gaussian rows of d features would give, if that is known.
        bound: a bound ``[N]`` on the relative rounding error, if there is one; it takes the spectra with
            their errors.
    """

    name: str
    kind: Kind
    label: str
    needs: Literal["centred", "uncentred", "kernels"]
    of: Callable[[Any], Tensor]
    baseline: Callable[[int, int], float] | None = None
    bound: Callable[[Solved], Tensor] | None = None


MEASURES: dict[str, Measure] = {}


def register(measure: Measure) -> None:
    """Make a measure known.

    Raises ValueError for a name that is taken, and for a kind that cannot be computed from what it needs.
    """
    if measure.name in MEASURES:
        raise ValueError(f"name must be new, and there is a measure {measure.name!r} already")
    if (measure.kind == "rank") == (measure.needs == "kernels"):
        raise ValueError(
            "needs must be 'centred' or 'uncentred' for a rank and 'kernels' for a drift or pair, got "
            f"{measure.needs!r} for a {measure.kind}"
        )
    MEASURES[measure.name] = measure


def named(*kinds: Kind) -> tuple[str, ...]:
    """The names of the measures of these kinds, one kind after another."""
    return tuple(m.name for kind in kinds for m in MEASURES.values() if m.kind == kind)


def asked_measures(asked: str | Sequence[str]) -> tuple[str, ...]:
    """The names of the measures asked for, in their own order. Raises ValueError for unknown ones."""
    if isinstance(asked, str):
        asked = tuple(MEASURES) if asked == "all" else [asked]
    if not isinstance(asked, Collection) or not asked:
        raise ValueError(f"measures must be 'all' or a sequence of at least one measure, got {asked!r}")
    for name in asked:
        if name not in MEASURES:
            raise ValueError(f"measures must be 'all' or among {', '.join(MEASURES)}, got {name!r}")
    return tuple(name for name in MEASURES if name in asked)


def _of_variance(sigma: Tensor) -> Tensor:
    rank: Tensor = effective_rank_of(sigma, spectrum="variance")
    return rank


def _neighbours(pairs: Tensor) -> Tensor:
    return pairs.diagonal(1).T


for _measure in (
    Measure(
        "effective_rank",
        "rank",
        "effective rank (singular values)",
        "centred",
        effective_rank_of,
        baseline=lambda n, d: isotropic_baseline(n, d).effective_rank,
        bound=Solved.bound,
    ),
    Measure(
        "effective_rank_variance",
        "rank",
        "effective rank (variance)",
        "centred",
        _of_variance,
        baseline=lambda n, d: isotropic_baseline(n, d).effective_rank_variance,
    ),
    Measure(
        "participation_ratio",
        "rank",
        "participation ratio",
        "centred",
        participation_ratio_of,
        baseline=lambda n, d: isotropic_baseline(n, d).participation_ratio,
    ),
    Measure(
        "stable_rank",
        "rank",
        "stable rank",
        "centred",
        stable_rank_of,
        baseline=lambda n, d: isotropic_baseline(n, d).stable_rank,
    ),
    # Moments cannot tell smaller singular values from their own rounding errors.
    Measure("numerical_rank", "rank", "numerical rank", "centred", lambda s: numerical_rank_of(s, 1e-7)),
    Measure(
        "effective_rank_uncentred",
        "rank",
        "effective rank, uncentred",
        "uncentred",
        effective_rank_of,
        bound=Solved.bound,
    ),
    Measure(
        "effective_rank_variance_uncentred",
        "rank",
        "effective rank (variance), uncentred",
        "uncentred",
        _of_variance,
    ),
    Measure(  # the biased CKA of two layers is never above 1 but for rounding
        "kernel_drift",
        "drift",
        "kernel drift 1 − CKA",
        "kernels",
        lambda k: (1 - _neighbours(k.biased)).clamp_min(0.0),
    ),
    Measure(
        "kernel_drift_debiased",
        "drift",
        "kernel drift 1 − CKA, debiased",
        "kernels",
        lambda k: 1 - _neighbours(k.debiased),
    ),
    Measure("kernel_change", "drift", "‖K(l+1) − K(l)‖ / ‖K(l)‖", "kernels", lambda k: k.change),
    Measure("cka", "pair", "CKA, debiased", "kernels", lambda k: k.debiased),
    Measure("cka_biased", "pair", "CKA, biased", "kernels", lambda k: k.biased),
):
    register(_measure)

_BUILT_IN = tuple(MEASURES.values())


def are_built_in(*kinds: Kind) -> bool:
    """Whether the measures of these kinds are the ones of this file: none added, replaced or taken away."""
    now, then = ([m for m in some if m.kind in kinds] for some in (MEASURES.values(), _BUILT_IN))
    return len(now) == len(then) and all(one is other for one, other in zip(now, then, strict=True))
