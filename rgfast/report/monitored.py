"""The page of a monitor's result: when layers collapsed, and every measure by training step."""

from __future__ import annotations

import numpy as np

from rgfast.monitor.result import COLLAPSED, MonitorResult
from rgfast.report.definitions import HINT, PROBE_TERMS, number
from rgfast.report.markup import Markup, bullets, table, tag
from rgfast.report.monitor_charts import monitor_charts
from rgfast.report.openings import terms_table, words_of_view
from rgfast.report.page import Page, as_rows
from rgfast.report.parts import plain

__all__ = ["monitor_page"]

_TERMS = ("effective rank", "view", "kernel drift", "transition")
_COLLAPSE = (
    f"A layer collapsed at the first measured step from which on its effective rank stays at or under "
    f"{COLLAPSED:g} times what it was at the first measured step."
)


def monitor_page(result: MonitorResult) -> Page:
    """The whole page of a monitor."""
    page = Page("rgfast: monitor report", *_opening(result))
    charts = monitor_charts(result)
    for first in charts[:1]:
        page.chart(first)
        page.add(tag("p", HINT, class_="faint"))
    page.add(bullets([f"step {step}: {note}" for step, note in result.notes.items()]))
    page.heading("Terms")
    views = [(plain(view), words_of_view(view)) for view in result.views]
    terms = [(term, meaning) for term, meaning in PROBE_TERMS if term in _TERMS]
    page.add(terms_table([*terms, *views]))
    if "effective_rank" in result.measures:
        page.heading("When each layer collapsed")
        page.add(_collapse(result))
    if charts[1:]:
        page.charts("Figures", charts[1:])
    page.heading("Configuration and provenance")
    page.add(as_rows(result.provenance))
    return page


def _opening(result: MonitorResult) -> list[str]:
    steps = result.steps
    model = result.provenance.get("model", "a model")
    measured = (
        f"Measured: {model} at {len(steps)} steps of its training, {steps[0]} to {steps[-1]}, on the same "
        f"{result.dataset.attrs['sequences']} sequences, at {len(result.layers)} layers."
    )
    if "effective_rank" not in result.measures:
        return [measured]
    view = result.views[0]
    fell = result.collapse(view).values
    rank = result.by_step("effective_rank", view).values
    number_fell = int(np.isfinite(fell).sum())
    first = "" if not number_fell else f", the first at step {np.nanmin(fell):.0f}"
    came = (
        f"What came out ({plain(view)}): {number_fell} of {len(fell)} layers collapsed{first}. The last "
        "layer's effective rank, roughly the number of independent directions, went from "
        f"{number(rank[0, -1])} to {number(rank[-1, -1])}."
    )
    return [measured, came, _COLLAPSE]


def _collapse(result: MonitorResult) -> Markup:
    rows = []
    for view in result.views:
        rank, fell = result.by_step("effective_rank", view).values, result.collapse(view).values
        for layer, name in enumerate(result.layers):
            at = "never" if np.isnan(fell[layer]) else f"{fell[layer]:.0f}"
            ends = [number(float(rank[k, layer])) for k in (0, -1)]
            rows.append((plain(view), layer, name, *ends, at))
    heads = ("view", "layer", "name", "rank at the first step", "rank at the last", "collapsed at step")
    return table(heads, rows)
