"""The charts of a monitor's result: by training step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rgfast.monitor.result import MonitorResult
from rgfast.probing.result import MEASURES, named
from rgfast.report.palette import depth_colours, kind_colours
from rgfast.report.parts import plain
from rgfast.report.spec import Axis, Chart, Panel, Rule, Series, heat_panel

__all__ = ["monitor_charts", "step_heat_chart"]


def step_heat_chart(result: MonitorResult, measure: str, views: Sequence[str]) -> Chart:
    """A rank by layer, or a drift by transition, and step, a panel per view, all on one scale."""
    grids = {view: result.by_step(measure, view) for view in views}
    good = np.concatenate([grid.values[np.isfinite(grid.values)] for grid in grids.values()])
    limits = (float(good.min()), float(good.max())) if good.size else None
    name = MEASURES[measure].label
    panels = []
    for view, grid in grids.items():
        along = str(grid.dims[1])
        panels.append(
            heat_panel(
                grid.values.T,
                name=name,
                x=("training step", result.steps),
                y=(along, grid[along].values),
                limits=limits,
                title=plain(view),
                note=_count(result, view),
            )
        )
    change = (
        "Where a layer darkens, it loses directions"
        if MEASURES[measure].kind == "rank"
        else "Where a transition brightens, its block moves the representation more"
    )
    caption = f"A column is one measured step. {change}."
    return Chart(f"{_titled(measure)} by layer and training step", caption, tuple(panels), one_bar=True)


def monitor_charts(result: MonitorResult) -> list[Chart]:
    """Every chart that the result has data for."""
    views = [view for view in result.views if view != "flattened"] or list(result.views)
    ranks, drifts = ([n for n in named(kind) if n in result.measures] for kind in ("rank", "drift"))
    charts = []
    if ranks:
        charts += [step_heat_chart(result, ranks[0], views), _lines(result, ranks[0], views)]
    if drifts and len(result.layers) > 1:
        charts.append(step_heat_chart(result, drifts[0], views))
    if result.targets:
        charts += [_targets(result, views)]
    return charts


def _lines(result: MonitorResult, measure: str, views: Sequence[str]) -> Chart:
    """A rank by step, a line per layer from dark (the first) to light."""
    x = np.asarray(result.steps, float)
    colors = depth_colours(len(result.layers))
    panels = []
    for view in views:
        values = result.by_step(measure, view).values
        series = tuple(
            Series(f"layer {k}", x, values[:, k], color, width=1.6) for k, color in enumerate(colors)
        )
        name = MEASURES[measure].label
        panels.append(
            Panel(_steps(), Axis(name, f"{name}, dimensions", low=0), plain(view), series,
                  note=_count(result, view), legend="layer")
        )  # fmt: skip
    caption = "The mean over positions, a line per layer: darker is nearer to the input."
    return Chart(f"{_titled(measure)} by training step", caption, tuple(panels), shared="xy", legend="right")


def _targets(result: MonitorResult, views: Sequence[str]) -> Chart:
    """Held-out R² at the last layer by step, a line per target."""
    x, colors = np.asarray(result.steps, float), kind_colours(result.targets)
    panels = []
    for view in views:
        series = tuple(
            Series(name, x, result.target_r2(name, view).values[:, -1], colors[name], width=1.6)
            for name in result.targets
        )
        y, rules = Axis("R²", "held-out linear R², last layer"), (Rule("", 0.0),)
        panels.append(Panel(_steps(), y, plain(view), series, rules, note=_count(result, view)))
    caption = "What a linear map fitted on other sequences reads of each target at the last layer."
    return Chart("Targets by training step", caption, tuple(panels), shared="y")


def _steps() -> Axis:
    return Axis("training step", whole=True)


def _count(result: MonitorResult, view: str) -> str:
    n = result.variable("n", view).values
    few, many = int(n.min()), int(n.max())
    return f"n = {few}" if few == many else f"n = {few} to {many}"


def _titled(measure: str) -> str:
    return MEASURES[measure].label[:1].upper() + MEASURES[measure].label[1:]
