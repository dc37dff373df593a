"""Figures of the studies. Color is ξ, the chain or the view: see :mod:`rgfast.report.palette`."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rgfast.flow.relevance import CAPTURED, RelevanceTest, relevance_test
from rgfast.report.canvas import Canvas, canvas, draw_chart, draw_panel, figure_of, styled
from rgfast.report.extract import ratio_table
from rgfast.report.palette import BASELINE, CONTROL, SHAPES, xi_colours
from rgfast.report.setups_chart import setups_chart
from rgfast.report.sources import Experiment, Study, load
from rgfast.report.study_charts import (
    POSTERIOR,
    multiverse_chart,
    observer_chart,
    ratio_chart,
    spacing_chart,
)

__all__ = [
    "plot_decimation",
    "plot_multiverse",
    "plot_observer",
    "plot_posterior_rank",
    "plot_relevance",
    "plot_setups",
    "plot_xi",
]


def _study(source: Any, kind: str) -> Study:
    """``source`` as a study of this ``kind``."""
    found = load(source)
    if not isinstance(found, Study) or found.kind != kind:
        told = f"a {found.kind}" if isinstance(found, Study) else "another result"
        raise TypeError(f"source must be a {kind}, what it returned or its folder, got {told}")
    return found


def _runs(source: Any) -> pd.DataFrame:
    """A row per run, of a sweep or of a reproduction."""
    found = load(source)
    if isinstance(found, Experiment):
        return ratio_table(found.dataset, int(found.config.get("width", 0)))
    return _study(found, "sweep").tables["table"]


def plot_xi(source: Any, *, ax: Canvas = None) -> Figure:
    """The figure of R against ξ by chain: visible and masked rows, a row of panels per width.

    Points are runs (open: undertrained), lines means over the trained.

    Args:
        source: what :func:`rgfast.sweep` or :func:`rgfast.reproduce` returned, or its folder.
        ax: axes to draw on, two per width, instead of a new figure.

    Raises TypeError for a source of another kind, ValueError for another number of axes.
    """
    return draw_chart(ratio_chart(_runs(source), "xi"), ax)


def plot_posterior_rank(source: Any, *, ax: Canvas = None) -> Figure:
    """The figure of R, and of the rank it ends at, against the rank of the exact Bayes posterior.

    By chain, a row of three panels per width: R of visible rows, R of masked rows, the effective rank of the
    last layer (masked rows; the line is y = x, dotted what isotropic data with as many rows would give).
    Points are runs, open if undertrained. For ``source`` and ``ax`` (three axes per width), and what is
    raised, see :func:`plot_xi`.
    """
    return draw_chart(ratio_chart(_runs(source), "log_posterior_rank"), ax)


@styled
def plot_relevance(source: Any, *, ax: Canvas = None) -> Figure:
    """The figure of the relevance test: final rank against the log-posterior's, and what predicts it.

    Left: a point per trained run, color ξ, marker the width; the line is y = x, dotted what isotropic data
    with as many rows would give. Right: root mean square error of ln rank by predictor, on cells left out,
    bars from its bootstrap difference to y = x.

    Args:
        source: what ``rgfast.sweep("relevance")`` returned, or its folder.
        ax: two axes to draw on, instead of a new figure.

    Raises TypeError for a source of another kind, ValueError for another number of axes and a table that
    lacks a column of the test.
    """
    table = _study(source, "sweep").tables["table"]
    test = getattr(source, "test", None) or relevance_test(table)
    left, right = canvas(ax, 2, columns=2, size=(5.6, 4.4))
    trained = table[table.captured >= CAPTURED]
    widths, colours = sorted(table.width.unique()), xi_colours(table.xi.unique())
    for xi, colour in colours.items():
        for shape, width in zip(SHAPES, widths, strict=False):
            part = trained[(trained.xi == xi) & (trained.width == width)]
            style: dict[str, Any] = {"color": colour, "markersize": 6, "alpha": 0.7}
            label = f"ξ = {xi:g}, width {width}"
            left.plot(part.log_posterior_rank, part.masked_last, shape, label=label, **style)
    both = trained[["log_posterior_rank", "masked_last"]].to_numpy(float)
    if both.size:
        ends = [0.9 * both.min(), 1.1 * both.max()]
        left.plot(ends, ends, color="black", linewidth=1, label="y = x")
    for width in widths if "masked_isotropic" in table else ():
        level = float(table[table.width == width].masked_isotropic.mean())
        left.axhline(level, color="black", linewidth=1, linestyle=BASELINE)
        where: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"),
            "ha": "right",
            "va": "bottom",
            "fontsize": 9,
        }
        left.annotate(f"isotropic, width {width}, same n", (1, level), **where)
    left.set(xlabel=POSTERIOR, ylabel="effective rank of the last layer, masked")
    left.legend(fontsize=9)
    _draw_predictors(right, test, widths)
    if ax is None:
        figure_of([left]).suptitle(f"Does the final rank follow the Bayes posterior? {test.status}")
    return figure_of([left])


def _draw_predictors(axes: Axes, test: RelevanceTest, widths: list[Any]) -> None:
    names = list(dict.fromkeys(p.name for p in test.predictors))
    for shape, width in zip(SHAPES, widths, strict=False):
        found = {p.name: p for p in test.predictors if p.width == width}
        claim = found["y = x"].error if found else 0.0
        spread = [
            [max(0.0, p.error - claim - p.excess_low) for p in found.values()],
            [max(0.0, p.excess_high - (p.error - claim)) for p in found.values()],
        ]
        axes.errorbar(
            [p.error for p in found.values()],
            [names.index(name) + 0.12 * (width == widths[-1]) for name in found],
            xerr=spread,
            fmt=shape,
            color=CONTROL if width == widths[0] else "black",
            label=f"width {width}",
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("error in ln rank on the cell left out")
    axes.legend(fontsize=9)


@styled
def plot_multiverse(source: Any, *, ax: Canvas = None) -> Figure:
    """The specification curves of a multiverse: trained set-ups sorted by each effect, with intervals.

    Beneath each curve a dot says which value of an option the set-up has: filled is not the default value.
    The dotted line is the effect's bar, the star the default set-up.

    Args:
        source: what :func:`rgfast.multiverse` returned, or its folder.
        ax: two axes per effect (curve, options) to draw on, instead of a new figure.

    Raises TypeError for a source of another kind, ValueError for another number of axes.
    """
    study = _study(source, "multiverse")
    table, options = study.tables["table"], study.design["options"]
    effects = [name for name, part in study.summary.items() if isinstance(part, dict)]
    axes = _pairs(len(effects)) if ax is None else canvas(ax, 2 * len(effects), columns=2, size=(1, 1))
    for k, (name, panel) in enumerate(zip(effects, multiverse_chart(study).panels, strict=True)):
        curve, dots = axes[2 * k : 2 * k + 2]
        draw_panel(panel, curve, legend_at="upper left")
        curve.set(xticks=[], xlabel="")
        ordered = table[table.trained].sort_values(name, ignore_index=True)
        at = np.arange(len(ordered))
        for row, (option, (first, *_)) in enumerate(options):
            other = (ordered[option] != first).to_numpy(bool)
            dots.plot(at[other], np.full(other.sum(), row), "o", color="black", markersize=3)
            dots.plot(at[~other], np.full((~other).sum(), row), "o", color="#DDDDDD", markersize=3)
        labels = [f"{option} {'/'.join(f'{v}' for v in others)}" for option, (_, *others) in options]
        dots.set_yticks(range(len(options)), labels, fontsize=9)
        dots.set_ylim(len(options) - 0.5, -0.5)
        dots.set_xticks([])
        dots.grid(False)
        dots.set_xlabel(f"{len(ordered)} of {len(table)} set-ups (trained), sorted", fontsize=10)
    return figure_of(axes)


def _pairs(effects: int) -> list[Axes]:
    """Two axes per effect, the larger above the smaller, two effects a row."""
    rows = math.ceil(effects / 2)
    with mpl.rc_context({"figure.constrained_layout.use": False}):
        figure = Figure(figsize=(12, 4.6 * rows))
    edges = {"left": 0.12, "right": 0.98, "top": 1 - 0.4 / (4.6 * rows), "bottom": 0.5 / (4.6 * rows)}
    grid = figure.add_gridspec(rows, 2, hspace=0.28, wspace=0.38, **edges)
    axes: list[Axes] = []
    for cell in range(effects):
        inner = grid[cell // 2, cell % 2].subgridspec(2, 1, height_ratios=(2, 1), hspace=0.06)
        axes += [figure.add_subplot(inner[0]), figure.add_subplot(inner[1])]
    return axes


def plot_decimation(source: Any, *, ax: Canvas = None) -> Figure:
    """The figure of what one network does when only every k-th token is shown, against k.

    Solid: the grid (the task is the chain at ξ/k). Dashed: as many tokens side by side (the task stays at ξ).
    Grey: the stack trained on i.i.d. tokens, on the grid. Points are seeds, lines means.

    Args:
        source: what :func:`rgfast.decimate` returned, or its folder.
        ax: four axes to draw on, instead of a new figure.

    Raises TypeError for a source of another kind, ValueError for another number of axes.
    """
    return draw_chart(spacing_chart(_study(source, "decimation")), ax)


def plot_observer(source: Any, *, ax: Canvas = None) -> Figure:
    """The figure of CKA between layer l and the observer who sees radius w, by stage and ξ, and its ridge.

    Color: CKA over that layer's largest, which stands above its column (means over seeds). White circles:
    the mean over seeds of the smallest radius that reaches 99% of a layer's largest CKA. A stage whose masked
    rows hold nothing anywhere has no panel.

    Args:
        source: what :func:`rgfast.observe` returned, or its folder.
        ax: axes to draw on, one per stage and ξ, instead of a new figure.

    Raises TypeError for a source of another kind, ValueError for another number of axes.
    """
    return draw_chart(observer_chart(_study(source, "observer")), ax)


def plot_setups(source: Any, *, ax: Canvas = None) -> Figure:
    """The figure of effective rank by layer in every set-up with a finished run, a panel per arm.

    Color: ξ. Solid: all rows at a position; dashed: masked rows, from layer 1 on; dotted: the untrained
    stack. The level line is V, above which no stack without mixing gets. Points are seeds, lines means. The
    last panel has the gap in R by rows and centering.

    Args:
        source: what :func:`rgfast.setups` returned, or its folder.
        ax: axes to draw on, one per panel, instead of a new figure.

    Raises TypeError for a source of another kind, ValueError for another number of axes.
    """
    return draw_chart(setups_chart(_study(source, "setups")), ax)
