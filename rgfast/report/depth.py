"""Figures by depth, of a reproduction and of a probe. Colour is ξ or the view, marker the view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rgfast.flow import descent
from rgfast.probing import ProbeResult, plots
from rgfast.report.canvas import Canvas, canvas, draw_fits, draw_heat, draw_seeds, figure_of, styled
from rgfast.report.extract import (
    SMALLEST,
    by_seed,
    chain_of,
    drift_fits,
    mean_of,
    rank_by_position,
    sorted_xi,
)
from rgfast.report.palette import BASELINE, CONTROL, CONTROLS, VIEW_MARKERS, depth_colours, xi_colours
from rgfast.report.sources import Experiment, load

__all__ = [
    "plot_cka",
    "plot_drift",
    "plot_heat_map",
    "plot_order_parameter",
    "plot_spectra",
    "plot_survival",
    "plot_training",
]

TITLES = {"visible": "visible rows: what the stack forgets", "masked": "masked rows: what it infers"}
LAYER = "layer (0 = input of the stack)"
Views = Sequence[str] | None


def _experiment(source: Any, needs: str, what: str) -> Experiment:
    """``source`` as a reproduction that holds the variable ``needs``."""
    if not isinstance(source, Experiment):
        raise TypeError(f"source must be a reproduction for {what}, got {_kind(source)}")
    if needs not in source.dataset:
        raise ValueError(f"source must hold {needs!r} for {what}; an older version wrote it, run it again")
    return source


def _kind(source: Any) -> str:
    return "a probe's result" if isinstance(source, ProbeResult) else "a study"


def _chosen(known: Sequence[str], views: Views) -> list[str]:
    chosen = list(known) if views is None else list(views)
    for view in chosen:
        if view not in known:
            raise ValueError(f"views must be among {', '.join(known)}, got {view!r}")
    return chosen


def _told(result: xr.Dataset, view: str) -> str:
    """How many rows and seeds stand behind a value, for an axis."""
    rows = f"n = {int(result.n.sel(view=view))} rows a position, " if "n" in result else ""
    return f"{rows}{result.sizes['seed']} seed{'s' if result.sizes['seed'] > 1 else ''}"


@styled
def plot_order_parameter(
    source: Any, *, chain: str | None = None, views: Views = None, ax: Canvas = None
) -> Figure:
    """The figure of the order parameter by depth: effective rank by layer, controls and baseline beside it.

    Of a reproduction: a panel a view, one colour a ξ; lines are means over seeds, points the seeds; grey the
    stacks trained on i.i.d. tokens and on permuted targets, probed on the sequences of the smallest ξ; black
    dots what isotropic data with as many rows and features would give. Of a probe: one panel, a line a view
    with its error bars, its baseline dotted.

    Args:
        source: what :func:`rgfast.report.write_report` takes, but a study.
        chain: of those in a reproduction; by default the first.
        views: ``"visible"`` and ``"masked"`` by default; of a probe all but ``"flattened"``.
        ax: axes to draw on, one a panel, instead of a new figure.

    Raises TypeError for a source of another kind, ValueError for an unknown chain or view, a missing
    variable, and another number of axes than panels.
    """
    found = load(source)
    if isinstance(found, ProbeResult):
        axes = canvas(ax, 1, columns=1, size=(6.5, 4.2))
        plots.plot_rank(found, "effective_rank", views, False, axes[0])
        return figure_of(axes)
    result = _experiment(found, "effective_rank", "the order parameter").dataset
    chain, chosen, xis = chain_of(result, chain), _chosen(list(TITLES), views), sorted_xi(result)
    axes = canvas(ax, len(chosen), columns=2, size=(5, 4.2), sharey=True)
    colours = xi_colours(xis)
    for panel, view in zip(axes, chosen, strict=True):
        for xi in xis:
            run: dict[str, Any] = {"chain": chain, "xi": xi, "stage": "trained", "view": view}
            x, curves = by_seed(result, "effective_rank", **run)
            ratios = [descent(values).ratio for values in curves if values.size > 1]
            ratio = f"   (R = {mean_of(np.array(ratios)[:, None])[0]:.2f})" if ratios else ""
            style = {"color": colours[xi], "marker": VIEW_MARKERS[view], "linewidth": 2.2}
            draw_seeds(panel, x, curves, label=f"ξ = {xi:g}{ratio}", **style)
        for stage, (dash, words) in CONTROLS.items():
            if stage in result.stage.values:
                run = {"chain": chain, "xi": xis[0], "stage": stage, "view": view}
                x, curves = by_seed(result, "effective_rank", **run)
                style = {"color": CONTROL, "marker": ".", "linewidth": 1.4, "linestyle": dash}
                draw_seeds(panel, x, curves, label=words, **style)
        if "effective_rank_baseline" in result:
            level = float(result.effective_rank_baseline.sel(view=view))
            panel.axhline(level, color="black", linewidth=1, linestyle=BASELINE, label="isotropic, same n")
        panel.set(title=TITLES[view], xlabel=f"{LAYER}\n{_told(result, view)}", ylim=(0, None))
        panel.set_xlim(-0.3, result.sizes["layer"] - 0.7)
        panel.legend(loc="lower left", fontsize=10)
    axes[0].set_ylabel("effective rank (dimensions)")
    return _named(axes, ax, f"{chain} chain: effective rank of the residual stream, mean over positions")


def _named(axes: Sequence[Axes], ax: Canvas, title: str) -> Figure:
    figure = figure_of(axes)
    if ax is None:
        figure.suptitle(title)
    return figure


@styled
def plot_heat_map(
    source: Any,
    *,
    measure: str = "effective_rank",
    chain: str | None = None,
    views: Views = None,
    ax: Canvas = None,
) -> Figure:
    """The figure of a measure by layer and position, a panel a view (and ξ, of a reproduction).

    Of a reproduction it is the effective rank of the trained stacks, the mean over seeds, all panels on one
    scale; of a probe any rank or drift, and each panel on its own. Undefined cells are blank. For ``source``,
    ``chain``, ``views`` and ``ax``, and what is raised, see :func:`plot_order_parameter`.
    """
    found = load(source)
    if isinstance(found, ProbeResult):
        known = [view for view in found.views if bool(found.dataset.positional.sel(view=view))]
        if not known:
            raise ValueError("source must have a view with positions for a heat map, and holds none")
        chosen = _chosen(known, views)
        axes = canvas(ax, len(chosen), columns=3, size=(4.6, 3.6))
        for panel, view in zip(axes, chosen, strict=True):
            plots.plot_heat_map(found, measure, view, panel)
        return figure_of(axes)
    result = _experiment(found, "effective_rank_by_position", "a heat map").dataset
    if measure != "effective_rank":
        raise ValueError(f"measure must be 'effective_rank' for a reproduction, got {measure!r}")
    chain, chosen, xis = chain_of(result, chain), _chosen(list(TITLES), views), sorted_xi(result)
    mean = rank_by_position(result, chain).sel(positional_view=chosen)
    limits = (float(mean.min()), float(mean.max()))
    axes = canvas(ax, len(chosen) * len(xis), columns=len(xis), size=(5, 3.1), sharex=True, sharey=True)
    cells = [(view, xi) for view in chosen for xi in xis]
    for panel, (view, xi) in zip(axes, cells, strict=True):
        values = mean.sel(xi=xi, positional_view=view).transpose("layer", "position").values
        labels = {"x": result.position.values, "y": result.layer.values}
        picture = draw_heat(panel, values, limits=limits, **labels)
        panel.set_title(f"{view} rows, ξ = {xi:g}  ({_told(result, view)})", fontsize=10)
    for panel in axes[-len(xis) :]:
        panel.set_xlabel("position")
    for panel in axes[:: len(xis)]:
        panel.set_ylabel("layer (0 = input)")
    figure_of(axes).colorbar(picture, ax=axes, label="effective rank (dimensions)")
    return _named(axes, ax, f"{chain} chain: effective rank by layer and position")


@styled
def plot_drift(source: Any, *, chain: str | None = None, views: Views = None, ax: Canvas = None) -> Figure:
    """The figure of the kernel drift 1 − CKA(l, l+1) by transition, logarithmic, with both fits.

    Of a reproduction: a panel a view, points are seeds, lines means; thin dashes a geometric decay and dots a
    step with its plateau, fitted to the mean (better: the lower BIC). Of a probe: one panel, a line a view,
    with the fits where it is drawn alone. For ``source``, ``chain``, ``views`` and ``ax``, and what is
    raised, see :func:`plot_order_parameter`.
    """
    found = load(source)
    if isinstance(found, ProbeResult):
        axes = canvas(ax, 1, columns=1, size=(6.5, 4.2))
        plots.plot_drift(found, "kernel_drift", views, axes[0])
        return figure_of(axes)
    result = _experiment(found, "kernel_drift", "the drift").dataset
    chain, chosen, xis = chain_of(result, chain), _chosen(list(TITLES), views), sorted_xi(result)
    axes = canvas(ax, len(chosen), columns=2, size=(5, 4.4), sharey=True)
    colours = xi_colours(xis)
    for panel, view in zip(axes, chosen, strict=True):
        moving = False
        for xi in xis:
            x, curves = by_seed(result, "kernel_drift", chain=chain, xi=xi, stage="trained", view=view)
            fits = drift_fits(mean_of(curves))
            positive = np.where(curves > 0, curves, np.nan)
            moving |= bool((curves > 0).any())
            style = {"color": colours[xi], "marker": VIEW_MARKERS[view], "linewidth": 2.2}
            draw_seeds(panel, x, positive, label=f"ξ = {xi:g}", **style)
            if fits is not None:
                draw_fits(panel, x, fits, colours[xi])
        if moving:  # where nothing moves there is nothing to draw, and a logarithm of none
            panel.set_yscale("log")
        steps = result.transition.values
        panel.set_xticks(steps, [f"{k}→{k + 1}" for k in steps], rotation=0 if len(steps) < 10 else 90)
        panel.set_xlim(-0.35, result.sizes["transition"] - 0.65)
        panel.set(title=f"{view} rows", xlabel=f"transition between layers\n{_told(result, view)}")
        panel.legend(loc="lower left", fontsize=9)
    axes[0].set_ylabel("kernel drift, 1 − CKA")
    return _named(axes, ax, f"{chain} chain: where the representation still moves")


@styled
def plot_cka(source: Any, *, chain: str | None = None, views: Views = None, ax: Canvas = None) -> Figure:
    """The figure of the debiased linear CKA of every two layers, a panel a view (and ξ, of a reproduction).

    Means over positions, and over the seeds of a reproduction. For ``source``, ``chain``, ``views`` and
    ``ax``, and what is raised, see :func:`plot_order_parameter`.
    """
    found = load(source)
    if isinstance(found, ProbeResult):
        chosen = _chosen(found.views, views)
        axes = canvas(ax, len(chosen), columns=3, size=(4.6, 3.8))
        for panel, view in zip(axes, chosen, strict=True):
            plots.plot_cka(found, "cka", view, panel)
        return figure_of(axes)
    result = _experiment(found, "cka", "the CKA of layers").dataset

    def draw(panel: Axes, view: str, xi: float) -> Any:
        part = result.cka.sel(chain=chain, xi=xi, stage="trained", process=view)
        values = mean_of(part.transpose("seed", "layer", "other_layer").values)
        layers = result.layer.values
        return draw_heat(panel, values, x=layers, y=layers, limits=(0.0, 1.0))

    chain = chain_of(result, chain)
    axes, picture = _by_view_and_xi(result, views, ax, draw, ("layer", "layer"))
    figure_of(axes).colorbar(picture, ax=axes, label="CKA, debiased")
    return _named(axes, ax, f"{chain} chain: CKA between layers")


def _by_view_and_xi(
    result: xr.Dataset,
    views: Views,
    ax: Canvas,
    draw: Callable[[Axes, str, float], Any],
    labels: tuple[str, str],
) -> tuple[list[Axes], Any]:
    """A panel a view (row) and ξ (column), each by ``draw``; the axes and what was drawn last."""
    chosen, xis = _chosen(list(TITLES), views), sorted_xi(result)
    axes = canvas(ax, len(chosen) * len(xis), columns=len(xis), size=(4.6, 3.5), sharex=True, sharey=True)
    cells, last = [(view, xi) for view in chosen for xi in xis], None
    for panel, (view, xi) in zip(axes, cells, strict=True):
        last = draw(panel, view, xi)
        panel.set_title(f"{view} rows, ξ = {xi:g}  ({_told(result, view)})", fontsize=10)
    for panel in axes[-len(xis) :]:
        panel.set_xlabel(labels[0])
    for panel in axes[:: len(xis)]:
        panel.set_ylabel(labels[1])
    return axes, last


@styled
def plot_spectra(source: Any, *, chain: str | None = None, views: Views = None, ax: Canvas = None) -> Figure:
    """The figure of each layer's singular values over its largest, logarithmic, from dark (input) to light.

    A panel a view (and ξ, of a reproduction); means over positions, and over the seeds of a reproduction.
    Values below 1e-6 of the largest are rounding and left out. For ``source``, ``chain``, ``views`` and
    ``ax``, and what is raised, see :func:`plot_order_parameter`.
    """
    found = load(source)
    if isinstance(found, ProbeResult):
        chosen = _chosen([view for view in found.views if view != "flattened"], views)
        axes = canvas(ax, len(chosen), columns=3, size=(4.6, 3.6))
        for panel, view in zip(axes, chosen, strict=True):
            plots.plot_spectra(found, view, panel)
        return figure_of(axes)
    result = _experiment(found, "relative_spectrum", "the spectra").dataset
    colours, chain = depth_colours(result.sizes["layer"]), chain_of(result, chain)

    def draw(panel: Axes, view: str, xi: float) -> None:
        part = result.relative_spectrum.sel(chain=chain, xi=xi, stage="trained", positional_view=view)
        mean = mean_of(part.transpose("seed", "layer", "component").values)
        for layer, values in enumerate(mean):
            shown = np.where(values > SMALLEST, values, np.nan)
            if np.isfinite(shown).any():
                x = np.arange(1, len(shown) + 1)
                panel.plot(x, shown, color=colours[layer], linewidth=1.8, label=f"{layer}")
        if panel.lines:
            panel.set_yscale("log")

    axes, _ = _by_view_and_xi(result, views, ax, draw, ("component", "σ over the largest"))
    axes[0].legend(title="layer", fontsize=9, ncols=1 + result.sizes["layer"] // 6)
    return _named(axes, ax, f"{chain} chain: singular values by depth, mean over positions")


@styled
def plot_survival(source: Any, *, chain: str | None = None, views: Views = None, ax: Canvas = None) -> Figure:
    """The figure of what each layer still holds: held-out linear R² by layer.

    Of a reproduction: of the chain's slowest (solid) and fastest eigenspace (dashed), colour ξ; the own token
    on visible rows, the Bayes posterior on masked rows; grey the stack trained on i.i.d. tokens, on the
    sequences of the smallest ξ. Of a probe: of its targets. For ``source``, ``chain``, ``views`` and ``ax``,
    and what is raised, see :func:`plot_order_parameter`; also ValueError for a probe without targets.
    """
    found = load(source)
    if isinstance(found, ProbeResult):
        chosen = _chosen([view for view in found.views if view != "flattened"], views)
        axes = canvas(ax, len(chosen), columns=3, size=(4.6, 3.6), sharey=True)
        for panel, view in zip(axes, chosen, strict=True):
            plots.plot_targets(found, view, panel)
        return figure_of(axes)
    result = _experiment(found, "survival", "mode survival").dataset
    titles = {"visible": "own token (visible rows)", "masked": "Bayes posterior (masked rows)"}
    chain, chosen, xis = chain_of(result, chain), _chosen(list(titles), views), sorted_xi(result)
    whole, colours = result.survival.sel(chain=chain), xi_colours(xis)
    axes = canvas(ax, len(chosen), columns=2, size=(5, 4.2), sharey=True)
    runs: list[tuple[float, str]] = [(xi, "trained") for xi in xis]
    runs += [(xis[0], "control_iid")] if "control_iid" in result.stage.values else []
    for panel, process in zip(axes, chosen, strict=True):
        for xi, stage in runs:
            part = whole.sel(xi=xi, stage=stage, process=process)
            # Eigenspaces of other chains in the result stand as empty modes.
            modes = whole.sel(xi=xi).dropna("mode", how="all")["mode"].values
            trained = stage == "trained"
            what = f"ξ = {xi:g}" if trained else f"i.i.d. control (ξ = {xi:g})"
            for mode, name, dash in ((modes[0], "slowest", "-"), (modes[-1], "fastest", "--")):
                values = part.sel(mode=mode).transpose("seed", "layer").values
                style: dict[str, Any] = {
                    "color": colours[xi] if trained else CONTROL,
                    "marker": VIEW_MARKERS[process],
                }
                style |= {"linewidth": 2.2 if trained else 1.4, "linestyle": dash}
                x = np.arange(values.shape[1], dtype=float)
                draw_seeds(panel, x, values, label=f"{what}, {name} mode", **style)
        panel.axhline(0.0, color="black", linewidth=0.6)
        panel.set(title=titles[process], xlabel=f"{LAYER}\n{_told(result, process)}", ylim=(-0.08, 1.05))
        panel.set_xlim(-0.3, result.sizes["layer"] - 0.7)
    axes[0].set_ylabel("held-out linear R²")
    if ax is None:
        figure_of(axes).legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    else:
        axes[0].legend(fontsize=9)
    return _named(axes, ax, f"{chain} chain: which modes each layer still holds")


@styled
def plot_training(source: Any, *, chain: str | None = None, ax: Canvas = None) -> Figure:
    """The figure of a reproduction's training: loss by step over that of Bayes, and the captured fraction.

    Left: expected cross-entropy on held-out sequences (nats a hidden token), colour ξ, points are seeds;
    dashed the exact Bayes posterior's, the best possible, dotted that of knowing no context. Right: captured,
    with the bar below which a run is undertrained. A result of an older version has the loss of the training
    batches instead, and no Bayes line.

    Args:
        source: what :func:`rgfast.reproduce` returned, its folder, its ``result.nc`` or its dataset.
        chain: of those in the result; by default the first.
        ax: two axes to draw on, instead of a new figure.

    Raises TypeError for a source of another kind, ValueError for an unknown chain and another number of axes.
    """
    result = _experiment(load(source), "training_loss", "training curves").dataset
    chain, xis = chain_of(result, chain), sorted_xi(result)
    colours, x = xi_colours(xis), result.step.values.astype(float)
    held_out = "training_evaluation_loss" in result
    names = ("training_evaluation_loss" if held_out else "training_loss", "training_captured")
    axes = canvas(ax, 2, columns=2, size=(5, 4))
    for panel, name in zip(axes, names, strict=True):
        for xi in xis:
            part = result.sel(chain=chain, xi=xi, stage="trained")
            curves = part[name].transpose("seed", "step").values
            style = {"color": colours[xi], "marker": "o", "linewidth": 2}
            draw_seeds(panel, x, curves, label=f"ξ = {xi:g}", **style)
            if name != "training_captured" and "bayes_loss" in part:
                level = float(part.bayes_loss.mean(skipna=True))
                panel.axhline(
                    level, color=colours[xi], linewidth=1.3, linestyle="--", label=f"Bayes, ξ = {xi:g}"
                )
        panel.set_xlabel(
            f"training steps\n{result.sizes['seed']} seed{'s' if result.sizes['seed'] > 1 else ''}"
        )
    if "stationary_loss" in result:
        known = float(result.stationary_loss.sel(chain=chain, stage="trained").mean(skipna=True))
        axes[0].axhline(known, color="black", linewidth=1, linestyle=BASELINE, label="knowing no context (π)")
    axes[1].axhline(0.9, color="black", linewidth=1, linestyle=BASELINE, label="trained: 0.90")
    axes[0].set(title="held-out loss" if held_out else "loss of the training batch")
    axes[0].set_ylabel("loss (nats a hidden token)")
    axes[1].set(title="captured of what Bayes predicts", ylabel="captured fraction")
    for panel in axes:
        panel.legend(fontsize=9)
    return _named(axes, ax, f"{chain} chain: training")
