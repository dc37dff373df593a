"""Figures of the studies, from their tables. Colour is ξ wherever there is one."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rgfast.flow.relevance import RelevanceTest
from rgfast.report.figures import COLOURS, CONTROL, STYLE

__all__ = ["plot_relevance", "plot_xi"]

CAPTURED = 0.90
SHAPES = ("o", "s", "^", "D", "v", "P")


def plot_relevance(table: pd.DataFrame, test: RelevanceTest) -> Figure:
    """Final rank against that of the log-posterior, and each predictor's error on cells left out.

    Left: a point a trained run, marker the width, the line is y = x. Right: root mean square error of ln
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
    """R against ξ by chain, visible and masked rows: points are runs (open: undertrained), lines means."""
    chains = list(dict.fromkeys(table.chain))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.4))
        for axes, view in zip(figure.subplots(1, 2, sharey=True), ("visible", "masked"), strict=True):
            for k, chain in enumerate(chains):
                part, colour = table[table.chain == chain], COLOURS[k % len(COLOURS)]
                good = part.captured >= CAPTURED
                axes.plot(part.xi[good], part[f"{view}_R"][good], "o", color=colour, markersize=4, alpha=0.6)
                axes.plot(
                    part.xi[~good],
                    part[f"{view}_R"][~good],
                    "o",
                    color=colour,
                    markersize=4,
                    fillstyle="none",
                )
                mean = part[good].groupby("xi")[f"{view}_R"].mean()
                axes.plot(mean.index, np.asarray(mean), color=colour, linewidth=1.8, label=chain)
            axes.axhline(1.0, color="black", linewidth=0.6)
            axes.set_xscale("log")
            axes.set_xlabel("correlation length ξ (steps)")
            axes.set_title(f"{view} rows")
        figure.axes[0].set_ylabel("R: effective rank, last over first layer")
        figure.axes[0].legend(fontsize=8)
    return figure
