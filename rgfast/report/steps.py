"""The figure of a monitor: a measure by layer and training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from rgfast.monitor.result import MonitorResult
from rgfast.probing.result import named
from rgfast.report.accessor import check_measure
from rgfast.report.canvas import Canvas, draw_chart
from rgfast.report.monitor_charts import step_heat_chart
from rgfast.report.sources import load

__all__ = ["plot_steps"]


def plot_steps(
    source: Any, *, measure: str = "effective_rank", views: Sequence[str] | None = None, ax: Canvas = None
) -> Figure:
    """The figure of a rank by layer, or a drift by transition, and training step, a panel per view.

    All panels are on one scale. ``source`` is a :class:`~rgfast.MonitorResult` or the path of a monitor's
    file; ``ax`` are axes to draw on, one per panel, instead of a new figure.

    Raises TypeError for a source of another kind, ValueError for an unknown measure or view and another
    number of axes than panels.
    """
    found = load(source)
    if not isinstance(found, MonitorResult):
        raise TypeError(f"source must be a monitor's result, got {type(found).__name__}")
    check_measure(measure, [name for name in named("rank", "drift") if name in found.measures])
    chosen = list(found.views) if views is None else [found.view_or_first(view) for view in views]
    return draw_chart(step_heat_chart(found, measure, chosen), ax)
