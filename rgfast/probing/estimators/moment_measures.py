"""From the moments of one view to its measures: ranks by layer, drift and CKA by pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rgfast.ops.cka.streaming import cka_of_sums
from rgfast.ops.spectrum.factors import solved_factor
from rgfast.ops.spectrum.moments import solved_both, solved_moment
from rgfast.ops.spectrum.solve import Solved
from rgfast.probing.measured import Measured, doubtful, of_kernels, of_spectra, parted
from rgfast.probing.measures import Kernels
from rgfast.runtime.threads import one_thread
from rgfast.runtime.waiting import numbers, sent, waits_for
from rgfast.streaming import KernelSums, MomentAccumulator, Together

__all__ = ["Again", "Centering", "measure_all", "measure_moments"]

# Relative error of an effective rank to expect from moments, above which a factor is taken if there is one:
# sums over ranks must agree to 1e-12.
_DOUBT = 1e-12

Centering = Literal["mean", "none"]
# Solves the spectra of a layer again from its rows, in place, where moments resolve too little: says where.
Again = Callable[[int, Centering, Solved], Tensor]


def measure_moments(
    moments: MomentAccumulator,
    *,
    spectra: bool = True,
    refine: bool = True,
    again: Again | None = None,
    uncentred: bool = True,
) -> Measured:
    """All measures of a view; ``refine`` uses triangular factors where moments resolve too little, or
    ``again`` if there is one. Without ``uncentred`` the measures of uncentred rows are NaN.

    Undefined values are NaN: a rank of fewer than two rows, a CKA or drift beside a layer without variance,
    a debiased one of fewer than four rows. A constant layer has rank 0.
    """
    return _measured(Together([moments]), moments, spectra, refine, again, uncentred)


def measure_all(
    parts: Sequence[MomentAccumulator], *, spectra: bool = True, refine: bool = True, uncentred: bool = True
) -> list[Measured]:
    """:func:`measure_moments` of several views or parts of the same layers: at once, where launches are what
    takes time, if they have the same units."""
    if len(parts) == 1 or not Together.fit(parts):
        return [measure_moments(one, spectra=spectra, refine=refine, uncentred=uncentred) for one in parts]
    found = _measured(Together(parts), parts[0], spectra, refine=False, again=None, uncentred=uncentred)
    return parted(found, [part.count.numel() for part in parts])


def _measured(
    sums: Together,
    moments: MomentAccumulator,
    spectra: bool,
    refine: bool,
    again: Again | None,
    uncentred: bool,
) -> Measured:
    """All measures of ``sums``, of ``moments`` if they have factors or can be solved again."""
    widths, count = sums.widths, sums.count
    layers, known = len(widths), count >= 2
    shape = (layers, len(count), max(widths) if spectra else 0)
    spectrum = torch.full(shape, torch.nan, dtype=torch.float64, device=count.device)
    refined: list[Tensor] = [count] * layers
    by_layer: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = [({}, {})] * layers
    # On the CPU the number of matrices decides how they are solved, and so the last bits of each.
    at_once = layers if again is None and waits_for(count.device) else 1
    for some in sums.at_once(at_once):
        factored = moments if refine and any(layer in moments.factored for layer in some) else None
        centred, raw, at = _solved(sums, some, factored, again, uncentred)
        constant = centred.sigma[:, 0] == 0
        if raw is not None:
            constant &= raw.sigma[:, 0] > 0
        values, bounds = of_spectra(centred, raw, constant)
        exponent = torch.cat([torch.full_like(count, sums.exponents[layer]) for layer in some])
        sigma = Solved(centred.sigma, centred.error, exponent, centred.rank_limit, centred.path)
        sigmas = sigma.singular_values() if spectra else None
        for layer, part in zip(some, _parts(len(some), len(count)), strict=True):
            refined[layer] = at[part]
            of_values, of_bounds = (
                {name: value[part] for name, value in one.items()} for one in (values, bounds)
            )
            by_layer[layer] = of_values, of_bounds
            if sigmas is not None:
                spectrum[layer, :, : widths[layer]] = torch.where(known[:, None], sigmas[part], torch.nan)
    values, bounds = (
        {name: torch.where(known, torch.stack([one[name] for one in parts]), torch.nan) for name in parts[0]}
        for parts in zip(*by_layer, strict=True)
    )
    # Sums over whole matrices are cut by the number of threads; eigenvalues above are not.
    with one_thread():
        of_pairs = sums.kernels(products=True)
        debiased, biased = (
            cka_of_sums(of_pairs, debiased=debiased)[0].permute(1, 2, 0) for debiased in (True, False)
        )
        values |= of_kernels(Kernels(debiased, biased, _changes(of_pairs)))
    return Measured(count.repeat(len(widths), 1), values, bounds, torch.stack(refined), spectrum)


def _parts(layers: int, positions: int) -> list[slice]:
    return [slice(k * positions, (k + 1) * positions) for k in range(layers)]


def _solved(
    sums: Together,
    layers: Sequence[int],
    factored: MomentAccumulator | None,
    again: Again | None,
    uncentred: bool,
) -> tuple[Solved, Solved | None, Tensor]:
    """Spectra of centred and of raw rows of layers of one width, each in its unit, and where the singular
    values of the former were too small for moments, so that they are those of the factor that was kept, or of
    the rows (of one layer)."""
    count = sums.count.repeat(len(layers))
    empty, summed = (count == 0)[:, None, None], sums.accumulated(layers)
    centred: Solved
    raw: Solved | None
    if uncentred and waits_for(count.device):
        # Zero where nothing was counted.
        centred, raw = solved_both(sums.both_scatters(layers).masked_fill_(empty, 0.0), count, summed)
    else:
        whole = sums.scatters(layers, centred=True).masked_fill_(empty, 0.0)
        centred, raw = solved_moment(whole, count, "mean", summed), None
        if uncentred:
            whole = sums.scatters(layers, centred=False).masked_fill_(empty, 0.0)
            raw = solved_moment(whole, count, "none")
    at = _refined(centred, sums, layers, "mean", factored, again)
    if raw is not None:
        _refined(raw, sums, layers, "none", factored, again)
    return centred, raw, at


def _refined(
    solved: Solved,
    sums: Together,
    layers: Sequence[int],
    centering: Centering,
    factored: MomentAccumulator | None,
    again: Again | None,
) -> Tensor:
    """Where spectra were replaced, in place."""
    if again is not None:
        return again(layers[0], centering, solved)
    count = sums.count
    refined = torch.zeros(len(solved.sigma), dtype=torch.bool, device=count.device)
    if factored is None:
        return refined
    most = count - 1 if centering == "mean" else count
    for layer, part in zip(layers, _parts(len(layers), len(count)), strict=True):
        factor = factored.factor(layer, centering=centering, scaled=True)
        if factor is None:
            continue
        factor = factor.reshape(len(count), -1, factor.shape[-1])
        at = doubtful(solved.sigma[part], most, _DOUBT) & (count >= 2) & ~factor[:, 0, 0].isnan()
        where = at.nonzero()[:, 0]
        refined[part] = at
        if len(where):
            updates = -(-int(count.max()) // factored.rows_at_once)
            found = solved_factor(factor[where], count[where], centering, updates)
            solved.put(where + part.start, found)
    return refined


def _changes(sums: KernelSums) -> Tensor:
    """‖K_{l+1} − K_l‖ / ‖K_l‖ of centred kernels ``[L-1, P]``, which unlike the drift sees scale."""
    layers, device = len(sums.traces), sums.count.device
    out = torch.full((layers - 1, len(sums.count)), torch.nan, dtype=torch.float64, device=device)
    kept = [(k, i) for k, (i, j) in enumerate(sums.pairs) if j == i + 1]
    if not kept:
        return out
    at = numbers([i for _, i in kept], device)
    powers = [math.ldexp(1.0, 2 * (sums.exponents[i + 1] - sums.exponents[i])) for _, i in kept]
    scale = sent(torch.from_numpy(np.array(powers)), device)[:, None]
    a, b, ab = sums.norms[at], sums.norms[at + 1], sums.norms[numbers([k for k, _ in kept], device)]
    square = (a + b * scale**2 - 2 * ab * scale).clamp_min(0.0)
    out[at] = torch.where(a > 0, (square / a).sqrt(), torch.nan)
    return out
