"""From the moments of one view to its measures: ranks by layer, drift and CKA by pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rgfast.ops.cka.streaming import cka_from_moments
from rgfast.ops.spectrum.factors import solved_factor
from rgfast.ops.spectrum.moments import solved_moment
from rgfast.ops.spectrum.solve import Solved
from rgfast.probing.measured import Measured, doubtful, of_kernels, of_spectra
from rgfast.probing.measures import Kernels
from rgfast.runtime.threads import one_thread
from rgfast.streaming import MomentAccumulator

__all__ = ["Again", "Centering", "measure_moments"]

# Relative error of an effective rank to expect from moments, above which a factor is taken if there is one:
# sums over ranks must agree to 1e-12.
_DOUBT = 1e-12

Centering = Literal["mean", "none"]
# Solves the spectra of a layer again from its rows, in place, where moments resolve too little: says where.
Again = Callable[[int, Centering, Solved], Tensor]


def measure_moments(
    moments: MomentAccumulator, *, spectra: bool = True, refine: bool = True, again: Again | None = None
) -> Measured:
    """All measures of a view; ``refine`` uses triangular factors where moments resolve too little, or
    ``again`` if there is one.

    Undefined values are NaN: a rank of fewer than two rows, a CKA or drift beside a layer without variance,
    a debiased one of fewer than four rows. A constant layer has rank 0.
    """
    widths, count = moments.widths, moments.count.reshape(-1)
    known, refined, by_layer = count >= 2, [], []
    spectrum = torch.full(
        (len(widths), len(count), max(widths) if spectra else 0),
        torch.nan,
        dtype=torch.float64,
        device=count.device,
    )
    for layer, width in enumerate(widths):
        centred, at = _solved(moments, layer, "mean", refine, again)
        raw, _ = _solved(moments, layer, "none", refine, again)
        refined.append(at)
        constant = (centred.sigma[:, 0] == 0) & (raw.sigma[:, 0] > 0)
        by_layer.append(of_spectra(centred, raw, constant))
        if spectra:
            exponent = torch.full_like(count, moments.exponent(layer))
            sigma = Solved(centred.sigma, centred.error, exponent, count, centred.path).singular_values()
            spectrum[layer, :, :width] = torch.where(known[:, None], sigma, torch.nan)
    values, bounds = (
        {name: torch.where(known, torch.stack([one[name] for one in parts]), torch.nan) for name in parts[0]}
        for parts in zip(*by_layer, strict=True)
    )
    # Sums over whole matrices are cut by the number of threads; eigenvalues above are not.
    with one_thread():
        debiased, biased = (
            cka_from_moments(moments, debiased=debiased)[0].permute(1, 2, 0) for debiased in (True, False)
        )
        values |= of_kernels(Kernels(debiased, biased, _changes(moments)))
    return Measured(count.repeat(len(widths), 1), values, bounds, torch.stack(refined), spectrum)


def _solved(
    moments: MomentAccumulator, layer: int, centering: Centering, refine: bool, again: Again | None
) -> tuple[Solved, Tensor]:
    """Spectra of a layer in its unit, and where singular values were too small for moments, so that they are
    those of the factor that was kept, or of the rows."""
    count = moments.count.reshape(-1)
    summed = moments.accumulated(layer, scaled=True).reshape(-1) if centering == "mean" else None
    solved = solved_moment(_scatter(moments, layer, centering), count, centering, summed)
    if again is not None:
        return solved, again(layer, centering, solved)
    factor = moments.factor(layer, centering=centering, scaled=True) if refine else None
    if factor is None:
        return solved, torch.zeros_like(count, dtype=torch.bool)
    factor = factor.reshape(len(count), -1, factor.shape[-1])
    most = count - 1 if centering == "mean" else count
    at = doubtful(solved.sigma, most, _DOUBT) & (count >= 2) & ~factor[:, 0, 0].isnan()
    where = at.nonzero()[:, 0]
    if len(where):
        updates = -(-int(count.max()) // moments.rows_at_once)
        solved.put(where, solved_factor(factor[where], count[where], centering, updates))
    return solved, at


def _scatter(moments: MomentAccumulator, layer: int, centering: Centering) -> Tensor:
    """``[P, d, d]`` in the layer's unit, in which the rest are too; zero where nothing was counted."""
    found = moments.scatter(layer, centering=centering, scaled=True)
    empty = moments.count.reshape(-1) == 0
    return found.reshape(-1, *found.shape[-2:]).masked_fill_(empty[:, None, None], 0.0)


def _changes(moments: MomentAccumulator) -> Tensor:
    """‖K_{l+1} − K_l‖ / ‖K_l‖ of centred kernels ``[L-1, P]``, which unlike the drift sees scale."""
    count = moments.count.reshape(-1)
    out = torch.full(
        (len(moments.widths) - 1, len(count)), torch.nan, dtype=torch.float64, device=count.device
    )
    for i, j in moments.pairs:
        if j == i + 1:
            first, second, cross = moments.pair(i, i), moments.pair(j, j), moments.pair(i, j)
            scale = math.ldexp(1.0, 2 * (cross.exponent_j - cross.exponent_i))
            a, b, ab = (p.cross.square().sum((-1, -2)) for p in (first, second, cross))
            square = (a + b * scale**2 - 2 * ab * scale).clamp_min(0.0)
            out[i] = torch.where(a > 0, (square / a).sqrt(), torch.nan).reshape(-1)
    return out
