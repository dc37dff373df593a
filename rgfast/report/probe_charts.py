"""The charts of a probe's result. Color and marker are the view's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rgfast.probing.result import MEASURES, ProbeResult, named
from rgfast.report.extract import mean_of
from rgfast.report.palette import kind_colours, view_styles
from rgfast.report.parts import (
    component_axis,
    count_text,
    fit_series,
    layer_axis,
    plain,
    spectrum_series,
    transition_axis,
)
from rgfast.report.spec import Axis, Chart, Panel, Rule, Series, heat_panel

__all__ = [
    "cka_chart",
    "drift_chart",
    "heat_chart",
    "narrow_views",
    "probe_charts",
    "rank_chart",
    "spectra_chart",
    "target_chart",
]

_SINGLE = (6.5, 4.2)


def narrow_views(result: ProbeResult) -> list[str]:
    """The views drawn unless others are asked for: ranks of whole sequences as rows live on another scale."""
    return [view for view in result.views if view != "flattened"] or list(result.views)


def _count(result: ProbeResult, view: str) -> str:
    return f"n = {count_text(result, view)}"


def _where(result: ProbeResult, view: str) -> str:
    positions = len(result.positions(view))
    return f"mean over {positions} positions" if result.is_positional(view) else "position: all"


def _facts(result: ProbeResult, view: str) -> tuple[str, ...]:
    return _where(result, view), f"{_count(result, view)} rows"


def _series(result: ProbeResult, measure: str, view: str, *, unit: float = 1.0) -> Series:
    values = result.order_parameter(view, measure)
    error = result.standard_error(view, measure)
    x, y = np.asarray(values[values.dims[0]].values, float), np.asarray(values.values) / unit
    color, marker = view_styles(result.views)[view]
    series = Series(
        plain(view),
        x,
        y,
        color,
        note=_count(result, view),
        facts=(_where(result, view),),
        marker=marker,
        width=1.6,
    )
    if error is None:
        return series
    half = np.asarray(error.values) / unit
    return replace(series, low=y - half, high=y + half, spread="± 1 s.e.:")


def _first(values: Any) -> float:
    good = values[np.isfinite(values) & (values > 0)]
    return float(good[0]) if len(good) else math.nan


def _titled(measure: str) -> str:
    return MEASURES[measure].label[:1].upper() + MEASURES[measure].label[1:]


def rank_chart(result: ProbeResult, measure: str, views: Sequence[str], *, relative: bool = False) -> Chart:
    """A rank by layer, one line per view (its mean over positions), with its isotropic baseline."""
    series = []
    for view in views:
        values = result.order_parameter(view, measure)
        unit = _first(values.values) if relative else 1.0
        series.append(_series(result, measure, view, unit=unit))
    styles = view_styles(result.views)
    for view in views if MEASURES[measure].baseline and not relative else ():
        x, y = series[0].x, np.asarray(result.baseline(view, measure).values)
        name, facts = f"isotropic, {plain(view)}", _facts(result, view)
        line = Series(name, x, y, styles[view][0], facts=facts, dash=":", width=1.2, size=1.5)
        series.append(replace(line, group="isotropic, same n"))
    name = MEASURES[measure].label
    label = f"{name}\nover the first layer's" if relative else f"{name}, dimensions"
    panel = Panel(_layers(result), Axis(name, label, low=0), series=tuple(series))
    caption = (
        "The mean over positions; dotted, what isotropic Gaussian rows of the same n and width would give."
    )
    return Chart(f"{_titled(measure)} by layer", caption, (panel,), size=_SINGLE)


def _layers(result: ProbeResult) -> Axis:
    return layer_axis(len(result.layers), "first probed")


def heat_chart(result: ProbeResult, measure: str, views: Sequence[str]) -> Chart:
    """A rank by layer, or a drift by transition, and position, a panel per view, all on one scale.

    Undefined and constant cells are blank.
    """
    drawn, panels = {}, []
    for view in views:
        values = result.by_position(measure, view)
        along = str(values.dims[0])
        grid = np.asarray(values.transpose(along, "position").values)
        # A layer that is constant (masked rows at the input) would set the scale.
        drawn[view] = np.where(grid > 0, grid, np.nan), along, values
    good = np.concatenate([cells[np.isfinite(cells)] for cells, *_ in drawn.values()])
    limits = (float(good.min()), float(good.max())) if good.size else None
    for view, (cells, along, values) in drawn.items():
        axes: dict[str, Any] = {"x": ("position", values.position.values), "y": (along, values[along].values)}
        axes |= {"title": plain(view), "note": _count(result, view)}
        counts = result.variable("n", view).values
        name = MEASURES[measure].label
        panels.append(heat_panel(cells, name=name, counts=counts, limits=limits, **axes))
    caption = "An even row means that positions agree, and that the mean over them hides nothing."
    return Chart(f"{_titled(measure)} by layer and position", caption, tuple(panels), one_bar=True)


def drift_chart(result: ProbeResult, measure: str, views: Sequence[str], *, fits: bool = True) -> Chart:
    """A drift by transition, logarithmic, one line per view, with two descriptions of its decay."""
    series = []
    for view in views:
        series.append(_series(result, measure, view))
        defined = np.flatnonzero(np.isfinite(series[-1].y))
        if fits and defined.size:
            first, drift = int(defined[0]), np.asarray(result.order_parameter(view, measure).values)
            series += fit_series(drift[first:], first, series[-1].color, plain(view))
    x = transition_axis(result.dataset.sizes["transition"])
    panel = Panel(x, Axis(MEASURES[measure].label, log=True), series=tuple(series))
    caption = "How far each block moves the representation, with two descriptions of its decay."
    return Chart(f"{_titled(measure)} by transition", caption, (panel,), size=_SINGLE)


def cka_chart(result: ProbeResult, measure: str, views: Sequence[str]) -> Chart:
    """CKA between layers, the mean over positions, a panel per view; pairs not asked for are blank."""
    panels = []
    for view in views:
        values = np.asarray(result.order_parameter(view, measure).values)
        layers = result.dataset.layer.values
        axes: dict[str, Any] = {"x": ("layer", layers), "y": ("layer", layers), "limits": (0.0, 1.0)}
        more: dict[str, Any] = {"title": plain(view), "note": _count(result, view)}
        panels.append(
            heat_panel(values, name=MEASURES[measure].label, facts=_facts(result, view), **axes, **more)
        )
    caption = (
        "1 is the same representation up to rotation and scale. Pairs that were not asked for are blank."
    )
    return Chart("CKA between layers", caption, tuple(panels), size=(4.6, 3.8), one_bar=True)


def spectra_chart(result: ProbeResult, views: Sequence[str]) -> Chart:
    """Singular values by layer over each layer's largest, the mean over positions, a panel per view."""
    panels = []
    for view in views:
        sigma = result.variable("singular_values", view).transpose("position", "layer", "component").values
        top = sigma[..., :1]
        mean = mean_of(sigma / np.where(top > 0, top, np.nan))
        y = Axis("σ over the largest", "singular value over the largest", log=True)
        series, note = spectrum_series(mean, _facts(result, view)), _count(result, view)
        panels.append(Panel(component_axis(), y, plain(view), series, note=note, legend="layer"))
    caption = "Darker is nearer to the input. Values below 1e-6 of the largest are rounding and left out."
    return Chart("Singular values by depth", caption, tuple(panels), shared="xy", legend="right")


