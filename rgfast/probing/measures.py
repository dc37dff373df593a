"""From the moments of one view to its measures: ranks by layer, drift and CKA by pair."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgfast.ops.cka.streaming import cka_from_moments
from rgfast.ops.spectrum import RankMeasures, isotropic_baseline, rank_measures_from_moment
from rgfast.ops.spectrum.factors import rank_measures_from_factor
from rgfast.runtime.threads import one_thread
from rgfast.streaming import MomentAccumulator

__all__ = [
    "BASELINES",
    "BOUNDED",
    "DRIFTS",
    "PAIRWISE",
    "RANKS",
    "Measured",
    "asked_measures",
    "baselines",
    "change_of",
    "doubtful",
    "joined",
    "known_drifts",
    "measure",
    "spread",
]

RANKS = (
    "effective_rank",
    "effective_rank_variance",
    "participation_ratio",
    "stable_rank",
    "numerical_rank",
    "effective_rank_uncentred",
    "effective_rank_variance_uncentred",
)
BASELINES = RANKS[:4]
BOUNDED = ("effective_rank", "effective_rank_uncentred")
DRIFTS = ("kernel_drift", "kernel_drift_debiased", "kernel_change")
PAIRWISE = ("cka", "cka_biased")

# Relative error of an effective rank to expect from moments, above which rows are read again, or a factor is
# taken where there is one: sums over ranks must agree to 1e-12.
_DOUBT, _DOUBT_BESIDE_FACTOR = 1e-11, 1e-12
_TINY = float(np.finfo(np.float64).tiny)
_GRID = 12  # baselines at more sample numbers than this are interpolated

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """Measures of one view; the last axis (or axes) is the flattened leading shape of its moments.

    ``ranks[name]`` are ``[L, P]``, and so are ``bounds[name]`` (on the relative rounding error of effective
    ranks of singular values) and ``refined`` (where the centred spectrum is a triangular factor's);
    ``spectrum`` is ``[L, P, max d]`` padded with NaN, ``drifts[name]`` ``[L-1, P]``, ``pairs[name]``
    ``[L, L, P]``, NaN where a pair was not asked for, ``count`` ``[L, P]``.
    """

    count: NDArray[np.int64]
    ranks: dict[str, Array]
    bounds: dict[str, Array]
    refined: NDArray[np.bool_]
    spectrum: Array
    drifts: dict[str, Array]
    pairs: dict[str, Array]


def joined(parts: Sequence[Measured]) -> Measured:
    """Several positions' measures as one."""
    first = parts[0]

    def along(name: str) -> dict[str, Array]:
        values = [getattr(part, name) for part in parts]
        return {key: np.concatenate([value[key] for value in values], -1) for key in values[0]}

    return (
        Measured(
            np.concatenate([part.count for part in parts], -1),
            along("ranks"),
            along("bounds"),
            np.concatenate([part.refined for part in parts], 1),
            np.concatenate([part.spectrum for part in parts], 1),
            along("drifts"),
            along("pairs"),
        )
        if len(parts) > 1
        else first
    )


def spread(parts: Sequence[Measured], streams: Sequence[tuple[int, ...]], layers: int) -> Measured:
    """The measures of all layers from those of streams of them; NaN between layers of two streams."""
    if len(parts) == 1:
        return parts[0]
    positions, most = parts[0].count.shape[1], max(part.spectrum.shape[2] for part in parts)

    def whole(*shape: int, fill: Any = np.nan) -> Any:
        return np.full(shape, fill)

    out = Measured(
        whole(layers, positions, fill=0),
        {name: whole(layers, positions) for name in RANKS},
        {name: whole(layers, positions) for name in BOUNDED},
        whole(layers, positions, fill=False),
        whole(layers, positions, most),
        {name: whole(layers - 1, positions) for name in DRIFTS},
        {name: whole(layers, layers, positions) for name in PAIRWISE},
    )
    for members, part in zip(streams, parts, strict=True):
        at = list(members)
        out.count[at], out.refined[at] = part.count, part.refined
        out.spectrum[at, :, : part.spectrum.shape[2]] = part.spectrum
        for mine, theirs in ((out.ranks, part.ranks), (out.bounds, part.bounds)):
            for name in mine:
                mine[name][at] = theirs[name]
        for name in PAIRWISE:
            out.pairs[name][np.ix_(at, at)] = part.pairs[name]
        for k, (i, j) in enumerate(pairwise(members)):
            for name in DRIFTS:
                if j == i + 1:
                    out.drifts[name][i] = part.drifts[name][k]
    return out


def measure(moments: MomentAccumulator, *, spectra: bool = True, refine: bool = True) -> Measured:
    """All measures of a view; ``refine`` uses triangular factors where moments resolve too little.

    Undefined values are NaN: a rank of fewer than two rows, a CKA or drift beside a layer without variance,
    a debiased one of fewer than four rows. A constant layer has rank 0.
    """
    widths, count = moments.widths, moments.count.reshape(-1)
    positions, layers = len(count), len(widths)
    ranks = {name: np.full((layers, positions), np.nan) for name in RANKS}
    bounds = {name: np.full((layers, positions), np.nan) for name in BOUNDED}
    refined = np.zeros((layers, positions), dtype=bool)
    spectrum = np.full((layers, positions, max(widths) if spectra else 0), np.nan)
    known = count >= 2
    for layer, width in enumerate(widths):
        summed = moments.accumulated(layer, scaled=True).reshape(-1)
        found = rank_measures_from_moment(_scatter(moments, layer, "mean"), count, accumulated=summed)
        raw = rank_measures_from_moment(_scatter(moments, layer, "none"), count, centering="none")
        if refine:
            refined[layer] = _refine(moments, layer, found, "mean")
            _refine(moments, layer, raw, "none")
        for name in RANKS[:5]:
            ranks[name][layer] = _where(known, getattr(found, name))
        if spectra:
            sigma = _where(known[:, None], found.singular_values)
            spectrum[layer, :, :width] = np.ldexp(sigma, moments.exponent(layer))
        # n μ μᵀ has rank one, which eigenvalues would only say to rounding.
        constant = (found.stable_rank == 0) & (raw.stable_rank > 0)
        for name in ("effective_rank", "effective_rank_variance"):
            value = torch.where(constant, 1.0, getattr(raw, name))
            ranks[f"{name}_uncentred"][layer] = _where(known, value)
        bounds["effective_rank"][layer] = _where(known, found.error_bound)
        exact = torch.where(constant, 0.0, raw.error_bound)
        bounds["effective_rank_uncentred"][layer] = _where(known, exact)
    pairs = {}
    # Sums over whole matrices are cut by the number of threads; eigenvalues above are not.
    with one_thread():
        for name, debiased in (("cka", True), ("cka_biased", False)):
            matrix, _ = cka_from_moments(moments, debiased=debiased)
            pairs[name] = _array(matrix.permute(1, 2, 0))
        drifts = known_drifts(pairs)
        drifts["kernel_change"] = _changes(moments, drifts["kernel_drift"].shape)
    return Measured(
        np.tile(count.cpu().numpy(), (layers, 1)), ranks, bounds, refined, spectrum, drifts, pairs
    )


def known_drifts(pairs: dict[str, Array]) -> dict[str, Array]:
    """The drifts ``[L-1, P]`` that CKA matrices ``[L, L, P]`` hold; the biased one is never negative."""
    debiased, biased = (1 - np.diagonal(pairs[name], 1).T for name in ("cka", "cka_biased"))
    return {"kernel_drift_debiased": debiased, "kernel_drift": np.maximum(biased, 0.0)}


def change_of(norms: Array, drift: Array) -> Array:
    """‖K_{l+1} − K_l‖ / ‖K_l‖ ``[L-1, P]`` of kernels of squared norms ``[L, P]`` and drift ``[L-1, P]``.

    ‖K' − K‖² = (‖K'‖ − ‖K‖)² + 2 ‖K‖‖K'‖ (1 − CKA), which does not cancel.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.sqrt(norms[1:] / norms[:-1])
        turned = np.where(ratio > 0, 2 * ratio * drift, 0.0)
        return np.where(norms[:-1] > 0, np.sqrt(np.square(ratio - 1) + turned), np.nan)


def _refine(
    moments: MomentAccumulator, layer: int, found: RankMeasures, centering: Literal["mean", "none"]
) -> NDArray[np.bool_]:
    """Overwrite ``found`` where singular values are too small for moments and a factor was kept; where."""
    count = moments.count.reshape(-1)
    factor = moments.factor(layer, centering=centering, scaled=True)
    if factor is None:
        return np.zeros(len(count), dtype=bool)
    factor = factor.reshape(len(count), -1, factor.shape[-1])
    most = count - 1 if centering == "mean" else count
    sigma = found.singular_values.cpu().numpy()
    doubt = doubtful(sigma, most.cpu().numpy(), allowed=_DOUBT_BESIDE_FACTOR)
    at = torch.from_numpy(doubt).to(count.device) & (count >= 2) & ~factor[:, 0, 0].isnan()
    if bool(at.any()):
        updates = -(-int(count.max()) // moments.rows_at_once)
        better = rank_measures_from_factor(factor[at], count[at], centering=centering, updates=updates)
        for name in (*RANKS[:5], "singular_values", "error_bound", "variance_error_bound"):
            getattr(found, name)[at] = getattr(better, name)
    return np.asarray(at.cpu().numpy())


def doubtful(sigma: Array, most: NDArray[np.int64], *, allowed: float = _DOUBT) -> NDArray[np.bool_]:
    """Where an effective rank of singular values ``[P, d]``, ``most[P]`` of them not zero, may err by more
    than ``allowed`` of itself.

    Eigenvalues of a moment err by about 4 u λ₁, so σ by e = min(4 u σ₁²/σ, √(4 u) σ₁), and the entropy by
    about Σ e ln(Σσ/σ) / Σσ.
    """
    unit = 4 * 2.0**-53
    top, total = sigma[:, :1], np.maximum(sigma.sum(1, keepdims=True), _TINY)
    with np.errstate(over="ignore"):
        error = np.minimum(unit * top * (top / np.maximum(sigma, _TINY)), unit**0.5 * top)
    share = np.maximum(sigma / total, 2.0**-53)
    expected = error / total * -np.log(share)
    live = np.arange(sigma.shape[1]) < most[:, None]
    found: NDArray[np.bool_] = (np.where(live, expected, 0.0).sum(1) > allowed) & (top[:, 0] > 0)
    return found


def _scatter(moments: MomentAccumulator, layer: int, centering: Literal["mean", "none"]) -> Tensor:
    """``[P, d, d]`` in the layer's unit, in which the rest are too; zero where nothing was counted."""
    found = moments.scatter(layer, centering=centering, scaled=True)
    found = found.reshape(-1, *found.shape[-2:])
    empty = moments.count.reshape(-1) == 0
    return found.masked_fill(empty[:, None, None], 0.0) if bool(empty.any()) else found


def _changes(moments: MomentAccumulator, shape: tuple[int, ...]) -> Array:
    """‖K_{l+1} − K_l‖ / ‖K_l‖ of centred kernels ``[L-1, P]``, which unlike the drift sees scale."""
    out = np.full(shape, np.nan)
    for i, j in moments.pairs:
        if j == i + 1:
            first, second, cross = moments.pair(i, i), moments.pair(j, j), moments.pair(i, j)
            scale = math.ldexp(1.0, 2 * (cross.exponent_j - cross.exponent_i))
            a, b, ab = (p.cross.square().sum((-1, -2)) for p in (first, second, cross))
            square = (a + b * scale**2 - 2 * ab * scale).clamp_min(0.0)
            out[i] = _array(torch.where(a > 0, (square / a).sqrt(), torch.nan).reshape(-1))
    return out


def _array(value: Tensor) -> Array:
    return np.asarray(value.cpu().numpy(), dtype=np.float64)


def _where(known: Tensor, value: Tensor) -> Array:
    return np.asarray(torch.where(known, value, torch.nan).cpu().numpy(), dtype=np.float64)


def baselines(counts: NDArray[np.int64], widths: tuple[int, ...]) -> dict[str, Array]:
    """Isotropic baselines ``[L, P]`` of the first four ranks for ``counts[L, P]`` samples; NaN below two.

    Many different sample numbers are interpolated in 1/n between a few.
    """
    out = {name: np.full(counts.shape, np.nan) for name in BASELINES}
    sizes = np.unique(counts[counts >= 2])
    if not len(sizes):
        return out
    grid = sizes if len(sizes) <= _GRID else np.unique(np.geomspace(sizes[0], sizes[-1], _GRID).round())
    for width in set(widths):
        at = [isotropic_baseline(int(n), width) for n in grid]
        rows = np.array(widths) == width
        known = (counts >= 2) & rows[:, None]
        for name in BASELINES:
            table = np.array([getattr(b, name) for b in at])
            out[name][known] = np.interp(1 / counts[known], 1 / grid[::-1], table[::-1])
    return out


# Kept beside the measures so that a new one cannot be added without a label.
LABELS: dict[str, str] = {
    "effective_rank": "effective rank (singular values)",
    "effective_rank_variance": "effective rank (variance)",
    "participation_ratio": "participation ratio",
    "stable_rank": "stable rank",
    "numerical_rank": "numerical rank",
    "effective_rank_uncentred": "effective rank, uncentred",
    "effective_rank_variance_uncentred": "effective rank (variance), uncentred",
    "kernel_drift": "kernel drift 1 − CKA",
    "kernel_drift_debiased": "kernel drift 1 − CKA, debiased",
    "kernel_change": "‖K(l+1) − K(l)‖ / ‖K(l)‖",
    "cka": "CKA, debiased",
    "cka_biased": "CKA, biased",
}


def asked_measures(asked: str | Sequence[str]) -> tuple[str, ...]:
    """The names of the measures asked for, in their own order. Raises ValueError for unknown ones."""
    if isinstance(asked, str):
        asked = tuple(LABELS) if asked == "all" else [asked]
    if not isinstance(asked, Collection) or not asked:
        raise ValueError(f"measures must be 'all' or a sequence of at least one measure, got {asked!r}")
    for name in asked:
        if name not in LABELS:
            raise ValueError(f"measures must be 'all' or among {', '.join(LABELS)}, got {name!r}")
    return tuple(name for name in LABELS if name in asked)
