"""Pictures of a probe on one axes each: ranks, drift, CKA, spectra and targets by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from rgfast.probing.measures import BASELINES, DRIFTS, LABELS, RANKS
from rgfast.report.canvas import draw_fits, draw_heat
from rgfast.report.extract import SMALLEST, drift_fits, mean_of
from rgfast.report.palette import VIEW_COLOURS, VIEW_MARKERS, depth_colours, kind_colours

if TYPE_CHECKING:
    from rgfast.probing.result import ProbeResult

__all__ = ["plot_cka", "plot_drift", "plot_heat_map", "plot_rank", "plot_spectra", "plot_targets"]


def plot_rank(
    result: ProbeResult, measure: str, views: Sequence[str] | None, relative: bool, ax: Axes | None
) -> Axes:
    """A rank by layer, one line a view (its mean over positions), the isotropic baseline dotted."""
    if measure not in RANKS:
        raise ValueError(f"measure must be one of {', '.join(RANKS)}, got {measure!r}")
    ax = _axes(ax)
    chosen = _views(result, views)
    for view in chosen:
        values = result.order_parameter(view, measure)
        first = _first(values.values) if relative else 1.0
        _line(result, ax, view, measure, values, first)
        if measure in BASELINES and not relative:
            baseline = _mean(result, f"{measure}_baseline", view)
            label = None if view != chosen[-1] else "dotted: isotropic, same n"
            ax.plot(baseline.layer, baseline, ":", color=VIEW_COLOURS[view], lw=1.2, label=label)
    _by_layer(ax)
    ax.set_ylabel(
        f"{LABELS[measure]} over the first layer's" if relative else f"{LABELS[measure]}, dimensions"
    )
    ax.set_ylim(bottom=0)
    _finish(ax)
    return ax


def plot_drift(result: ProbeResult, measure: str, views: Sequence[str] | None, ax: Axes | None) -> Axes:
    """A drift by transition, logarithmic, one line a view; of a single view also both fits."""
    if measure not in DRIFTS:
        raise ValueError(f"measure must be one of {', '.join(DRIFTS)}, got {measure!r}")
    ax = _axes(ax)
    drawn, chosen = False, _views(result, views)
    for view in chosen:
        values = result.order_parameter(view, measure)
        along = np.flatnonzero(np.isfinite(values.values))
        fits = drift_fits(values.values[along[0] :]) if along.size and len(chosen) == 1 else None
        if fits is not None:
            draw_fits(ax, np.arange(along[0], values.size, dtype=float), fits, VIEW_COLOURS[view])
        values = values.where(values > 0)
        drawn |= bool(values.notnull().any())
        _line(result, ax, view, measure, values, 1.0)
    steps = result.dataset.transition.values
    ax.set_xticks(steps, [f"{k}→{k + 1}" for k in steps], rotation=90 if len(steps) > 12 else 0)
    if drawn:  # a stack that is the identity has no drift to draw, and a logarithm none of zero
        ax.set_yscale("log")
    ax.set_xlabel("transition between layers")
    ax.set_ylabel(LABELS[measure])
    _finish(ax)
    return ax


def plot_cka(result: ProbeResult, measure: str, view: str | None, ax: Axes | None) -> Axes:
    """CKA between layers, the mean over a view's positions; pairs that were not asked for stay blank."""
    values = result.order_parameter(view, measure)
    if "other_layer" not in values.dims:
        raise ValueError(f"measure must be 'cka' or 'cka_biased', got {measure!r}")
    ax = _axes(ax)
    layers = values.layer.values
    picture = draw_heat(ax, values.values, x=layers, y=layers, limits=(0.0, 1.0))
    ax.figure.colorbar(picture, ax=ax, label=LABELS[measure])
    ax.set_xlabel("layer")
    ax.set_ylabel("layer")
    ax.set_title(_titled(result, str(values.view.values)), fontsize=10)
    return ax


