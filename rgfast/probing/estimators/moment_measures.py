"""From the moments of one view to its measures: ranks by layer, drift and CKA by pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rgfast.ops.cka.streaming import cka_of_sums
from rgfast.ops.spectrum.call import Values
from rgfast.ops.spectrum.factors import solved_factor
from rgfast.ops.spectrum.measures import times_power
from rgfast.ops.spectrum.moments import (
    centered_values,
    sample_values,
    solved_moment,
    solved_values,
)
from rgfast.ops.spectrum.ranks import BOUNDED, MEASURED, check
from rgfast.ops.spectrum.selection import TABLE
from rgfast.ops.spectrum.solve import Solved
from rgfast.probing.measured import Measured, doubtful, of_kernels, of_spectra, on_host, parted
from rgfast.probing.measures import Kernels, are_built_in, named
from rgfast.runtime.threads import one_thread
from rgfast.runtime.waiting import numbers, read, sent, waits_for
from rgfast.streaming import KernelSums, MomentAccumulator, Together, in_order

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
    """:func:`measure_moments` of several views or parts of the same layers, in the host's memory: at once,
    where launches are what takes time, if they have the same units."""
    if not Together.fit(parts):
        measured = [
            measure_moments(one, spectra=spectra, refine=refine, uncentred=uncentred) for one in parts
        ]
        return [on_host(found) for found in measured]
    few = [Together.few(part) for part in parts]
    if len({*few}) > 1:
        each: dict[int, Measured] = {}
        for kind in (True, False):
            at = [k for k, of_few in enumerate(few) if of_few is kind]
            some = [parts[k] for k in at]
            measured = measure_all(some, spectra=spectra, refine=refine, uncentred=uncentred)
            each |= zip(at, measured, strict=True)
        return [each[k] for k in range(len(parts))]
    found = _measured(Together(parts), parts[0], spectra, False, None, uncentred, leaving=True)
    return parted(found, [part.positions for part in parts])


def _measured(
    sums: Together,
    moments: MomentAccumulator,
    spectra: bool,
    refine: bool,
    again: Again | None,
    uncentred: bool,
    *,
    leaving: bool = False,
) -> Measured:
    """All measures of ``sums``, of ``moments`` if they have factors or can be solved again.

    With ``leaving`` all that is computed from them is read once, and the rest is computed on the host.
    """
    widths, count = sums.widths, sums.count
    layers = len(widths)
    order: list[int] = []
    tables: list[Tensor] = []  # [measures, K, P]
    places: list[Tensor | None] = []  # [K, P], None: nowhere
    sigmas: list[Tensor] = []  # [K, P, d]
    finite: list[Tensor] = []  # [K · P], where eigenvalues were not looked at
    names: tuple[str, ...] = ()
    bounded: tuple[str, ...] = ()
    there = again is None and waits_for(count.device)
    # On the CPU the number of matrices decides how they are solved, and so the last bits of each.
    for some in sums.at_once(layers if there else 1):
        shape = len(some), len(count)
        factored = moments if refine and any(layer in moments.factored for layer in some) else None
        if there and factored is None and are_built_in("rank") and named("rank") == MEASURED:
            found = TABLE("auto", _values(sums, some, uncentred))
            tables.append(found.table[:-1].view(-1, *shape))
            finite.append(found.table[-1])
            places.append(None)
            names, bounded, sigma = MEASURED, BOUNDED, found.sigma
        else:
            centred, raw, at = _solved(sums, some, factored, again, uncentred)
            constant = centred.sigma[:, 0] == 0
            if raw is not None:
                constant &= raw.sigma[:, 0] > 0
            values, bounds = of_spectra(centred, raw, constant)
            tables.append(torch.stack([*values.values(), *bounds.values()]).view(-1, *shape))
            places.append(None if at is None else at.view(shape))
            names, bounded, sigma = tuple(values), tuple(bounds), centred.sigma
        if spectra:
            sigmas.append(sigma.view(*shape, -1))
        order += some
    table = in_order(tables, order, 1)
    if finite and not leaving:
        check(torch.cat(read(finite)))
    # Sums over whole matrices are cut by the number of threads; eigenvalues above are not.
    with one_thread():
        of_pairs = sums.kernels(products=True)
        if leaving:
            assert of_pairs.products is not None
            count, table, norms, products, traces, *rest = read(
                [count, table, of_pairs.norms, of_pairs.products, of_pairs.traces, *finite, *sigmas]
            )
            finite, sigmas = rest[: len(finite)], rest[len(finite) :]
            of_pairs = KernelSums(of_pairs.pairs, count, norms, products, traces, of_pairs.exponents, True)
        debiased, biased = cka_of_sums(of_pairs, (True, False))[0].unbind()
        pairs = of_kernels(Kernels(debiased, biased, _changes(of_pairs)))
    if finite and leaving:
        check(finite[0] if len(finite) == 1 else torch.cat(finite))
    known = count >= 2
    table = torch.where(known, table, torch.nan)
    bounds = dict(zip(bounded, table[len(names) :].unbind(), strict=True))
    values = dict(zip(names, table[: len(names)].unbind(), strict=True)) | pairs
    nowhere = torch.zeros(layers, len(count), dtype=torch.bool, device=count.device)
    if any(at is not None for at in places):
        masks = [nowhere[: x.shape[1]] if at is None else at for at, x in zip(places, tables, strict=True)]
        refined = in_order(masks, order, 0)
    else:
        refined = nowhere
    exponents = [sums.exponents[layer] for layer in order]
    spectrum = _spectrum(sigmas, exponents, known) if spectra else table.new_empty(layers, len(count), 0)
    return Measured(count.expand(layers, -1), values, bounds, refined, in_order([spectrum], order, 0))


def _spectrum(sigmas: Sequence[Tensor], exponents: Sequence[int], known: Tensor) -> Tensor:
    """Singular values ``[L, P, d]`` as one tensor, from ones in units of the layers, NaN where they are not
    ``known`` or beyond a layer's width."""
    most, first, found = max(sigma.shape[2] for sigma in sigmas), 0, []
    for sigma in sigmas:
        units = exponents[first : first + len(sigma)]
        if any(units):
            sigma = times_power(sigma, numbers(units, sigma.device)[:, None, None])
        sigma, lacking = torch.where(known[:, None], sigma, torch.nan), most - sigma.shape[2]
        found.append(functional.pad(sigma, (0, lacking), value=torch.nan) if lacking else sigma)
        first += len(units)
    return found[0] if len(found) == 1 else torch.cat(found)


