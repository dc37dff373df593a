"""The page of a probe's result: what its flow with depth is, how sure that is, and every figure it holds."""

from __future__ import annotations

import math

import numpy as np

from rgfast.flow.probed import FALL, ViewFlow
from rgfast.probing.result import MEASURES, ProbeResult, named
from rgfast.report.definitions import HINT, PROBE_TERMS, number
from rgfast.report.markup import Markup, bullets, join, table, tag
from rgfast.report.openings import MEASURED, opening_of_probe, terms_table, verdict_badge, words_of_view
from rgfast.report.page import Page, as_rows
from rgfast.report.parts import count_text, plain
from rgfast.report.probe_charts import probe_charts

__all__ = ["probe_page"]

_FALLS = (
    "Does the rank fall? R is the effective rank of the last layer over that of the first that has one. It "
    f"falls if R ≤ {FALL:g} and the drop is more than twice its standard error, rises in the inverse case, "
    "and is flat otherwise. A fall alone is no evidence of anything learned: flow(control=...) compares it "
    "with that of random weights or shuffled tokens."
)
_SETTLES = (
    "Has the drift a shape? Step + plateau, at any one or two transitions, and geometric decay compete on ln "
    "drift (BIC). It is flat unless one of them beats a flat profile by more than flat draws show by chance "
    "and the largest transition is twice the median; with fewer than six transitions it is not judged. The "
    "top-2 share stands beside what 95% of i.i.d. exponential drifts stay below."
)
_SAID = ("falls", "rises", "step + plateau", "geometric decay", "growing")


def probe_page(result: ProbeResult) -> Page:
    """The whole page of a probe."""
    data = result.dataset
    page = Page("rgfast: probe report", *opening_of_probe(result))
    charts = probe_charts(result)
    for first in charts[:1]:
        page.chart(first)
        page.add(tag("p", HINT, class_="faint"))
    page.add(bullets([f"note: {note}" for note in result.notes]))
    page.heading("Terms")
    views = [(plain(view), words_of_view(view)) for view in result.views]
    page.add(terms_table([*PROBE_TERMS, *views]))
    page.heading("Findings")
    page.add(_findings(result))
    page.heading("Robustness")
    page.add(_robustness(result))
    if charts[1:]:
        page.charts("Figures", charts[1:])
    page.heading("Layers")
    layers = zip(data.layer.values, result.layers, data.width.values, strict=True)
    page.add(table(("layer", "name", "width"), ((int(k), name, int(width)) for k, name, width in layers)))
    page.heading("Configuration and provenance")
    page.add(as_rows(result.provenance))
    return page


def _findings(result: ProbeResult) -> Markup:
    if not {"effective_rank", "kernel_drift"} <= set(result.measures) or len(result.layers) < 2:
        return tag("p", f"Not measured: findings need {MEASURED}.")
    flows = [result.flow(view) for view in result.views]
    grouped = int(result.dataset.attrs.get("groups", 1)) > 1
    error = "± is one jackknife standard error." if grouped else "No error bars: groups=G would give them."
    falls = table(
        (
            "view",
            "rank",
            "reading",
            "R",
            "first layer with a rank",
            "last layer",
            "largest rise",
            "n",
            "caveats",
        ),
        [_fall(result, flow) for flow in flows],
        caption=f"{_FALLS} {error}",
        words=(8,),
    )
    settles = table(
        (
            "view",
            "shape",
            "rate per transition",
            "top-2 share (chance)",
            "N_eff",
            "BIC over flat (chance)",
            "BIC(decay) − BIC(step)",
            "step at",
        ),
        [_settling(flow) for flow in flows],
        caption=_SETTLES,
    )
    return join((falls, settles))


def _fall(result: ProbeResult, flow: ViewFlow) -> tuple[object, ...]:
    rank, view, last = flow.rank, flow.view, len(result.layers) - 1
    ends = [f"{_with_error(result, 'effective_rank', view, k)} ({k})" for k in (flow.first_layer, last)]
    reading = f"{flow.reading.status}: {flow.reading.summary.partition(':')[0]}"
    numbers = (number(rank.ratio), *ends, number(rank.largest_rise), count_text(result, view))
    return (plain(view), _word(flow.word), reading, *numbers, bullets(flow.caveats))


def _settling(flow: ViewFlow) -> tuple[object, ...]:
    shape = flow.drift
    if shape is None or shape.word == "not judged":
        return (plain(flow.view), flow.shape, "", "", "", "", "", "")
    places = [k + flow.first_layer for k in shape.step_at]
    return (
        plain(flow.view),
        _word(shape.word),
        number(shape.decay_rate),
        f"{number(shape.top2)} ({number(shape.top2_null)})",
        number(shape.effective_transitions),
        f"{number(shape.over_flat)} ({number(shape.over_flat_null)})",
        number(shape.bic_difference),
        ", ".join(f"{k}→{k + 1}" for k in places) if shape.word == "step + plateau" else "",
    )


def _word(word: str) -> object:
    """A word of what was seen, with a mark; plain if nothing was."""
    return verdict_badge(word) if word in _SAID else word


def _with_error(result: ProbeResult, measure: str, view: str, layer: int) -> str:
    value = float(result.order_parameter(view, measure).values[layer])
    error = result.standard_error(view, measure)
    return number(value) if error is None else f"{number(value)} ± {number(float(error.values[layer]))}"


def _robustness(result: ProbeResult) -> Markup:
    rows = []
    for measure in (name for name in named("rank") if name in result.measures):
        for view in result.views:
            values = np.asarray(result.order_parameter(view, measure).values)
            positive = np.flatnonzero(values > 0)
            start = int(positive[0]) if positive.size else 0
            ratio = values[-1] / values[start] if positive.size else math.nan
            expected = number(float(result.baseline(view, measure)[-1])) if MEASURES[measure].baseline else ""
            limited = result.sample_limited(view)
            ends = [_with_error(result, measure, view, k) for k in (start, len(values) - 1)]
            n = f"{count_text(result, view)}{' (sample limited)' if limited else ''}"
            rows.append((MEASURES[measure].label, plain(view), *ends, number(ratio), expected, n))
    heads = ("measure", "view", "first", "last", "R", "isotropic, same n", "n")
    caption = "Views and rank definitions: the first layer with a rank, the last, and last over first."
    return table(heads, rows, caption=caption) if rows else tag("p", "No rank was measured.")
