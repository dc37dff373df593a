"""Figures of a saved ``reproduce`` result. Colour is ξ, marker is the process, in every one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rgfast.files import write_atomically
from rgfast.flow import curve
from rgfast.flow.verdicts import FIRST_LAYER

__all__ = ["plot_drift_by_transition", "plot_order_parameter", "plot_survival", "save_figure"]

# Okabe and Ito's colour-blind-safe palette; short ξ warm, long ξ blue, controls grey.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CONTROL = "#777777"
TITLES = {"visible": "visible rows: what the stack forgets", "masked": "masked rows: what it infers"}
CONTROLS = {
    "control_iid": ("--", "trained on i.i.d. tokens"),
    "control_permuted": (":", "trained on permuted targets"),
}
MARKERS = {"visible": "o", "masked": "s"}
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` to ``path`` as PNG at 150 dpi, atomically."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def _colour(result: xr.Dataset, xi: float) -> str:
    return COLOURS[sorted(float(x) for x in result.xi.values).index(xi) % len(COLOURS)]


def _curves(result: xr.Dataset, measure: str, **run: Any) -> tuple[np.ndarray, np.ndarray]:
    """Layers and one curve a seed, ``[seeds, layers]``, from the view's first meaningful layer on."""
    curves = [curve(result, measure, seed=int(seed), **run) for seed in result.seed.values]
    first = FIRST_LAYER.get(run["view"], 0)
    return np.arange(first, first + curves[0].size), np.stack(curves)


def _draw(axes: Axes, x: np.ndarray, curves: np.ndarray, **style: Any) -> None:
    """The mean as a line and every seed as a point."""
    label = style.pop("label")
    marker = style.pop("marker")
    # A column without any finite value stays empty instead of warning.
    finite = np.isfinite(curves).any(axis=0)
    mean = np.full(curves.shape[1], np.nan)
    mean[finite] = np.nanmean(curves[:, finite], axis=0)
    axes.plot(x, mean, label=label, **style)
    jitter = np.linspace(-0.08, 0.08, len(curves)) if len(curves) > 1 else np.zeros(1)
    for offset, values in zip(jitter, curves, strict=True):
        axes.plot(
            x + offset, values, marker, color=style["color"], markersize=4, alpha=0.55, markeredgewidth=0
        )


def plot_order_parameter(result: xr.Dataset, chain: str) -> Figure:
    """The order parameter by depth: effective rank of visible and of masked rows, one colour a ξ.

    Lines are means over seeds, points the seeds; grey dashes are the stacks trained on i.i.d. tokens and on
    permuted targets, probed on the same sequences at the smallest ξ. Black dots: what isotropic data with as
    many rows and features would give.
    """
    top = max(
        float(result.effective_rank.sel(chain=chain, view=list(MARKERS)).max()),
        float(result.effective_rank_baseline.sel(view=list(MARKERS)).max()),
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.4))
        for axes, view in zip(figure.subplots(1, 2, sharey=True), MARKERS, strict=True):
            for xi in sorted(float(x) for x in result.xi.values):
                x, curves = _curves(result, "effective_rank", chain=chain, xi=xi, stage="trained", view=view)
                ratio = float(np.nanmean(curves[:, -1] / curves[:, 0]))
                _draw(
                    axes,
                    x,
                    curves,
                    color=_colour(result, xi),
                    marker=MARKERS[view],
                    linewidth=2.2,
                    label=f"ξ = {xi:g}   (R = {ratio:.2f})",
                )
            short = min(float(x) for x in result.xi.values)
            for stage, (dash, words) in CONTROLS.items():
                x, curves = _curves(result, "effective_rank", chain=chain, xi=short, stage=stage, view=view)
                _draw(axes, x, curves, color=CONTROL, marker=".", linewidth=1.4, linestyle=dash, label=words)
            baseline = float(result.effective_rank_baseline.sel(view=view))
            axes.axhline(
                baseline, color="black", linewidth=1, linestyle=(0, (1, 2)), label="isotropic, same n"
            )
            axes.set_xlabel("layer (0 = input of the stack)")
            axes.set_title(TITLES[view])
            axes.set_xlim(-0.3, result.sizes["layer"] - 0.7)
            axes.legend(loc="lower left", fontsize=9)
        figure.axes[0].set_ylabel("effective rank (dimensions)")
        figure.axes[0].set_ylim(0, 1.05 * top)
        figure.suptitle(f"{chain} chain: effective rank of the residual stream, mean over positions")
    return figure


