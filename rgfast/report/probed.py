"""The page of a probe's result: what its flow with depth is, how sure that is, and every figure it holds."""

from __future__ import annotations

import math

import numpy as np

from rgfast.flow.probed import ViewFlow
from rgfast.probing.result import MEASURES, ProbeResult, named
from rgfast.report.definitions import number
from rgfast.report.experiment import verdict_badge
from rgfast.report.markup import Markup, bullets, join, table, tag
from rgfast.report.page import Page, as_rows
from rgfast.report.parts import count_text, plain
from rgfast.report.probe_charts import probe_charts

__all__ = ["probe_page"]

_FALLS = (
    "Does the rank fall? Asked: the effective rank goes down from the first layer that has one to the "
    "last, with no upward step beyond 5% of the whole drop. R is last over first. No trained control is "
    "known here: a fall alone is no evidence that something was forgotten on purpose."
)
_SETTLES = (
    "Does the drift settle? Asked: ln drift by transition is better described (BIC) by a step of one or "
    "two transitions with a plateau after it than by a geometric decay, which would be a relaxation to a "
    "fixed point (up to scale). The top-2 share stands beside what i.i.d. exponential drifts would give."
)
_MEASURED = "effective rank and kernel drift of at least two layers"


def probe_page(result: ProbeResult) -> Page:
    """The whole page of a probe."""
    data = result.dataset
    head, *_ = repr(result).splitlines()
    page = Page("rgfast: probe report", head.removeprefix("ProbeResult of "))
    page.add(bullets([f"note: {note}" for note in result.notes]))
    page.heading("Findings")
    page.add(_findings(result))
    page.heading("Robustness")
    page.add(_robustness(result))
    page.charts("Figures", probe_charts(result))
    page.heading("Layers")
    layers = zip(data.layer.values, result.layers, data.width.values, strict=True)
    page.add(table(("layer", "name", "width"), ((int(k), name, int(width)) for k, name, width in layers)))
    page.heading("Configuration and provenance")
    page.add(as_rows(result.provenance))
    return page


def _findings(result: ProbeResult) -> Markup:
    if not {"effective_rank", "kernel_drift"} <= set(result.measures) or len(result.layers) < 2:
        return tag("p", f"Not measured: findings need {_MEASURED}.")
    flows = [result.flow(view) for view in result.views]
    grouped = int(result.dataset.attrs.get("groups", 1)) > 1
    error = "± is one jackknife standard error." if grouped else "No error bars: groups=G would give them."
    falls = table(
        ("view", "verdict", "R", "first layer with a rank", "last layer", "largest rise", "n", "caveats"),
        [_fall(result, flow) for flow in flows],
        caption=f"{_FALLS} {error}",
        words=(7,),
    )
    settles = table(
        (
            "view",
            "verdict",
            "rate per layer",
            "top-2 share (null)",
            "N_eff",
            "BIC(decay) − BIC(step)",
            "plateau",
        ),
        [_settling(flow) for flow in flows],
        caption=_SETTLES,
    )
    return join((falls, settles))


def _fall(result: ProbeResult, flow: ViewFlow) -> tuple[object, ...]:
    rank, view, last = flow.rank, flow.view, len(result.layers) - 1
    status = "not measured"
    if math.isfinite(rank.ratio):
        status = "falls" if rank.falls() else "does not fall"
    ends = [f"{_with_error(result, 'effective_rank', view, k)} ({k})" for k in (flow.first_layer, last)]
    numbers = (number(rank.ratio), *ends, number(rank.largest_rise), count_text(result, view))
    return (plain(view), verdict_badge(status), *numbers, bullets(flow.caveats))


def _settling(flow: ViewFlow) -> tuple[object, ...]:
    shape = flow.drift
    if shape is None:
        why = "fewer than four transitions with a drift above 0"
        return (plain(flow.view), verdict_badge("not measured"), "", "", "", "", why)
    first = shape.plateau[0] + flow.first_layer
    return (
        plain(flow.view),
        verdict_badge("step + plateau" if shape.preferred == "step" else "relaxation"),
        number(shape.decay_rate),
        f"{number(shape.top2)} ({number(shape.top2_null)})",
        number(shape.effective_transitions),
        number(shape.bic_difference),
        f"from {first}→{first + 1} on, mean drift {number(shape.plateau_mean)}",
    )


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
