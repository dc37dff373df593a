"""From the moments of one view to its measures: ranks by layer, drift and CKA by pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
from rgfast.runtime.waiting import waits_for
from rgfast.streaming import MomentAccumulator

__all__ = ["Again", "Centering", "measure_moments"]

# Relative error of an effective rank to expect from moments, above which a factor is taken if there is one:
# sums over ranks must agree to 1e-12.
_DOUBT = 1e-12
# Bytes of moments that are solved at once on a device, which launches hold up.
_AT_ONCE = 128 << 20

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
    layers, known = len(widths), count >= 2
    shape = (layers, len(count), max(widths) if spectra else 0)
    spectrum = torch.full(shape, torch.nan, dtype=torch.float64, device=count.device)
    refined: list[Tensor] = [count] * layers
    by_layer: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = [({}, {})] * layers
    # On the CPU the number of matrices decides how they are solved, and so the last bits of each.
    at_once = layers if again is None and waits_for(count.device) else 1
    for some in _together(widths, len(count), at_once):
        centred, at = _solved(moments, some, "mean", refine, again)
        raw, _ = _solved(moments, some, "none", refine, again)
        constant = (centred.sigma[:, 0] == 0) & (raw.sigma[:, 0] > 0)
        found = of_spectra(centred, raw, constant)
        exponent = torch.cat([torch.full_like(count, moments.exponent(layer)) for layer in some])
        sigma = Solved(centred.sigma, centred.error, exponent, centred.rank_limit, centred.path)
        sigmas = sigma.singular_values() if spectra else None
        for layer, part in zip(some, _parts(len(some), len(count)), strict=True):
            refined[layer] = at[part]
            values, bounds = ({name: value[part] for name, value in one.items()} for one in found)
            by_layer[layer] = values, bounds
            if sigmas is not None:
                spectrum[layer, :, : widths[layer]] = torch.where(known[:, None], sigmas[part], torch.nan)
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


def _together(widths: Sequence[int], positions: int, most: int) -> Iterator[list[int]]:
    """Layers of one width, up to ``most`` of them, whose moments at so many positions are solved at once."""
    for width in dict.fromkeys(widths):
        at = [layer for layer, one in enumerate(widths) if one == width]
        step = max(1, min(most, _AT_ONCE // max(1, 8 * positions * width * width)))
        for start in range(0, len(at), step):
            yield at[start : start + step]


def _parts(layers: int, positions: int) -> list[slice]:
    return [slice(k * positions, (k + 1) * positions) for k in range(layers)]


def _solved(
    moments: MomentAccumulator, layers: Sequence[int], centering: Centering, refine: bool, again: Again | None
) -> tuple[Solved, Tensor]:
    """Spectra of layers of one width, each in its unit, and where singular values were too small for moments,
    so that they are those of the factor that was kept, or of the rows (of one layer)."""
    count = moments.count.reshape(-1)
    scatter = [_scatter(moments, layer, centering) for layer in layers]
    summed = None
    if centering == "mean":
        summed = torch.cat([moments.accumulated(layer, scaled=True).reshape(-1) for layer in layers])
    whole = scatter[0] if len(scatter) == 1 else torch.cat(scatter)
    solved = solved_moment(whole, count.repeat(len(layers)), centering, summed)
    if again is not None:
        return solved, again(layers[0], centering, solved)
    refined = torch.zeros(len(whole), dtype=torch.bool, device=count.device)
    most = count - 1 if centering == "mean" else count
    for layer, part in zip(layers, _parts(len(layers), len(count)), strict=True):
        factor = moments.factor(layer, centering=centering, scaled=True) if refine else None
        if factor is None:
            continue
        factor = factor.reshape(len(count), -1, factor.shape[-1])
        at = doubtful(solved.sigma[part], most, _DOUBT) & (count >= 2) & ~factor[:, 0, 0].isnan()
        where = at.nonzero()[:, 0]
        refined[part] = at
        if len(where):
            updates = -(-int(count.max()) // moments.rows_at_once)
            found = solved_factor(factor[where], count[where], centering, updates)
            solved.put(where + part.start, found)
    return solved, refined


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
