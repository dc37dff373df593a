"""What the ``plot_*`` methods of a probe's result call: one panel on one axes."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from rgfast.monitor.result import MonitorResult
from rgfast.probing.result import ProbeResult, named
from rgfast.report.backend import new_axes
from rgfast.report.canvas import draw_chart, styled
from rgfast.report.monitor_charts import step_heat_chart
from rgfast.report.probe_charts import (
    cka_chart,
    drift_chart,
    heat_chart,
    narrow_views,
    rank_chart,
    spectra_chart,
)
from rgfast.report.spec import Chart

__all__ = [
    "check_measure",
    "plot_cka",
    "plot_drift",
    "plot_heat_map",
    "plot_monitor",
    "plot_rank",
    "plot_spectra",
    "views_of",
]


def plot_rank(
    result: ProbeResult,
    measure: str = "effective_rank",
    views: Sequence[str] | None = None,
    relative: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """See :meth:`rgfast.ProbeResult.plot_rank`."""
    check_measure(measure, named("rank"))
    return _draw(rank_chart(result, measure, views_of(result, views), relative=relative), ax)


def plot_drift(
    result: ProbeResult,
    measure: str = "kernel_drift",
    views: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """See :meth:`rgfast.ProbeResult.plot_drift`; the fits are drawn for a view alone."""
    check_measure(measure, named("drift"))
    chosen = views_of(result, views)
    return _draw(drift_chart(result, measure, chosen, fits=len(chosen) == 1), ax)


def plot_cka(
    result: ProbeResult, measure: str = "cka", view: str | None = None, ax: Axes | None = None
) -> Axes:
    """See :meth:`rgfast.ProbeResult.plot_cka`."""
    check_measure(measure, named("pair"))
    return _draw(cka_chart(result, measure, [result.view_or_first(view)]), ax)


def plot_heat_map(
    result: ProbeResult, measure: str = "effective_rank", view: str | None = None, ax: Axes | None = None
) -> Axes:
    """See :meth:`rgfast.ProbeResult.plot_heat_map`."""
    check_measure(measure, named("rank", "drift"))
    return _draw(heat_chart(result, measure, [result.view_or_first(view)]), ax)


def plot_monitor(
    result: MonitorResult, measure: str = "effective_rank", view: str | None = None, ax: Axes | None = None
) -> Axes:
    """See :meth:`rgfast.MonitorResult.plot`."""
    check_measure(measure, [name for name in named("rank", "drift") if name in result.measures])
    return _draw(step_heat_chart(result, measure, [result.view_or_first(view)]), ax)


def plot_spectra(result: ProbeResult, view: str | None = None, ax: Axes | None = None) -> Axes:
    """See :meth:`rgfast.ProbeResult.plot_spectra`."""
    view = result.view_or_first(view)
    if view == "flattened":
        raise ValueError("view must be one with spectra, and the flattened view keeps none")
    return _draw(spectra_chart(result, [view]), ax)


def check_measure(measure: str, known: Sequence[str]) -> None:
    """Raise ValueError unless ``measure`` is among the ``known``."""
    if measure not in known:
        raise ValueError(f"measure must be one of {', '.join(known)}, got {measure!r}")


def views_of(result: ProbeResult, views: Sequence[str] | None) -> list[str]:
    """``views``, or those that are drawn by default. Raises ValueError for an unknown one."""
    chosen = narrow_views(result) if views is None else [result.view_or_first(view) for view in views]
    return chosen or list(result.views)


@styled
def _draw(chart: Chart, ax: Axes | None) -> Axes:
    if ax is None:
        ax = new_axes((6, 4))
    draw_chart(chart, ax)
    return ax