def plot_heat_map(result: ProbeResult, measure: str, view: str | None, ax: Axes | None) -> Axes:
    """A rank by layer, or a drift by transition, and position; what is undefined or constant is blank."""
    if measure not in (*RANKS, *DRIFTS):
        raise ValueError(f"measure must be one of {', '.join((*RANKS, *DRIFTS))}, got {measure!r}")
    values = result.by_position(measure, view)
    along = str(values.dims[0])
    grid = values.transpose(along, "position")
    ax = _axes(ax)
    # A layer that is constant (masked rows at the input) would set the scale.
    cells = np.where(grid.values > 0, grid.values, np.nan)
    limits = (float(np.nanmin(cells)), float(np.nanmax(cells))) if np.isfinite(cells).any() else (0.0, 1.0)
    picture = draw_heat(ax, cells, x=grid.position.values, y=grid[along].values, limits=limits)
    ax.figure.colorbar(picture, ax=ax, label=LABELS[measure])
    ax.set_xlabel("position")
    ax.set_ylabel(along)
    ax.set_title(_titled(result, str(values.view.values)), fontsize=10)
    return ax


def plot_targets(result: ProbeResult, view: str | None, ax: Axes | None) -> Axes:
    """Held-out R² of every target by layer, the mean over a view's positions."""
    view = result._view(view)
    if "target" not in result.dataset:
        raise ValueError("source must have been probed with targets, and was probed without")
    ax, names = _axes(ax), [str(name) for name in result.dataset.target.values]
    for name, colour in kind_colours(names).items():
        values = result.target_r2(name, view)
        ax.plot(values.layer, values, color=colour, marker=VIEW_MARKERS[view], ms=4, label=name)
    ax.axhline(0.0, color="black", linewidth=0.6)
    _by_layer(ax)
    ax.set_ylabel("held-out linear R²")
    ax.set_title(_titled(result, view), fontsize=10)
    _finish(ax)
    return ax


def plot_spectra(result: ProbeResult, view: str | None, ax: Axes | None) -> Axes:
    """Singular values by layer over each layer's largest, logarithmic; the mean over a view's positions."""
    view = result._view(view)
    if view == "flattened":
        raise ValueError("view must be one with spectra, and the flattened view keeps none")
    spectra = result._own("singular_values", view)
    ax = _axes(ax)
    layers = result.dataset.sizes["layer"]
    colours = depth_colours(layers)
    for layer in range(layers):
        sigma = spectra.isel(layer=layer).transpose("position", "component").values
        top = sigma[:, :1]
        mean = mean_of(sigma / np.where(top > 0, top, np.nan))
        shown = np.where(mean > SMALLEST, mean, np.nan)
        if np.isfinite(shown).any():
            ax.plot(np.arange(1, len(shown) + 1), shown, color=colours[layer], label=str(layer))
    if ax.lines:
        ax.set_yscale("log")
        ax.legend(title="layer", fontsize="small", ncols=1 + layers // 9)
    ax.set_xlabel("component")
    ax.set_ylabel("singular value over the largest")
    ax.set_title(_titled(result, view), fontsize=10)
    return ax


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots(figsize=(6, 4), layout="constrained")[1] if ax is None else ax


def _views(result: ProbeResult, views: Sequence[str] | None) -> list[str]:
    # Ranks of whole sequences as rows live on another scale; they are drawn when asked for.
    chosen = [view for view in result.views if view != "flattened"] if views is None else list(views)
    return [result._view(view) for view in chosen or result.views]


def _mean(result: ProbeResult, name: str, view: str) -> xr.DataArray:
    mean: xr.DataArray = result._own(name, view).mean("position", skipna=True)
    return mean


def _first(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    good = values[np.isfinite(values) & (values > 0)]
    return float(good[0]) if len(good) else np.nan


def _line(result: ProbeResult, ax: Axes, view: str, measure: str, values: xr.DataArray, unit: float) -> None:
    along = np.asarray(values[values.dims[0]].values)
    style: dict[str, Any] = {
        "color": VIEW_COLOURS[view],
        "marker": VIEW_MARKERS[view],
        "ms": 4,
        "label": _titled(result, view),
    }
    if f"{measure}_se" in result.dataset:
        # Positions of one sequence are dependent: the mean's error is taken as that of a typical position.
        error = _mean(result, f"{measure}_se", view).values / unit
        ax.errorbar(along, values.values / unit, yerr=error, capsize=2, **style)
    else:
        ax.plot(along, values.values / unit, **style)


def _titled(result: ProbeResult, view: str) -> str:
    return f"{view.replace('_', ' ')}  (n = {result._rows(view)})"


def _by_layer(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer (0 = first probed)")


def _finish(ax: Axes) -> None:
    ax.grid(alpha=0.25)
    ax.legend(fontsize="small")