def _parts(layers: int, positions: int) -> list[slice]:
    return [slice(k * positions, (k + 1) * positions) for k in range(layers)]


def _solved(
    sums: Together,
    layers: Sequence[int],
    factored: MomentAccumulator | None,
    again: Again | None,
    uncentred: bool,
) -> tuple[Solved, Solved | None, Tensor | None]:
    """Spectra of centred and of raw rows of layers of one width, each in its unit, and where the singular
    values of the former were too small for moments, so that they are those of the factor that was kept, or of
    the rows (of one layer)."""
    count = sums.count.repeat(len(layers))
    centred: Solved
    raw = None
    if waits_for(count.device):
        both = solved_values(_values(sums, layers, uncentred))
        centred = both.of(slice(len(count)))
        if uncentred:
            raw = both.of(slice(len(count), None))
    else:
        empty = (count == 0)[:, None, None]
        summed = sums.accumulated(layers)
        whole = sums.scatters(layers, centred=True).masked_fill_(empty, 0.0)
        centred = solved_moment(whole, count, "mean", summed)
        if uncentred:
            whole = sums.scatters(layers, centred=False).masked_fill_(empty, 0.0)
            raw = solved_moment(whole, count, "none")
    if factored is None and again is None:
        return centred, raw, None
    at = _refined(centred, sums, layers, "mean", factored, again)
    if raw is not None:
        _refined(raw, sums, layers, "none", factored, again)
    return centred, raw, at


def _values(sums: Together, layers: Sequence[int], uncentred: bool) -> Values:
    """Eigenvalues of both kinds of rows, where launches are what takes time. Sums of no rows are zero."""
    count = sums.count.expand(len(layers), -1).reshape(-1)
    if not sums.of_few:
        found = sums.centered(layers)
        assert found.matrix is not None
        return centered_values(found.matrix, count, found.accumulated, found.mean if uncentred else None)
    empty = (count == 0)[:, None]
    products, variances, summed = sums.kernels_of_few(layers, raw=uncentred)
    products, variances = products.masked_fill_(empty[..., None], 0.0), variances.masked_fill_(empty, 0.0)
    return sample_values(products, variances, count, summed)


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
    kept = [(k, i) for k, (i, j) in enumerate(sums.pairs) if j == i + 1]
    at, between = [i for _, i in kept], [k for k, _ in kept]
    powers = np.array([math.ldexp(1.0, 2 * (sums.exponents[i + 1] - sums.exponents[i])) for i in at])
    if sums.read or not waits_for(device):
        norms, out = sums.norms.numpy(), np.full((layers - 1, len(sums.count)), np.nan)
        with np.errstate(all="ignore"):
            out[at] = _change(np, norms[at], norms[np.array(at, int) + 1], norms[between], powers[:, None])
        return torch.from_numpy(out)
    found = sums.norms.new_full((layers - 1, len(sums.count)), torch.nan)
    if kept:
        here, scale = numbers(at, device), sent(torch.from_numpy(powers), device)[:, None]
        of_pairs = sums.norms[numbers(between, device)]
        found[here] = _change(torch, sums.norms[here], sums.norms[here + 1], of_pairs, scale)
    return found


def _change(xp: Any, a: Any, b: Any, ab: Any, scale: Any) -> Any:
    """Of ‖K_l‖², ‖K_{l+1}‖² and ⟨K_l, K_{l+1}⟩, arrays of the library ``xp``."""
    square = (a + b * scale**2 - 2 * ab * scale).clip(0.0)
    return xp.where(a > 0, xp.sqrt(square / a), xp.nan)
