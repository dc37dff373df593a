"""The measures of one view, as tensors where the activations are until the result is assembled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgfast.ops.spectrum.measures import TINY, numpy_on_cpu
from rgfast.ops.spectrum.solve import Solved
from rgfast.probing.measures import MEASURES, Kernels, Kind, Measure
from rgfast.runtime.waiting import numbers, read, waits_for

__all__ = [
    "Measured",
    "baselines",
    "doubtful",
    "joined",
    "of_kernels",
    "of_spectra",
    "on_host",
    "parted",
    "spread",
    "to_host",
]

_GRID = 12  # baselines at more sample numbers than this are interpolated


@dataclass(frozen=True)
class Measured:
    """Measures of one view; the last axis (or axes) is the flattened leading shape of its moments.

    ``values[name]`` are ``[L, P]`` of ranks, ``[L-1, P]`` of drifts and ``[L, L, P]`` of pairs, NaN where a
    pair was not asked for; ``bounds[name]`` ``[L, P]`` bound the relative rounding errors of those ranks that
    have one, and ``refined[L, P]`` says where the centred spectrum is not from moments alone. ``spectrum`` is
    ``[L, P, max d]`` padded with NaN, ``count`` ``[L, P]``.
    """

    count: Tensor
    values: dict[str, Tensor]
    bounds: dict[str, Tensor]
    refined: Tensor
    spectrum: Tensor


def to_host(found: Measured) -> dict[str, NDArray[Any]]:
    """Everything of a view in the host's memory, by name: measures, ``<measure>_bound``, ``n_by_layer``,
    ``refined`` and ``singular_values``."""
    found = on_host(found)
    named = found.values | {f"{name}_bound": bound for name, bound in found.bounds.items()}
    named |= {"n_by_layer": found.count, "refined": found.refined, "singular_values": found.spectrum}
    return {name: value.numpy() for name, value in named.items()}


def on_host(found: Measured) -> Measured:
    """The same in the host's memory, where it is read for the first time and in one transfer."""
    if not waits_for(found.count.device):
        return found
    given = [*found.values.values(), *found.bounds.values(), found.count, found.refined, found.spectrum]
    *named, count, refined, spectrum = read(given)
    values = dict(zip(found.values, named, strict=False))
    bounds = dict(zip(found.bounds, named[len(values) :], strict=True))
    return Measured(count, values, bounds, refined, spectrum)


