"""From all rows of a few positions to their measures, as :mod:`.moment_measures` from moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgfast.ops.cka.api import alignment
from rgfast.ops.spectrum.equal_rows import limit_by_equal_rows
from rgfast.ops.spectrum.rows import (
    refine_spectra,
    refined_spectra_of_rows,
    spectra_of_rows,
    spectra_without_groups,
)
from rgfast.ops.spectrum.solve import Solved
from rgfast.probing.measured import Measured, doubtful, of_kernels, of_spectra
from rgfast.probing.measures import Kernels

__all__ = ["DOUBT", "Align", "Room", "measure_rows"]

# Compares layers ``rows[l][P, n, d_l]`` of which the centred moments and the means are known.
Align = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Tensor]

# Relative error of an effective rank to expect from moments, above which it is computed again from the rows.
DOUBT = 1e-11


def measure_rows(
    layers: Sequence[Tensor] | Tensor,
    *,
    adjacent: bool,
    uncentred: bool,
    groups: int = 1,
    compared: bool = True,
    align: Align | None = None,
    room: Room | None = None,
) -> tuple[Measured, ...] | None:
    """The measures of ``layers[l][P, n, d_l]`` for P positions; None if there is NaN or infinity.

    CKA is of all pairs, or of ``adjacent`` ones, and NaN unless ``compared``; ranks of rows as they are are
    NaN unless ``uncentred``. What n is too small for is NaN. With ``groups``, there follow the measures
    without the samples g, g + groups, ... for every g. ``align`` takes the layers' moments, made in ``room``,
    and compares them, if there are no groups, n ≥ d_l and squares of squares are numbers of fp64.
    """
    rows = list(layers)
    positions, n = rows[0].shape[:2]
    widths = [x.shape[2] for x in rows]
    if n < 2 or not positions:
        return (_nothing(rows),) * (1 + groups if groups > 1 else 1)
    moments = None if align is None else _Moments(rows, room or Room())
    found: list[list[_Spectral | None]] = [[None] * len(rows) for _ in range(1 + groups if groups > 1 else 1)]
    for width in dict.fromkeys(widths):
        at = [layer for layer, one in enumerate(widths) if one == width]
        alike = layers if isinstance(layers, Tensor) else torch.stack([rows[layer] for layer in at])
        variants = _of_one_width(alike, uncentred, groups, None if moments is None else moments.at(at))
        if variants is None:
            return None
        for variant, some in zip(found, variants, strict=True):
            for k, layer in enumerate(at):
                variant[layer] = some.of_layer(k)
    parts = [_joined([one for one in variant if one is not None], widths) for variant in found]
    aligned = None
    if align is not None and moments is not None:
        aligned = align(rows, moments.owns, moments.means)[None]
    if not compared:
        shape = (len(rows), len(rows), positions)
        unknown = torch.full(shape, torch.nan, dtype=torch.float64, device=rows[0].device)
        kernels = Kernels(unknown, unknown, unknown.diagonal(1).T)
        return tuple(replace(part, values=part.values | of_kernels(kernels)) for part, _ in parts)
    if aligned is None:
        aligned = alignment(rows, adjacent=adjacent, groups=groups)
    return tuple(_with_pairs(*part, pairs) for part, pairs in zip(parts, aligned, strict=True))


class Room:
    """Memory that is used again and again: fresh pages cost as much as a copy."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
        """Uninitialised memory, which the next call for ``name`` takes again."""
        count, held = math.prod(shape), self._held.get(name)
        if held is None or held.numel() < count or held.dtype != dtype:
            held = self._held[name] = torch.empty(count, dtype=dtype, device=device)
        return held[:count].view(shape)


