"""From all rows of a few positions to their measures, as :mod:`.moment_measures` from moments."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgfast.ops.cka.api import alignment
from rgfast.ops.spectrum.measures import numpy_on_cpu
from rgfast.ops.spectrum.rows import refine_spectra, spectra_of_rows, spectra_without_groups
from rgfast.ops.spectrum.solve import Solved
from rgfast.probing.measured import Measured, doubtful, of_kernels, of_spectra
from rgfast.probing.measures import Kernels

__all__ = ["measure_rows"]

# Relative error of an effective rank to expect from moments, above which it is computed again from the rows.
_DOUBT = 1e-11


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
    group = torch.arange(n, dtype=torch.int64, device=states.device) % groups
    found = [_spectral(states, *whole, None)]
    found += [_spectral(states, *part, group != g) for g, part in enumerate(left)]
    aligned = alignment(list(states), adjacent=adjacent, groups=groups)
    return tuple(_with_pairs(part, pairs) for part, pairs in zip(found, aligned, strict=True))


def _spectral(states: Tensor, centred: Solved, raw: Solved | None, kept: Tensor | None) -> Measured:
    """All but drifts and pairs of the samples ``kept`` (or all)."""
    layers, positions, n, d = states.shape
    n = n if kept is None else int(kept.sum())
    shape, most = (layers, positions), torch.full_like(centred.rank_limit, n)
    again = doubtful(centred.sigma, most - 1, _DOUBT)
    _refine(states, kept, centred, again, "mean")
    constant = torch.zeros_like(again)
    if raw is not None:
        constant = (centred.sigma[:, 0] == 0) & (raw.sigma[:, 0] > 0)
        _refine(states, kept, raw, doubtful(raw.sigma, most, _DOUBT) & ~constant, "none")
    values, bounds = (
        {name: value.reshape(shape) for name, value in found.items()}
        for found in of_spectra(centred, raw, constant)
    )
    spectrum = torch.zeros(*shape, d, dtype=torch.float64, device=states.device)
    spectrum[..., : centred.sigma.shape[1]] = centred.singular_values().reshape(*shape, -1)
    return Measured(most.reshape(shape), values, bounds, again.reshape(shape), spectrum)


def _with_pairs(found: Measured, aligned: Tensor) -> Measured:
    """What was found with CKA ``aligned[2, P, L, L]``, debiased and biased, and the drifts it leads to."""
    debiased, biased = (matrix.permute(1, 2, 0) for matrix in aligned)
    drift = (1 - biased.diagonal(1).T).clamp_min(0.0)
    change = _change_of(found.spectrum, drift)
    return replace(found, values=found.values | of_kernels(Kernels(debiased, biased, change)))


@numpy_on_cpu
def _change_of(sigma: Any, drift: Any) -> Any:
    """‖K_{l+1} − K_l‖ / ‖K_l‖ ``[L-1, P]`` of centred kernels of rows with singular values ``[L, P, d]`` and
    of drift ``[L-1, P]``.

    ‖K' − K‖² = (‖K'‖ − ‖K‖)² + 2 ‖K‖‖K'‖ (1 − CKA), which does not cancel.
    """
    library: Any = torch if isinstance(sigma, Tensor) else np
    norms = library.square(library.square(sigma)).sum(-1)  # ‖K‖²
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = library.sqrt(norms[1:] / norms[:-1])
        turned = library.where(ratio > 0, 2 * ratio * drift, 0.0)
        change = library.sqrt(library.square(ratio - 1) + turned)
        return library.where(norms[:-1] > 0, change, math.nan)


def _refine(states: Tensor, kept: Tensor | None, solved: Solved, doubt: Tensor, centering: str) -> None:
    """Solve again from the rows what is in ``doubt``, of the matrices of all layers and positions."""
    at = doubt.nonzero()[:, 0]
    if len(at):
        x = states.reshape(-1, *states.shape[2:])[at]
        refine_spectra(x if kept is None else x[:, kept], solved, at, centering=centering)
