"""Pictures of a probe: ranks, drift, CKA and spectra by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from rgfast.probing.measures import BASELINES, DRIFTS, LABELS, RANKS

if TYPE_CHECKING:
    from rgfast.probing.result import ProbeResult

__all__ = ["plot_cka", "plot_drift", "plot_rank", "plot_spectra"]

COLOURS = {
    "visible": "#1f77b4",
    "masked": "#d62728",
    "position": "#444444",
    "pooled": "#2ca02c",
    "mean_pooled": "#9467bd",
    "flattened": "#8c564b",
}


def plot_rank(
    result: ProbeResult, measure: str, views: Sequence[str] | None, relative: bool, ax: Axes | None
) -> Axes:
    """A rank by layer, one line a view (its mean over positions), the isotropic baseline dotted."""
    if measure not in RANKS:
        raise ValueError(f"measure must be one of {', '.join(RANKS)}, got {measure!r}")
    ax = _axes(ax)
    for view in _views(result, views):
        values = result.order_parameter(view, measure)
        first = _first(values.values) if relative else 1.0
        _line(result, ax, view, measure, values, first)
        if measure in BASELINES and not relative:
            baseline = _mean(result, f"{measure}_baseline", view)
            ax.plot(baseline.layer, baseline, ":", color=COLOURS[view], lw=1, alpha=0.7)
    ax.set_xlabel("layer")
    ax.set_ylabel(LABELS[measure] + (" over the first layer's" if relative else ""))
    ax.set_ylim(bottom=0)
    _finish(ax)
    return ax


def plot_drift(result: ProbeResult, measure: str, views: Sequence[str] | None, ax: Axes | None) -> Axes:
    """A drift by transition, logarithmic, one line a view."""
    if measure not in DRIFTS:
        raise ValueError(f"measure must be one of {', '.join(DRIFTS)}, got {measure!r}")
    ax = _axes(ax)
    drawn = False
    for view in _views(result, views):
        values = result.order_parameter(view, measure)
        values = values.where(values > 0)
        drawn |= bool(values.notnull().any())
        _line(result, ax, view, measure, values, 1.0)
    steps = result.dataset.transition.values
    ax.set_xticks(steps, [f"{k}→{k + 1}" for k in steps], rotation=90 if len(steps) > 12 else 0)
    if drawn:  # a stack that is the identity has no drift to draw, and a logarithm none of zero
        ax.set_yscale("log")
    ax.set_xlabel("transition")
    ax.set_ylabel(LABELS[measure])
    _finish(ax)
    return ax


def plot_cka(result: ProbeResult, measure: str, view: str | None, ax: Axes | None) -> Axes:
    """CKA between layers, the mean over a view's positions; pairs that were not asked for stay blank."""
    values = result.order_parameter(view, measure)
    if "other_layer" not in values.dims:
        raise ValueError(f"measure must be 'cka' or 'cka_biased', got {measure!r}")
    ax = _axes(ax)
    picture = ax.imshow(values.values, origin="lower", vmin=0.0, vmax=1.0, cmap="magma")
    ax.figure.colorbar(picture, ax=ax, label=LABELS[measure])
    ax.set_xlabel("layer")
    ax.set_ylabel("layer")
    ax.set_title(str(values.view.values))
    return ax


def plot_spectra(result: ProbeResult, view: str | None, ax: Axes | None) -> Axes:
    """Singular values by layer over each layer's largest, logarithmic; the mean over a view's positions."""
    view = result._view(view)
    if view == "flattened":
        raise ValueError("view must be one with spectra, and the flattened view keeps none")
    spectra = result.dataset.singular_values.sel(view=view).isel(position=result._own_positions(view))
    ax = _axes(ax)
    layers = result.dataset.sizes["layer"]
    colours = colormaps["viridis"](np.linspace(0, 0.9, layers))
    for layer in range(layers):
        sigma = spectra.isel(layer=layer).transpose("position", "component").values
        top = sigma[:, :1]
        scaled = sigma / np.where(top > 0, top, np.nan)
        known = np.isfinite(scaled).any(0)
        if known.any():
            mean = np.nanmean(scaled[:, known], 0)
            where = 1 + np.flatnonzero(known)
            ax.plot(where, np.where(mean > 0, mean, np.nan), color=colours[layer], label=str(layer))
    if ax.lines:
        ax.set_yscale("log")
        # Moments do not resolve values far below this; a LayerNorm's null direction would set the scale.
        ax.set_ylim(bottom=max(ax.get_ylim()[0], 1e-6))
        ax.legend(title="layer", fontsize="small", ncols=1 + layers // 9)
    ax.set_xlabel("component")
    ax.set_ylabel("singular value over the largest")
    ax.set_title(view)
    return ax


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots(figsize=(6, 4), layout="constrained")[1] if ax is None else ax


def _views(result: ProbeResult, views: Sequence[str] | None) -> list[str]:
    # Ranks of whole sequences as rows live on another scale; they are drawn when asked for.
    chosen = [view for view in result.views if view != "flattened"] if views is None else list(views)
    return [result._view(view) for view in chosen or result.views]


def _mean(result: ProbeResult, name: str, view: str) -> xr.DataArray:
    values = result.dataset[name].sel(view=view).isel(position=result._own_positions(view))
    mean: xr.DataArray = values.mean("position", skipna=True)
    return mean


def _first(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    good = values[np.isfinite(values) & (values > 0)]
    return float(good[0]) if len(good) else np.nan


def _line(result: ProbeResult, ax: Axes, view: str, measure: str, values: xr.DataArray, unit: float) -> None:
    along = np.asarray(values[values.dims[0]].values)
    style: dict[str, Any] = {"color": COLOURS[view], "marker": "o", "ms": 4, "label": view.replace("_", " ")}
    if f"{measure}_se" in result.dataset:
        # Positions of one sequence are dependent: the mean's error is taken as that of a typical position.
        error = _mean(result, f"{measure}_se", view).values / unit
        ax.errorbar(along, values.values / unit, yerr=error, capsize=2, **style)
    else:
        ax.plot(along, values.values / unit, **style)


def _finish(ax: Axes) -> None:
    ax.grid(alpha=0.25)
    ax.legend(fontsize="small")