def plot_drift_by_transition(result: xr.Dataset, chain: str) -> Figure:
    """Kernel drift 1 − CKA(l, l+1) by transition, on a logarithmic axis; points are seeds, lines means."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.0))
        for axes, view in zip(figure.subplots(1, 2, sharey=True), MARKERS, strict=True):
            moving = False
            for xi in sorted(float(x) for x in result.xi.values):
                x, curves = _curves(result, "kernel_drift", chain=chain, xi=xi, stage="trained", view=view)
                moving |= bool((curves > 0).any())
                _draw(
                    axes,
                    x,
                    np.where(curves > 0, curves, np.nan),
                    color=_colour(result, xi),
                    marker=MARKERS[view],
                    linewidth=2.2,
                    label=f"ξ = {xi:g}",
                )
            if moving:  # where nothing moves there is nothing to draw, and a logarithm of none
                axes.set_yscale("log")
            axes.set_title(f"{view} rows")
            axes.set_xlabel("transition from layer l to l + 1")
            axes.set_xticks(np.arange(result.sizes["transition"]))
            axes.set_xlim(-0.35, result.sizes["transition"] - 0.65)
            axes.legend(loc="best", fontsize=9)
        figure.axes[0].set_ylabel("kernel drift, 1 − CKA")
        figure.suptitle(f"{chain} chain: where the representation still moves")
    return figure


def plot_survival(result: xr.Dataset, chain: str) -> Figure:
    """What each layer still holds of the chain's slowest (solid) and fastest eigenspace (dashed), colour ξ.

    Left: the own token, on visible rows. Right: the Bayes posterior, on masked rows. Grey: the stack trained
    on i.i.d. tokens, on the sequences of the smallest ξ. Lines are means over seeds, points the seeds.
    """
    titles = {"visible": "own token (visible rows)", "masked": "Bayes posterior (masked rows)"}
    whole = result.survival.sel(chain=chain)
    xis = sorted(float(x) for x in result.xi.values)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2))
        for axes, process in zip(figure.subplots(1, 2, sharey=True), titles, strict=True):
            for xi, stage in [*((xi, "trained") for xi in xis), (xis[0], "control_iid")]:
                part = whole.sel(xi=xi, stage=stage, process=process)
                # Eigenspaces of other chains in the result stand as empty modes.
                modes = whole.sel(xi=xi).dropna("mode", how="all")["mode"].values
                colour = _colour(result, xi) if stage == "trained" else CONTROL
                for mode, name, dash in ((modes[0], "slowest", "-"), (modes[-1], "fastest", "--")):
                    values = part.sel(mode=mode).transpose("seed", "layer").values
                    what = f"ξ = {xi:g}" if stage == "trained" else f"i.i.d. control (ξ = {xi:g})"
                    _draw(
                        axes,
                        np.arange(values.shape[1]),
                        values,
                        color=colour,
                        marker=MARKERS[process],
                        linewidth=2.2 if stage == "trained" else 1.4,
                        linestyle=dash,
                        label=f"{what}, {name} mode",
                    )
            axes.axhline(0.0, color="black", linewidth=0.6)
            axes.set_title(titles[process])
            axes.set_xlabel("layer (0 = input of the stack)")
            axes.set_xlim(-0.3, result.sizes["layer"] - 0.7)
        figure.axes[0].set_ylabel("held-out linear R²")
        figure.axes[0].set_ylim(-0.08, 1.05)
        figure.axes[0].legend(loc="lower left", fontsize=8)
        figure.suptitle(f"{chain} chain: which modes each layer still holds")
    return figure
