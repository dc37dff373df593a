"""The charts of a comparison of two models: measures by layer of one and layer of the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rgfast.comparing.result import LABELS, Comparison, Match
from rgfast.report.palette import view_styles
from rgfast.report.parts import plain, rows_text
from rgfast.report.spec import Array, Axis, Chart, Panel, Series, heat_panel

__all__ = ["best_chart", "comparison_charts", "matrix_chart"]

_FIELDS = ("layer", "value", "se")


def matrix_chart(
    result: Comparison, measure: str, views: Sequence[str], position: int | None = None
) -> Chart:
    """A measure of every layer of a and of b, a panel per view; a line joins each layer's best match."""
    grids = {view: np.asarray(result.matrix(measure, view, position=position).values) for view in views}
    low = min([0.0, *(float(np.nanmin(grid)) for grid in grids.values() if np.isfinite(grid).any())])
    panels = [_matrix_panel(result, measure, view, grid, low, position) for view, grid in grids.items()]
    caption = (
        "1 is the same representation up to rotation and scale. The line joins the layer of b that each "
        "layer of a is most like."
    )
    if measure == "mutual_knn":
        caption = (
            f"The share of a row's {result.dataset.attrs['k']} nearest neighbors that both layers have. The "
            "line joins the layer of b that each layer of a is most like."
        )
    return Chart(
        f"{_titled(measure)} between the layers of both models",
        caption,
        tuple(panels),
        size=(4.6, 3.9),
        one_bar=True,
        legend="none",
    )


def _matrix_panel(
    result: Comparison, measure: str, view: str, grid: Array, low: float, position: int | None
) -> Panel:
    best = result.matches(measure, view, position=position)
    at = np.array([one.match if one.match >= 0 else np.nan for one in best])
    texts = tuple(
        f"{one.layer_name} and {one.match_name}: {one.value:.3f}" if one.match >= 0 else "" for one in best
    )
    line = Series(
        "best match",
        at,
        np.arange(len(at), dtype=float),
        "#FFFFFF",
        texts=texts,
        halo=True,
        size=4.5,
        marker="o",
        width=1.2,
    )
    where = "position: all"
    if result.is_positional(view):
        where = f"mean over {len(result.positions(view))} positions"
    if position is not None and position >= 0:
        where = f"position {position}"
    count = rows_text(result.rows(view, measure))
    return heat_panel(
        grid,
        name=LABELS[measure],
        x=("layer of b", range(grid.shape[1])),
        y=("layer of a", range(grid.shape[0])),
        limits=(low, 1.0),
        facts=(where, f"n = {count} rows"),
        title=plain(view),
        note=f"n = {count}",
        series=(line,),
    )


def best_chart(result: Comparison, measure: str, views: Sequence[str]) -> Chart:
    """The measure of each layer of a with its best match in b, a line per view, and the chance level."""
    series, styles = [], view_styles(views)
    for view in views:
        color, marker = styles[view]
        best = result.matches(measure, view)
        x, y, half = (np.array([getattr(one, name) for one in best], float) for name in _FIELDS)
        line = Series(
            plain(view),
            x,
            y,
            color,
            note=f"n = {rows_text(result.rows(view, measure))}",
            texts=tuple(_with(one) for one in best),
            marker=marker,
            width=1.6,
        )
        if np.isfinite(half).any():
            line = replace(line, low=y - half, high=y + half, spread="± 1 s.e.:")
        series.append(line)
        if f"{measure}_null" in result.dataset:
            chance = result.calibrated(measure, view).best(-1).threshold.numpy()
            series.append(
                Series(
                    f"chance, {plain(view)}",
                    x,
                    chance,
                    color,
                    dash=":",
                    width=1.2,
                    size=1.5,
                    group="above chance (5%)",
                )
            )
    layers = Axis("layer of a", whole=True, low=-0.3, high=len(result.layers_a) - 0.7)
    panel = Panel(layers, Axis(LABELS[measure], f"{LABELS[measure]}\nwith the best match in b", low=0),
                  series=tuple(series))  # fmt: skip
    caption = "How like the most similar layer of b each layer of a is."
    if any(line.dash == ":" for line in series):
        caption += " Dotted: what the best match exceeds by chance in 5% of permutations of the sequences."
    return Chart(f"{_titled(measure)} with the best match", caption, (panel,), size=(6.5, 4.2))


def _with(one: Match) -> str:
    if one.match < 0:
        return ""
    return f"with {one.match_name} (layer {one.match})" + ("" if math.isnan(one.p) else f", p = {one.p:.3g}")


def comparison_charts(result: Comparison) -> list[Chart]:
    """Every chart of the result."""
    charts = [matrix_chart(result, measure, result.views) for measure in result.measures]
    return charts + [best_chart(result, measure, result.views) for measure in result.measures]


def _titled(measure: str) -> str:
    return LABELS[measure][:1].upper() + LABELS[measure][1:]