def target_chart(result: ProbeResult, views: Sequence[str]) -> Chart:
    """Held-out R² of every target by layer, the mean over positions, a panel per view."""
    panels, colors = [], kind_colours(result.targets)
    for view in views:
        series = []
        for name in result.targets:
            values = result.target_r2(name, view)
            style: dict[str, Any] = {
                "facts": _facts(result, view),
                "marker": view_styles(result.views)[view][1],
                "width": 1.6,
            }
            series.append(
                Series(name, values.layer.values.astype(float), values.values, colors[name], **style)
            )
        y, rules = Axis("R²", "held-out linear R²"), (Rule("", 0.0),)
        note = _count(result, view)
        panels.append(Panel(_layers(result), y, plain(view), tuple(series), rules, note=note))
    caption = "What a linear map fitted on other sequences still reads of each target."
    return Chart("Targets by layer", caption, tuple(panels), shared="y")


def _relative_chart(result: ProbeResult, ranks: Sequence[str], views: Sequence[str]) -> Chart:
    """Every rank over its first layer, a panel per view."""
    panels, colors = [], kind_colours(ranks)
    for view in views:
        series = []
        for measure in ranks:
            values = result.order_parameter(view, measure)
            x, y = values.layer.values.astype(float), values.values / _first(values.values)
            series.append(Series(MEASURES[measure].label, x, y, colors[measure], facts=_facts(result, view)))
        axis = Axis("over the first layer", "rank over the first layer's", low=0)
        panels.append(Panel(_layers(result), axis, plain(view), tuple(series)))
    caption = "Do they tell the same story?"
    return Chart("Every rank, over its first layer", caption, tuple(panels), shared="y")


def probe_charts(result: ProbeResult) -> list[Chart]:
    """Every chart that the result has data for."""
    names, narrow, charts = result.measures, narrow_views(result), []
    ranks, drifts = ([name for name in named(kind) if name in names] for kind in ("rank", "drift"))
    if ranks:
        charts.append(rank_chart(result, ranks[0], narrow))
        if positional := [view for view in result.views if result.is_positional(view)]:
            charts.append(heat_chart(result, ranks[0], positional))
    if drifts and len(result.layers) > 1:
        charts.append(drift_chart(result, drifts[0], narrow))
    charts += [cka_chart(result, name, narrow) for name in named("pair") if name in names][:1]
    if result.views[0] != "flattened":
        charts.append(spectra_chart(result, narrow))
    if result.targets:
        charts.append(target_chart(result, narrow))
    if len(ranks) > 1:
        charts.append(_relative_chart(result, ranks, narrow))
    return charts