def of_spectra(
    centred: Solved, raw: Solved | None, constant: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All ranks ``[N]`` of centred spectra and those of rows as they are, and bounds; without ``raw`` NaN.

    ``constant[N]`` says where nothing varies but rows are not zero.
    """
    values, bounds = {}, {}
    lower = None if raw is None else raw.sigma.clone()
    if lower is not None:
        # n μ μᵀ has rank one, which eigenvalues would only say to rounding.
        lower[:, 1:].masked_fill_(constant[:, None], 0.0)
    for measure in _of_kind("rank"):
        half = measure.needs == "uncentred"
        solved, sigma = (raw, lower) if half else (centred, centred.sigma)
        if solved is None or sigma is None:
            nothing = torch.full_like(centred.sigma[:, 0], torch.nan)
            values[measure.name] = nothing
            if measure.bound is not None:
                bounds[measure.name] = nothing
            continue
        values[measure.name] = measure.of(sigma)
        if measure.bound is not None:
            bound = measure.bound(solved)
            bounds[measure.name] = bound.masked_fill(constant, 0.0) if half else bound
    return values, bounds


def of_kernels(kernels: Kernels) -> dict[str, Tensor]:
    """All drifts and pairs."""
    return {measure.name: measure.of(kernels) for measure in _of_kind("drift", "pair")}


def _of_kind(*kinds: Kind) -> list[Measure]:
    return [measure for measure in MEASURES.values() if measure.kind in kinds]


@numpy_on_cpu
def doubtful(sigma: Any, most: Any, allowed: float) -> Any:
    """Where an effective rank of singular values ``[P, d]``, ``most[P]`` of them not zero, may err by more
    than ``allowed`` of itself.

    Eigenvalues of a moment err by about 4 u λ₁, so σ by e = min(4 u σ₁²/σ, √(4 u) σ₁), and the entropy by
    about Σ e ln(Σσ/σ) / Σσ.
    """
    unit, top = 4 * 2.0**-53, sigma[:, :1]
    if isinstance(sigma, Tensor):
        total = sigma.sum(1)[:, None].clamp_min(TINY)
        error = (unit * top * (top / sigma.clamp_min(TINY))).minimum(unit**0.5 * top)
        expected = error / total * -(sigma / total).clamp_min(2.0**-53).log()
        live = torch.arange(sigma.shape[1], dtype=torch.int64, device=sigma.device) < most[:, None]
        return (torch.where(live, expected, 0.0).sum(1) > allowed) & (top[:, 0] > 0)
    total = np.maximum(sigma.sum(1, keepdims=True), TINY)
    with np.errstate(over="ignore"):
        error = np.minimum(unit * top * (top / np.maximum(sigma, TINY)), unit**0.5 * top)
    expected = error / total * -np.log(np.maximum(sigma / total, 2.0**-53))
    live = np.arange(sigma.shape[1]) < most[:, None]
    return (np.where(live, expected, 0.0).sum(1) > allowed) & (top[:, 0] > 0)


def joined(parts: Sequence[Measured]) -> Measured:
    """Several positions' measures as one."""
    if len(parts) == 1:
        return parts[0]

    def along(name: str) -> dict[str, Tensor]:
        values = [getattr(part, name) for part in parts]
        return {key: torch.cat([value[key] for value in values], -1) for key in values[0]}

    return Measured(
        torch.cat([part.count for part in parts], -1),
        along("values"),
        along("bounds"),
        torch.cat([part.refined for part in parts], 1),
        torch.cat([part.spectrum for part in parts], 1),
    )


def parted(whole: Measured, positions: Sequence[int]) -> list[Measured]:
    """The reverse of :func:`joined`: the measures of so many positions each."""
    sizes = list(positions)

    def of_each(x: Tensor, dim: int = -1) -> tuple[Tensor, ...]:
        return torch.split_with_sizes(x, sizes, dim)

    def along(some: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        parts = zip(*map(of_each, some.values()), strict=True) if some else [()] * len(sizes)
        return [dict(zip(some, part, strict=True)) for part in parts]

    parts = (
        of_each(whole.count),
        along(whole.values),
        along(whole.bounds),
        of_each(whole.refined),
        of_each(whole.spectrum, 1),
    )
    return [Measured(*part) for part in zip(*parts, strict=True)]


def spread(parts: Sequence[Measured], streams: Sequence[tuple[int, ...]], layers: int) -> Measured:
    """The measures of all layers from those of streams of them; NaN between layers of two streams."""
    if len(parts) == 1:
        return parts[0]
    first, most = parts[0], max(part.spectrum.shape[2] for part in parts)
    positions = first.count.shape[1]
    shapes = {"rank": (layers,), "drift": (layers - 1,), "pair": (layers, layers)}

    def whole(*shape: int) -> Tensor:
        return first.spectrum.new_full(shape, torch.nan)

    out = Measured(
        first.count.new_zeros(layers, positions),
        {name: whole(*shapes[MEASURES[name].kind], positions) for name in first.values},
        {name: whole(layers, positions) for name in first.bounds},
        first.refined.new_zeros(layers, positions),
        whole(layers, positions, most),
    )
    for members, part in zip(streams, parts, strict=True):
        at = numbers(members, first.count.device)
        out.count[at], out.refined[at] = part.count, part.refined
        out.spectrum[at, :, : part.spectrum.shape[2]] = part.spectrum
        for name, bound in part.bounds.items():
            out.bounds[name][at] = bound
        for name, value in part.values.items():
            if MEASURES[name].kind == "rank":
                out.values[name][at] = value
            elif MEASURES[name].kind == "pair":
                out.values[name][at[:, None], at] = value
            else:
                for k, (i, j) in enumerate(pairwise(members)):
                    if j == i + 1:
                        out.values[name][i] = value[k]
    return out


def baselines(
    counts: NDArray[np.int64], widths: tuple[int, ...], measures: Iterable[Measure]
) -> dict[str, NDArray[np.float64]]:
    """Isotropic baselines ``[L, P]`` of those ``measures`` that have one, for ``counts[L, P]`` samples; NaN
    below two.

    Many different sample numbers are interpolated in 1/n between a few.
    """
    known = {m.name: m.baseline for m in measures if m.baseline is not None}
    out = {name: np.full(counts.shape, np.nan) for name in known}
    sizes = np.unique(counts[counts >= 2])
    if not len(sizes):
        return out
    grid = sizes if len(sizes) <= _GRID else np.unique(np.geomspace(sizes[0], sizes[-1], _GRID).round())
    for width in set(widths):
        at = (counts >= 2) & (np.array(widths) == width)[:, None]
        for name, baseline in known.items():
            table = np.array([baseline(int(n), width) for n in grid])
            out[name][at] = np.interp(1 / counts[at], 1 / grid[::-1], table[::-1])
    return out
