"""Figures of the studies, from their tables. Colour is ξ wherever there is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rgfast.flow.relevance import CAPTURED, RelevanceTest
from rgfast.report.figures import COLOURS, CONTROL, STYLE

__all__ = ["plot_decimation", "plot_multiverse", "plot_observer", "plot_relevance", "plot_xi"]

LIGHT = "#BBBBBB"
OBSERVED = {"control_iid": "i.i.d. control"}
ISOTROPIC = (0, (1, 2))
DASHES = ("-", "--", ":")
SHAPES = ("o", "s", "^", "D", "v", "P")


def plot_relevance(table: pd.DataFrame, test: RelevanceTest) -> Figure:
    """Final rank against that of the log-posterior, and each predictor's error on cells left out.

    Left: a point a trained run, marker the width, the line is y = x, dotted what isotropic data of the same
    size would give. Right: root mean square error of ln
    rank by predictor, bars from its bootstrap difference to y = x.
    """
    trained = table[table.captured >= CAPTURED]
    xis = sorted(table.xi.unique())
    widths = sorted(table.width.unique())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6))
        left, right = figure.subplots(1, 2)
        for k, xi in enumerate(xis):
            for shape, width in zip(SHAPES, widths, strict=False):
                part = trained[(trained.xi == xi) & (trained.width == width)]
                left.plot(
                    part.log_posterior_rank,
                    part.masked_last,
                    shape,
                    color=COLOURS[k % len(COLOURS)],
                    markersize=6,
                    alpha=0.7,
                    label=f"ξ = {xi:g}, width {width}",
                )
        both = trained[["log_posterior_rank", "masked_last"]].to_numpy(float)
        if both.size:
            ends = [0.9 * both.min(), 1.1 * both.max()]
            left.plot(ends, ends, color="black", linewidth=1, label="y = x")
        for width in widths:
            baseline = float(table[table.width == width].masked_isotropic.mean())
            left.axhline(baseline, color="black", linewidth=1, linestyle=ISOTROPIC)
            left.annotate(
                f"isotropic, width {width}, same n",
                (1, baseline),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8,
            )
        left.set_xlabel("effective rank of the centred log-posterior")
        left.set_ylabel("effective rank of the last layer, masked rows")
        left.legend(fontsize=8)
        names = list(dict.fromkeys(p.name for p in test.predictors))
        for shape, width in zip(SHAPES, widths, strict=False):
            found = {p.name: p for p in test.predictors if p.width == width}
            at = [names.index(name) for name in found]
            claim = found["y = x"].error if found else 0.0
            spread = [
                [max(0.0, p.error - claim - p.excess_low) for p in found.values()],
                [max(0.0, p.excess_high - (p.error - claim)) for p in found.values()],
            ]
            right.errorbar(
                [p.error for p in found.values()],
                [k + 0.12 * (width == widths[-1]) for k in at],
                xerr=spread,
                fmt=shape,
                color=CONTROL if width == widths[0] else "black",
                label=f"width {width}",
            )
        right.set_yticks(range(len(names)), names)
        right.invert_yaxis()
        right.set_xlim(left=0)
        right.set_xlabel("error in ln rank on the cell left out")
        right.legend(fontsize=8)
        figure.suptitle(f"Does the final rank follow the Bayes posterior? {test.status}")
    return figure


def plot_xi(table: pd.DataFrame) -> Figure:
    """R against ξ by chain, visible and masked rows, a row of panels a width.

    Points are runs (open: undertrained), lines means over the trained.
    """
    chains, widths = list(dict.fromkeys(table.chain)), sorted(table.width.unique())
    xis = sorted(table.xi.unique())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 0.6 + 3.8 * len(widths)))
        grid = figure.subplots(len(widths), 2, sharey="row", squeeze=False)
        for panels, width in zip(grid, widths, strict=True):
            for axes, view in zip(panels, ("visible", "masked"), strict=True):
                _draw_xi(axes, table[table.width == width], chains, f"{view}_R")
                axes.set_xscale("log")
                axes.set_xticks(xis, [f"{xi:g}" for xi in xis])
                axes.set_xticks([], minor=True)
                axes.set_title(f"{view} rows" + (f", width {width}" if len(widths) > 1 else ""))
                axes.set_xlabel("correlation length ξ (steps)")
            panels[0].set_ylabel("R: last over first layer")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=9)
    return figure


def _draw_xi(axes: Axes, table: pd.DataFrame, chains: Sequence[str], name: str) -> None:
    for k, chain in enumerate(chains):
        part, colour = table[table.chain == chain], COLOURS[k % len(COLOURS)]
        dash = DASHES[k // len(COLOURS) % len(DASHES)]
        good = part.captured >= CAPTURED
        axes.plot(part.xi[good], part[name][good], "o", color=colour, markersize=4, alpha=0.6)
        axes.plot(part.xi[~good], part[name][~good], "o", color=colour, markersize=4, fillstyle="none")
        mean = part[good].groupby("xi")[name].mean()
        axes.plot(mean.index, np.asarray(mean), dash, color=colour, linewidth=1.8, label=chain)
    axes.axhline(1.0, color="black", linewidth=0.6)


def plot_multiverse(
    table: pd.DataFrame, options: Sequence[tuple[str, tuple[Any, ...]]], effects: dict[str, tuple[str, float]]
) -> Figure:
    """A specification curve for every effect: trained set-ups sorted by it, intervals, the default a star.

    Beneath each curve a dot says which value of an option the set-up has: filled is not the default value.
    The dotted line is the bar that the effect is held against.
    """
    trained = table[table.trained]
    rows = math.ceil(len(effects) / 3)
    with mpl.rc_context({**STYLE, "figure.constrained_layout.use": False}):
        figure = Figure(figsize=(15, 4.6 * rows))
        grid = figure.add_gridspec(
            rows, 3, hspace=0.25, wspace=0.32, left=0.08, right=0.98, top=0.95, bottom=0.06
        )
        for cell, (name, (words, bar)) in enumerate(effects.items()):
            inner = grid[cell // 3, cell % 3].subgridspec(2, 1, height_ratios=(2.2, 1), hspace=0.06)
            curve, dots = figure.add_subplot(inner[0]), figure.add_subplot(inner[1])
            ordered = trained.sort_values(name, ignore_index=True)
            at, value = np.arange(len(ordered)), ordered[name].to_numpy(float)
            below = (value - ordered[f"{name}_low"].to_numpy(float)).clip(min=0)
            above = (ordered[f"{name}_high"].to_numpy(float) - value).clip(min=0)
            spread = np.nan_to_num(np.stack([below, above]))
            curve.errorbar(at, value, yerr=spread, fmt="o", color=COLOURS[1], ecolor="#B0C4D8", markersize=3)
            default = ordered["default"].to_numpy(bool)
            curve.plot(
                at[default], value[default], "*", color=COLOURS[0], markersize=15, label="default set-up"
            )
            curve.axhline(0.0, color="black", linewidth=0.8)
            if bar:
                curve.axhline(bar, color="black", linewidth=0.8, linestyle=":")
            curve.set_title(words, fontsize=10)
            curve.set_xticks([])
            if default.any():
                curve.legend(loc="upper left", fontsize=8)
            for k, (option, (first, *_)) in enumerate(options):
                other = (ordered[option] != first).to_numpy(bool)
                dots.plot(at[other], np.full(other.sum(), k), "o", color="black", markersize=2.5)
                dots.plot(at[~other], np.full((~other).sum(), k), "o", color="#DDDDDD", markersize=2.5)
            labels = [f"{option} {'/'.join(f'{v}' for v in others)}" for option, (_, *others) in options]
            dots.set_yticks(range(len(options)), labels, fontsize=7)
            dots.set_ylim(len(options) - 0.5, -0.5)
            dots.set_xticks([])
            dots.grid(False)
            dots.set_xlabel(f"{len(ordered)} of {len(table)} set-ups (trained), sorted", fontsize=8)
    return figure


def plot_decimation(table: pd.DataFrame, xi: float) -> Figure:
    """What one network does when only every k-th token is shown, against k.

    Solid: the grid (the task is the chain at ξ/k). Dashed: as many tokens side by side (the task stays at ξ).
    Grey: the stack trained on i.i.d. tokens, on the grid. Points are seeds, lines means.
    """
    panels = (
        ("R: last over first layer", (("R_visible", "visible", 0), ("R_masked", "masked", 1))),
        (
            "R² of the own token, last layer",
            (("slow_visible", "slow mode", 0), ("fast_visible", "fast mode", 1)),
        ),
        ("total kernel drift", (("total_drift_visible", "visible", 0), ("total_drift_masked", "masked", 1))),
        (
            "effective rank, masked rows",
            (("final_rank_masked", "last layer", 0), ("log_posterior_rank", "log-posterior", 2)),
        ),
    )
    arms = (("trained", "grid", "-"), ("trained", "block", "--"), ("control_iid", "grid", ":"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 7.6))
        for axes, (title, drawn) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            for stage, arm, dash in arms:
                part = table[(table.stage == stage) & (table.arm == arm)]
                for name, words, colour in drawn:
                    if stage != "trained" and name == "log_posterior_rank":
                        continue
                    paint = COLOURS[colour] if stage == "trained" else (CONTROL, LIGHT)[colour]
                    what = arm if stage == "trained" else "i.i.d. control"
                    mean = part.groupby("spacing")[name].mean()
                    axes.plot(
                        mean.index,
                        np.asarray(mean),
                        dash,
                        color=paint,
                        linewidth=1.8,
                        label=f"{words}, {what}",
                    )
                    axes.plot(part.spacing, part[name], ".", color=paint, markersize=4, alpha=0.6)
            if title == "effective rank, masked rows":
                baseline = table.groupby("spacing").masked_isotropic.mean()
                axes.plot(
                    baseline.index,
                    np.asarray(baseline),
                    color="black",
                    linewidth=1,
                    linestyle=ISOTROPIC,
                    label="isotropic, same n",
                )
                axes.set_ylim(bottom=0)
            axes.set_ylabel(title)
            axes.set_xlabel(f"k: every k-th token shown (ξ = {xi:g}/k on the grid)")
            axes.legend(fontsize=7)
        figure.suptitle(f"One network trained at ξ = {xi:g}, probed at every ξ/k")
    return figure


def plot_observer(curves: pd.DataFrame, ridges: pd.DataFrame) -> Figure:
    """CKA between layer l and the observer who sees radius w, by stage and ξ; the ridge on top.

    Colour: CKA over that layer's largest, which stands above its column (means over seeds). White circles:
    the mean over seeds of the smallest radius that reaches 99% of a layer's largest CKA. A stage whose masked
    rows hold nothing anywhere has no panel.
    """
    whole = list(dict.fromkeys(zip(curves.stage, curves.xi, strict=True)))
    defined = curves.dropna(subset="cka")
    cells = [cell for cell in whole if cell in set(zip(defined.stage, defined.xi, strict=True))] or whole
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(3.6 * len(cells) + 1, 4.4))
        panels = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
        for axes, (stage, xi) in zip(panels, cells, strict=True):
            part = curves[(curves.stage == stage) & (curves.xi == xi)]
            grid = part.pivot_table(index="radius", columns="layer", values="cka", dropna=False)
            largest = grid.max()
            image = axes.imshow(
                grid.to_numpy(float) / np.where(largest > 0, largest, np.nan),
                origin="lower",
                aspect="auto",
                vmin=0.5,
                vmax=1,
                cmap="viridis",
            )
            for column, value in enumerate(largest):
                if math.isfinite(value):
                    axes.text(
                        column,
                        1.01,
                        f"{value:.2f}",
                        transform=axes.get_xaxis_transform(),
                        ha="center",
                        fontsize=8,
                    )
            axes.set_xticks(range(grid.shape[1]), [str(v) for v in grid.columns])
            axes.set_yticks(range(grid.shape[0]), [str(v) for v in grid.index])
            ridge = ridges[(ridges.stage == stage) & (ridges.xi == xi)].groupby("layer").radius.mean()
            # Radii are not evenly spaced on the axis: place the mean between its neighbours.
            height = np.interp(ridge.to_numpy(float), grid.index.to_numpy(float), np.arange(grid.shape[0]))
            at = [list(grid.columns).index(layer) for layer in ridge.index]
            good = np.isfinite(ridge.to_numpy(float))
            axes.plot(
                np.array(at)[good],
                height[good],
                "o-",
                color="white",
                markeredgecolor="black",
                markersize=6,
                linewidth=1.6,
            )
            axes.set_xlabel("layer")
            axes.set_title(f"{OBSERVED.get(stage, stage)}, ξ = {xi:g}", fontsize=10, pad=14)
        figure.axes[0].set_ylabel("radius w of the observer")
        figure.suptitle(
            "Layers against ideal observers (masked rows; above the columns: the layer's largest CKA)"
        )
        figure.colorbar(image, ax=figure.axes, label="debiased CKA over the layer's largest", shrink=0.85)
    return figure