class _Moments:
    """The centred moments ``[P, d_l, d_l]`` and means ``[P, d_l]`` of layers, to be filled in."""

    def __init__(self, rows: Sequence[Tensor], room: Room) -> None:
        self._positions, self._room = len(rows[0]), room
        self.owns: list[Tensor] = [*rows]
        self.means: list[Tensor] = [*rows]
        self._widths = [x.shape[2] for x in rows]

    def at(self, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Room for these layers of one width, ``[layers · P, ...]``."""
        width = self._widths[layers[0]]
        count = len(layers) * self._positions
        matrix = self._room.take(f"moments {width}", torch.float64, self.owns[0].device, count, width, width)
        means = torch.empty(len(matrix), width, dtype=torch.float64, device=matrix.device)
        for k, layer in enumerate(layers):
            part = slice(k * self._positions, (k + 1) * self._positions)
            self.owns[layer], self.means[layer] = matrix[part], means[part]
        return matrix, means


@dataclass(frozen=True)
class _Spectral:
    """What spectra lead to, ``[L, P]`` (of one layer ``[P]``), with ‖K‖² of the centred kernels."""

    count: Tensor
    values: dict[str, Tensor]
    bounds: dict[str, Tensor]
    refined: Tensor
    spectrum: Tensor
    norm: Tensor

    def of_layer(self, k: int) -> _Spectral:
        return _Spectral(
            self.count[k],
            {name: value[k] for name, value in self.values.items()},
            {name: bound[k] for name, bound in self.bounds.items()},
            self.refined[k],
            self.spectrum[k],
            self.norm[k],
        )


def _of_one_width(
    states: Tensor, uncentred: bool, groups: int, room: tuple[Tensor, Tensor] | None
) -> list[_Spectral] | None:
    """Of ``states[L, P, n, d]``, and without each group; None if there is NaN or infinity."""
    layers, positions, n, d = states.shape
    x = states.reshape(layers * positions, n, d)
    if room is None:
        whole = refined_spectra_of_rows(x, uncentred=uncentred, doubt=DOUBT)
        matrix = means = None
    else:
        matrix, means = room
        whole = spectra_of_rows(x, uncentred=uncentred, matrix=matrix, means=means)
    left = spectra_without_groups(x, groups, uncentred=uncentred) if groups > 1 else []
    if whole is None or left is None:
        return None
    group = torch.arange(n, dtype=torch.int64, device=states.device) % groups
    found = [_spectral(states, *whole, None, room)]
    found += [_spectral(states, *part, group != g) for g, part in enumerate(left)]
    if matrix is not None and means is not None and states.dtype == torch.float64:
        power = whole[0].exponent.double()
        matrix *= torch.exp2(2 * power)[:, None, None]
        means *= torch.exp2(power)[:, None]
    return found


def _spectral(
    states: Tensor,
    centred: Solved,
    raw: Solved | None,
    kept: Tensor | None,
    moments: tuple[Tensor, Tensor] | None = None,
) -> _Spectral:
    """All but drifts and pairs of the samples ``kept`` (or all)."""
    layers, positions, n, d = states.shape
    n = n if kept is None else int(kept.sum())
    shape, most = (layers, positions), torch.full_like(centred.rank_limit, n)
    again = _refine(states, kept, centred, "mean", moments)
    constant = torch.zeros_like(again)
    if raw is not None:
        constant = (centred.sigma[:, 0] == 0) & (raw.sigma[:, 0] > 0)
        _refine(states, kept, raw, "none", moments, but=constant)
    values, bounds = (
        {name: value.reshape(shape) for name, value in found.items()}
        for found in of_spectra(centred, raw, constant)
    )
    spectrum = torch.zeros(*shape, d, dtype=torch.float64, device=states.device)
    spectrum[..., : centred.sigma.shape[1]] = centred.singular_values().reshape(*shape, -1)
    norm = spectrum.square().square().sum(-1)
    return _Spectral(most.reshape(shape), values, bounds, again.reshape(shape), spectrum, norm)


def _joined(parts: list[_Spectral], widths: list[int]) -> tuple[Measured, Tensor]:
    """All layers' measures but drifts and pairs, and ‖K‖² ``[L, P]``."""
    first = parts[0]
    spectrum = torch.full(
        (len(parts), *first.count.shape, max(widths)),
        torch.nan,
        dtype=torch.float64,
        device=first.count.device,
    )
    for to, part in zip(spectrum, parts, strict=True):
        to[:, : part.spectrum.shape[-1]] = part.spectrum
    measured = Measured(
        torch.stack([part.count for part in parts]),
        {name: torch.stack([part.values[name] for part in parts]) for name in first.values},
        {name: torch.stack([part.bounds[name] for part in parts]) for name in first.bounds},
        torch.stack([part.refined for part in parts]),
        spectrum,
    )
    return measured, torch.stack([part.norm for part in parts])


def _with_pairs(found: Measured, norm: Tensor, aligned: Tensor) -> Measured:
    """What was found with CKA ``aligned[2, P, L, L]``, debiased and biased, and the drifts it leads to."""
    debiased, biased = (matrix.permute(1, 2, 0) for matrix in aligned)
    debiased = torch.where(found.count.amin(0) >= 4, debiased, torch.nan)
    drift = (1 - biased.diagonal(1).T).clamp_min(0.0)
    change = _change_of(norm, drift)
    return replace(found, values=found.values | of_kernels(Kernels(debiased, biased, change)))


def _change_of(norm: Tensor, drift: Tensor) -> Tensor:
    """‖K_{l+1} − K_l‖ / ‖K_l‖ ``[L-1, P]`` of centred kernels of ‖K‖² ``[L, P]`` and of drift ``[L-1, P]``.

    ‖K' − K‖² = (‖K'‖ − ‖K‖)² + 2 ‖K‖‖K'‖ (1 − CKA), which does not cancel.
    """
    ratio = (norm[1:] / norm[:-1]).sqrt()
    turned = torch.where(ratio > 0, 2 * ratio * drift, 0.0)
    change = ((ratio - 1).square() + turned).sqrt()
    return torch.where(norm[:-1] > 0, change, math.nan)


def _refine(
    states: Tensor,
    kept: Tensor | None,
    solved: Solved,
    centering: str,
    moments: tuple[Tensor, Tensor] | None,
    but: Tensor | None = None,
) -> Tensor:
    """Solve again from the rows what is in doubt, of the matrices of all layers and positions but some.

    Returns where spectra are not from moments alone.
    """
    x = states.reshape(-1, *states.shape[2:])
    open_ = solved.path == 0
    if but is not None:
        open_ &= ~but
    at = (doubtful(solved.sigma, solved.rank_limit, DOUBT) & open_).nonzero()[:, 0]
    if len(at):
        limit_by_equal_rows(x, solved, at, centering=centering, kept=kept)
        at = at[doubtful(solved.sigma[at], solved.rank_limit[at], DOUBT)]
    if len(at):
        refine_spectra(x, solved, at, centering=centering, kept=kept, moments=moments)
    return solved.path > 0


def _nothing(rows: Sequence[Tensor]) -> Measured:
    """Measures of too few rows: the count, and NaN."""
    layers, (positions, n), device = len(rows), rows[0].shape[:2], rows[0].device

    def unknown(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=torch.float64, device=device)

    sigma = Solved(
        unknown(layers * positions, 1),
        unknown(layers * positions, 1),
        *(torch.zeros(layers * positions, dtype=torch.int64, device=device) for _ in range(3)),
    )
    nowhere = torch.zeros(layers * positions, dtype=torch.bool, device=device)
    values, bounds = (
        {name: unknown(layers, positions) for name in found} for found in of_spectra(sigma, None, nowhere)
    )
    pairs = unknown(layers, layers, positions)
    values |= of_kernels(Kernels(pairs, pairs, unknown(layers - 1, positions)))
    count = torch.full((layers, positions), n, dtype=torch.int64, device=device)
    widest = max(x.shape[2] for x in rows)
    return Measured(
        count, values, bounds, nowhere.reshape(layers, positions), unknown(layers, positions, widest)
    )
