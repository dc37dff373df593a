"""Draws the specification of a figure with matplotlib, on new axes or the caller's."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis as Ticked
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from rgfast.files import write_bytes
from rgfast.report.palette import BASELINE, HEAT, STYLE
from rgfast.report.spec import Array, Axis, Chart, Heat, Panel, Series

__all__ = ["Canvas", "canvas", "draw_chart", "draw_panel", "figure_of", "save_figure", "styled"]

Canvas = Axes | Sequence[Axes] | None
P = ParamSpec("P")
R = TypeVar("R")
_MOST_LABELS = 12  # on an axis
_JITTER = 0.08  # of a seed's points beside the mean, in layers
_SMALL = 9  # points, the font of a legend
_LETTER, _KEY, _LINE = (
    0.56 * _SMALL,
    40.0,
    1.45 * _SMALL,
)  # points: about a letter, a key and a line of a legend


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """``draw`` under the style of every figure."""

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


def canvas(ax: Canvas, panels: int, *, columns: int, size: tuple[float, float], **options: Any) -> list[Axes]:
    """As many axes as there are ``panels``: those of ``ax``, or of a new figure with ``size`` per panel.

    Raises ValueError if ``ax`` has another number of axes.
    """
    if ax is not None:
        given = [ax] if isinstance(ax, Axes) else list(ax)
        if len(given) != panels:
            raise ValueError(f"ax must be {panels} axes, one per panel, got {len(given)}")
        return given
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.4))
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for spare in grid.flat[panels:]:
        spare.remove()
    return list(grid.flat[:panels])


def figure_of(axes: Sequence[Axes]) -> Figure:
    """The figure with the first of ``axes``."""
    found = axes[0].figure
    while isinstance(found, SubFigure):
        found = found.figure
    assert isinstance(found, Figure)
    return found


@styled
def draw_chart(chart: Chart, ax: Canvas = None) -> Figure:
    """The figure of ``chart``, on ``ax`` (one per panel) or new.

    Raises ValueError for another number of axes.
    """
    panels, shared = chart.panels, {f"share{axis}": axis in chart.shared for axis in "xy"}
    axes = canvas(ax, len(panels), columns=chart.columns, size=chart.size, **shared)
    pictures = [_draw(panel, one) for panel, one in zip(panels, axes, strict=True)]
    # Axes that are shared get their limits when everything on them is drawn.
    for k, (panel, one) in enumerate(zip(panels, axes, strict=True)):
        _finish(panel, one, note_below="x" not in chart.shared)
        if ax is None and "x" in chart.shared:
            if k + chart.columns < len(axes):
                one.set_xlabel("")
            else:  # a short last row leaves panels of the row above at the bottom
                one.tick_params(labelbottom=True)
        same = panel.y == panels[k - k % chart.columns].y
        if ax is None and "y" in chart.shared and k % chart.columns and same:
            one.set_ylabel("")
    figure = figure_of(axes)
    bars = [(picture, one, panel.heat) for picture, one, panel in zip(pictures, axes, panels, strict=True)]
    for picture, one, heat in bars[-1:] if chart.one_bar else bars:
        if heat is not None:
            one.figure.colorbar(picture, ax=axes if chart.one_bar else one, label=heat.label)
    _legends(chart, axes, figure, given=ax is not None)
    if ax is None and chart.heading:
        figure.suptitle(chart.heading)
    return figure


def draw_panel(panel: Panel, axes: Axes, *, legend_at: str = "best") -> None:
    """Draw ``panel`` alone, with its legend."""
    _draw(panel, axes)
    _finish(panel, axes, note_below=True)
    _inside(panel, axes, legend_at)


def _draw(panel: Panel, axes: Axes) -> Any:
    """Everything but limits, labels and legend; what a color bar needs."""
    picture = None if panel.heat is None else _draw_heat(panel.heat, axes)
    known: set[str] = set()
    for series in panel.series:
        _draw_series(series, panel, axes, known)
    for rule in panel.rules:
        dash = BASELINE if rule.dash == ":" else rule.dash
        style: dict[str, Any] = {
            "color": _paint(rule.color),
            "linewidth": 0.6 if rule.dash == "-" else 1.2,
            "linestyle": dash,
        }
        axes.axhline(rule.y, label=rule.name or "_", **style)
    return picture


def _paint(color: str) -> str:
    return "black" if color == "ink" else color


def _draw_heat(heat: Heat, axes: Axes) -> Any:
    limits: dict[str, Any] = {"vmin": heat.low, "vmax": heat.high}
    picture = axes.imshow(
        heat.values, origin="lower", aspect="auto", cmap=HEAT, interpolation="none", **limits
    )
    axes.grid(False)
    for column, text in enumerate(heat.above):
        axes.text(column, 1.01, text, transform=axes.get_xaxis_transform(), ha="center", fontsize=8.5)
    return picture


def _draw_series(series: Series, panel: Panel, axes: Axes, known: set[str]) -> None:
    y = np.where(series.y > 0, series.y, np.nan) if panel.y.log else series.y
    if not np.isfinite(y).any():
        return
    color, entry = _paint(series.color), series.group or series.name
    words = f"{entry}  ({series.note})" if series.note else entry
    label = "_" if entry in known else words.removeprefix(panel.legend).strip()
    known.add(entry)
    alone = series.members is None
    style: dict[str, Any] = {
        "color": color,
        "label": label,
        "linestyle": series.dash if series.line else "none",
        "linewidth": series.width,
        "marker": series.marker if alone else "",
        "markersize": series.size * (3.2 if series.marker == "*" else 1.3),
        "fillstyle": "none" if series.open else "full",
        "alpha": None if series.line else 0.7,
    }
    if series.halo:
        style["markeredgecolor"] = "black"
    if series.low is None or series.high is None:
        axes.plot(series.x, y, **style)
    else:
        ends = np.stack([y - series.low, series.high - y])
        axes.errorbar(series.x, y, yerr=np.nan_to_num(ends).clip(min=0), capsize=2, **style)
    if series.members is not None:
        _draw_members(series, series.members, panel, axes, color)


def _draw_members(series: Series, members: Array, panel: Panel, axes: Axes, color: str) -> None:
    apart = _JITTER if len(members) > 1 and (panel.x.whole or panel.x.labels) else 0.0
    style: dict[str, Any] = {
        "color": color,
        "markersize": 1.15 * series.size,
        "alpha": 0.55,
        "markeredgewidth": 0,
    }
    for offset, values in zip(np.linspace(-apart, apart, len(members)), members, strict=True):
        shown = np.where(values > 0, values, np.nan) if panel.y.log else values
        axes.plot(series.x + offset, shown, series.marker or "o", **style)


def _finish(panel: Panel, axes: Axes, *, note_below: bool) -> None:
    """Scales, ticks, limits and labels."""
    _scale(panel.x, axes, axes.xaxis)
    _scale(panel.y, axes, axes.yaxis)
    title, below = panel.title, panel.x.label or panel.x.name
    if panel.note and note_below and panel.heat is None:
        below += f"\n{panel.note}"
    elif panel.note:
        # In one line, a longer one could reach the title of the next panel.
        title += f"\n({panel.note})" if len(title) + len(panel.note) > 28 else f"  ({panel.note})"
    small = panel.heat is not None or not note_below
    above = panel.heat is not None and panel.heat.above
    axes.set_title(title, fontsize=10 if small else None, pad=16 if above else None)
    axes.set(xlabel=below, ylabel=panel.y.label or panel.y.name)


def _scale(axis: Axis, axes: Axes, ticked: Ticked) -> None:
    horizontal = ticked is axes.xaxis
    if axis.log and any(np.size(line.get_xdata()) for line in axes.lines):  # a logarithm needs a value
        axes.set_xscale("log") if horizontal else axes.set_yscale("log")
    if axis.labels:
        every = -(-len(axis.labels) // _MOST_LABELS)
        shown = axis.labels[::every]
        turned = horizontal and sum(map(len, shown)) > 3.2 * _MOST_LABELS
        ticked.set_ticks(range(0, len(axis.labels), every), list(shown), rotation=90 if turned else 0)
    elif axis.ticks:
        ticked.set_ticks(axis.ticks, [f"{value:g}" for value in axis.ticks])
        ticked.set_ticks([], minor=True)
    elif axis.whole:
        ticked.set_major_locator(MaxNLocator(integer=True))
    if axis.low is None and axis.high is None:
        return
    group = (axes.get_shared_x_axes() if horizontal else axes.get_shared_y_axes()).get_siblings(axes)
    spans = [one.dataLim.intervalx if horizontal else one.dataLim.intervaly for one in group]
    low = None if axis.low is None else min([axis.low, *(span[0] for span in spans)])
    high = None if axis.high is None else max([axis.high, *(span[1] for span in spans)])
    axes.set_xlim(low, high) if horizontal else axes.set_ylim(low, high)


def _legends(chart: Chart, axes: Sequence[Axes], figure: Figure, *, given: bool) -> None:
    """Legends beside the data, never on it; on axes that were given they lie inside, where there is room."""
    pairs = list(zip(chart.panels, axes, strict=True))
    if chart.legend == "none":
        return
    if given:
        for panel, one in pairs[: None if chart.legend == "each" else 1]:
            _inside(panel, one)
    elif chart.legend == "right":
        found: dict[str, Any] = {}
        for one in axes:
            handles, labels = one.get_legend_handles_labels()
            found |= {label: each for label, each in zip(labels, handles, strict=True) if label not in found}
        title = chart.panels[0].legend or None
        figure.legend(list(found.values()), list(found), loc="outside right center", fontsize=10, title=title)
    else:
        lines = [_under(panel, one, 72 * chart.size[0]) for panel, one in pairs]
        rows = [max(lines[k : k + chart.columns]) for k in range(0, len(lines), chart.columns)]
        figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + sum(rows) * _LINE / 72)


def _under(panel: Panel, axes: Axes, width: float) -> int:
    """A legend under the axis, for a panel ``width`` points wide; how many lines it has."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return 0
    longest = max(map(len, labels)) * _LETTER + _KEY
    columns = max(1, min(len(labels), int(0.9 * width / longest)))
    # What stands between the axis and the legend: ticks with their labels, and the axis's label.
    ticks = [text.get_text() for text in axes.get_xticklabels()] if panel.x.labels else []
    turned = ticks and axes.get_xticklabels()[0].get_rotation()
    size = mpl.rcParams["font.size"]
    tall = 0.72 * size * max(map(len, ticks)) if turned else 1.2 * size
    below = 11 + tall + 1.3 * size * (1 + axes.get_xlabel().count("\n"))
    figure = figure_of([axes])
    place = axes.transAxes + ScaledTranslation(0, -below / 72, figure.dpi_scale_trans)
    where: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": place}
    axes.legend(handles, labels, fontsize=_SMALL, ncols=columns, borderaxespad=0, borderpad=0, **where)
    return -(-len(labels) // columns)


def _inside(panel: Panel, axes: Axes, at: Any = "best") -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 1 + len(handles) // 7 if panel.legend else 1
        axes.legend(handles, labels, title=panel.legend, fontsize=_SMALL, loc=at, ncols=columns)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` to ``path`` as PNG at 150 dpi, atomically."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write_bytes(path, picture.getbuffer())
