"""The page of a comparison of two models, its table for notebooks, and its figure."""

from __future__ import annotations

import html
import math
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rgfast.comparing.result import LABELS, Comparison
from rgfast.report.backend import new_axes
from rgfast.report.canvas import Canvas, draw_chart, styled
from rgfast.report.comparison_charts import comparison_charts, matrix_chart
from rgfast.report.definitions import HINT, number
from rgfast.report.markup import Markup, bullets, join, table, tag
from rgfast.report.openings import terms_table, words_of_view
from rgfast.report.page import Page, as_rows
from rgfast.report.parts import plain, rows_text
from rgfast.report.sources import load

__all__ = ["comparison_as_html", "comparison_page", "plot_comparison", "plot_matrix"]

_SIDES: tuple[Literal["a", "b"], ...] = ("a", "b")
_TERMS = {
    "cka": "centered kernel alignment with linear kernels, debiased (Kornblith et al. 2019, Song et al. "
    "2012): 1 for layers alike up to rotation and scale, 0 in the mean for unrelated ones",
    "cka_biased": "the same without the correction: above 0 for unrelated layers too, near 1 if there are "
    "more features than rows",
    "mutual_knn": "the share of a row's nearest neighbors (by cosine) that both layers have in common, the "
    "mean over rows (Huh et al. 2024)",
    "procrustes": "what is left of the variance of both layers under the best rotation of one onto the other "
    "(Schönemann 1966)",
    "rsa": "the rank correlation of the distances between rows in both layers (Kriegeskorte 2008)",
}


def comparison_page(result: Comparison) -> Page:
    """The whole page of a comparison."""
    page = Page("rgfast: comparison of two models", *_opening(result))
    first, *charts = comparison_charts(result)
    page.chart(first)
    page.add(tag("p", HINT, class_="faint"))
    page.add(bullets([f"note: {note}" for note in result.notes]))
    page.heading("Terms")
    terms = [(LABELS[measure], _TERMS[measure]) for measure in result.measures]
    terms += [(plain(view), words_of_view(view)) for view in result.views]
    if result.dataset.attrs["null"]:
        terms.append(("p", _p_words(result)))
    page.add(terms_table(terms))
    page.heading("Best matches")
    for measure in result.measures:
        page.add(_matches(result, measure))
    page.charts("Figures", charts)
    page.heading("Layers")
    rows = [(side, k, name, width) for side in ("a", "b") for k, name, width in _layers(result, side)]
    page.add(table(("model", "layer", "name", "width"), rows))
    page.heading("Configuration and provenance")
    page.add(as_rows({**_configuration(result), **result.provenance}))
    return page


def _opening(result: Comparison) -> list[Markup]:
    measure, view = result.measures[0], result.views[0]
    head = repr(result).splitlines()[0].removeprefix("Comparison of ")
    good = [one for one in result.matches(measure, view) if one.match >= 0]
    came = "No layer has a defined value: nothing varies there."
    if good:
        top, least = (pick(good, key=lambda one: one.value) for pick in (max, min))
        came = (
            f"Over {words_of_view(view)}, the layer of a that is most like one of b is {top.layer_name} "
            f"({LABELS[measure]} {number(top.value)} with {top.match_name}); the one least like its best "
            f"match is {least.layer_name} ({number(least.value)} with {least.match_name})."
        )
    measured = f"{head}. How like every layer of b each layer of a is, over the same sequences."
    return [
        join([tag("b", title), " ", text])
        for title, text in (("What was measured.", measured), ("What came out.", came))
    ]


def _p_words(result: Comparison) -> str:
    return (
        f"the share of {result.dataset.attrs['null']} permutations of b's sequences, and the data itself, "
        "under which the best match is as high, on the sample: corrected for the choice among layers"
    )


def _matches(result: Comparison, measure: str) -> Markup:
    """A table with the best match of every layer of a and of b in the first view."""
    view = result.views[0]
    rows = [
        (
            f"{side} {one.layer}",
            one.layer_name,
            one.match_name or "none",
            number(one.value) if math.isnan(one.se) else f"{number(one.value)} ± {number(one.se)}",
            "" if math.isnan(one.p) else number(one.p),
        )
        for side in _SIDES
        for one in result.matches(measure, view, side=side)
    ]
    caption = f"{LABELS[measure]}, {plain(view)}, n = {rows_text(result.rows(view, measure))} rows."
    return table(("layer", "name", "best match", "value", "p"), rows, caption=caption, words=(1, 2))


def _layers(result: Comparison, side: str) -> list[tuple[int, str, int]]:
    names, widths = result.dataset[f"layer_{side}_name"].values, result.dataset[f"width_{side}"].values
    return [(k, str(name), int(width)) for k, (name, width) in enumerate(zip(names, widths, strict=True))]


def _configuration(result: Comparison) -> dict[str, Any]:
    attrs = result.dataset.attrs
    kept = ("sequences", "groups", "route", "null", "k", "seed", "sample_limit")
    return {name: np.asarray(attrs[name]).item() for name in kept} | {"samples": result.samples}


def comparison_as_html(result: Comparison) -> str:
    """A small table for notebooks: for every measure and view its n and each layer's best match."""
    rows = []
    for measure in result.measures:
        for view in result.views:
            best = result.matches(measure, view)
            matches = ", ".join(f"{one.layer} → {one.match} ({one.value:.3f})" for one in best)
            cells = (LABELS[measure], plain(view), rows_text(result.rows(view, measure)), matches)
            rows.append("".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in cells))
    heads = ("measure", "view", "n", "layer of a → best match in b")
    head = "".join(f"<th style='text-align:left'>{name}</th>" for name in heads)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in result.notes)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    title = html.escape(repr(result).splitlines()[0])
    return (
        f"<div><b>{title}</b><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}</div>"
    )


@styled
def plot_matrix(
    result: Comparison,
    measure: str = "cka",
    view: str | None = None,
    position: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """See :meth:`rgfast.Comparison.plot`."""
    chart = matrix_chart(result, measure, [result.view_or_first(view)], position)
    if ax is None:
        ax = new_axes((6, 4.4))
    draw_chart(chart, ax)
    return ax


def plot_comparison(source: Any, *, measure: str = "cka", ax: Canvas = None) -> Figure:
    """The figure of a comparison: a measure of every layer of a (rows) and b (columns), a panel per view.

    A line joins the layer of b that each layer of a is most like.

    Args:
        source: what :func:`rgfast.compare` returned, or the path of a saved one.
        measure: one that the comparison has.
        ax: axes to draw on, one per view, instead of a new figure.

    Raises TypeError for a source of another kind, ValueError for an unknown measure and another number of
    axes than views.
    """
    found = load(source)
    if not isinstance(found, Comparison):
        raise TypeError(f"source must be a comparison, got {type(found).__name__}")
    return draw_chart(matrix_chart(found, measure, found.views), ax)
