"""From all rows of a few positions to their measures, as :mod:`rgfast.probing.measures` from moments."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgfast.ops.cka.api import alignment
from rgfast.ops.spectrum.measures import (
    effective_rank_of,
    numerical_rank_of,
    participation_ratio_of,
    stable_rank_of,
)
from rgfast.ops.spectrum.rows import refine_spectra, spectra_of_rows, spectra_without_groups
from rgfast.ops.spectrum.solve import Solved
from rgfast.probing.measures import BOUNDED, RANKS, Array, Measured, change_of, doubtful, known_drifts

__all__ = ["measure_rows"]

_TOL = 1e-7


def measure_rows(
    states: Tensor, *, adjacent: bool, uncentred: bool, groups: int = 1
) -> tuple[Measured, ...] | None:
    """The measures of ``states[L, P, n, d]`` for P positions; None where NaN or infinity is met.

    CKA of all pairs, or of ``adjacent`` ones; ranks of rows as they are where ``uncentred``, else NaN. With
    ``groups``, also those without the samples g, g + groups, ... for every g.
    """
    layers, positions, n, d = states.shape
    x = states.reshape(layers * positions, n, d)
    whole = spectra_of_rows(x, uncentred=uncentred)
    left = spectra_without_groups(x, groups, uncentred=uncentred) if groups > 1 else []
    if whole is None or left is None:
        return None
    group = torch.arange(n, dtype=torch.int64, device="cpu") % groups
    found = [_spectral(states, *whole, None)]
    found += [_spectral(states, *part, group != g) for g, part in enumerate(left)]
    aligned = alignment(list(states), adjacent=adjacent, groups=groups)
    return tuple(_with_pairs(part, pairs) for part, pairs in zip(found, aligned, strict=True))


def _spectral(states: Tensor, centred: Solved, raw: Solved | None, kept: Tensor | None) -> Measured:
    """All but drifts and pairs, which are empty, of the samples ``kept`` (or all)."""
    layers, positions, n, d = states.shape
    n = n if kept is None else int(kept.sum())
    ranks: dict[str, Array] = {name: np.full((layers, positions), np.nan) for name in RANKS}
    bounds: dict[str, Array] = {name: np.full((layers, positions), np.nan) for name in BOUNDED}
    shape = (layers, positions)
    again = doubtful(centred.sigma, np.full(layers * positions, n - 1))
    _refine(states, kept, centred, again.nonzero()[0], "mean")
    sigma = centred.sigma
    for name, value in (
        ("effective_rank", effective_rank_of(sigma)),
        ("effective_rank_variance", effective_rank_of(sigma, spectrum="variance")),
        ("participation_ratio", participation_ratio_of(sigma)),
        ("stable_rank", stable_rank_of(sigma)),
        ("numerical_rank", numerical_rank_of(sigma, _TOL)),
    ):
        ranks[name] = value.reshape(shape)
    bounds["effective_rank"] = centred.bound().reshape(shape)
    if raw is not None:
        constant = (ranks["stable_rank"] == 0).reshape(-1) & (raw.sigma[:, 0] > 0)
        unsure = doubtful(raw.sigma, np.full(layers * positions, n)) & ~constant
        _refine(states, kept, raw, unsure.nonzero()[0], "none")
        _uncentred(raw, constant, ranks, bounds, shape)
    values = centred.singular_values()
    spectrum = np.full((layers, positions, d), np.nan)
    spectrum[..., : values.shape[1]] = values.reshape(*shape, -1)
    spectrum[..., values.shape[1] :] = 0.0
    return Measured(np.full((layers, positions), n), ranks, bounds, again.reshape(shape), spectrum, {}, {})


def _with_pairs(found: Measured, aligned: Tensor) -> Measured:
    """What was found with CKA ``aligned[2, P, L, L]``, debiased and biased, and the drifts it leads to."""
    debiased, biased = (np.asarray(matrix.permute(1, 2, 0).cpu().numpy()) for matrix in aligned)
    pairs = {"cka": debiased, "cka_biased": biased}
    drifts = known_drifts(pairs)
    norms = np.square(np.square(found.spectrum)).sum(-1)  # ‖K‖² of the centred kernels
    drifts["kernel_change"] = change_of(norms, drifts["kernel_drift"])
    return replace(found, drifts=drifts, pairs=pairs)


def _refine(
    states: Tensor, kept: Tensor | None, solved: Solved, at: NDArray[np.intp], centering: str
) -> None:
    """Solve again from the rows, the matrices ``at`` of all layers and positions."""
    if len(at):
        x = states.reshape(-1, *states.shape[2:])[torch.from_numpy(at).to(states.device)]
        refine_spectra(x if kept is None else x[:, kept], solved, at, centering=centering)


def _uncentred(
    raw: Solved,
    constant: NDArray[np.bool_],
    ranks: dict[str, Array],
    bounds: dict[str, Array],
    shape: tuple[int, int],
) -> None:
    """Fill in what is measured of rows as they are. n μ μᵀ has rank one, where nothing varies."""
    for name, spectrum in (("effective_rank", "singular"), ("effective_rank_variance", "variance")):
        value = np.where(constant, 1.0, effective_rank_of(raw.sigma, spectrum=spectrum))
        ranks[f"{name}_uncentred"] = value.reshape(shape)
    bounds["effective_rank_uncentred"] = np.where(constant, 0.0, raw.bound()).reshape(shape)
