"""The specification of a figure, built once from data, for matplotlib (canvas.py) and a page (page.js)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Axis", "Chart", "Heat", "Panel", "Rule", "Series", "as_json", "heat_panel"]

Array = NDArray[np.float64]
_SHAPES = {"s": "square", "D": "diamond", "P": "diamond", "*": "diamond", "^": "triangle", "v": "triangle"}
_DASHES = {"-": None, "--": "6 4", ":": "2 3", "-.": "7 3 2 3"}


@dataclass(frozen=True)
class Axis:
    """An axis: ``name`` is what a value on it is called, ``label`` is written beside it (default: the name).

    ``labels`` name the places 0, 1, 2, … of an axis without numbers. ``low`` and ``high`` are values that the
    axis reaches at least, ``ticks`` the only ones with a tick; if ``whole``, only whole numbers have one.
    """

    name: str
    label: str = ""
    log: bool = False
    whole: bool = False
    low: float | None = None
    high: float | None = None
    labels: tuple[str, ...] | None = None
    ticks: tuple[float, ...] | None = None


@dataclass(frozen=True, eq=False)
class Series:
    """Points ``x``, ``y`` with one style, joined by a line unless ``line`` is off; NaN leaves a gap.

    ``members[m, x]`` are single curves with names ``each`` whose mean is ``y``, drawn as points beside it.
    ``low`` and ``high`` are the ends of error bars, which ``spread`` names. ``note`` is a number that belongs
    to the name, and ``texts`` (by point) and ``facts`` (of all) are what a page says of a value. Series of a
    ``group`` share an entry of the legend. ``color`` is ``"ink"`` for black on white and white on black;
    ``marker`` is matplotlib's, or empty for a line without.
    """

    name: str
    x: Array
    y: Array
    color: str
    line: bool = True
    members: Array | None = None
    each: tuple[str, ...] = ()
    low: Array | None = None
    high: Array | None = None
    spread: str = "interval"
    note: str = ""
    texts: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    group: str = ""
    marker: str = ""
    dash: str = "-"
    width: float = 2.0
    size: float = 3.5
    faint: bool = False
    open: bool = False
    halo: bool = False


@dataclass(frozen=True)
class Rule:
    """A level line across a panel; without a name it has no entry in a legend."""

    name: str
    y: float
    dash: str = "-"
    color: str = "ink"


@dataclass(frozen=True, eq=False)
class Heat:
    """Cells ``values[row, column]`` colored from ``low`` to ``high``; NaN is blank.

    ``counts`` (by column) and ``facts`` are what a page says of a cell; ``above`` is written over the columns
    of a file.
    """

    values: Array
    low: float
    high: float
    name: str
    label: str = ""
    counts: Array | None = None
    facts: tuple[str, ...] = ()
    above: tuple[str, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes. ``note`` says how much data is behind it; ``legend`` is the title of its legend."""

    x: Axis
    y: Axis
    title: str = ""
    series: tuple[Series, ...] = ()
    rules: tuple[Rule, ...] = ()
    heat: Heat | None = None
    note: str = ""
    legend: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure. ``title`` and ``caption`` stand over it on a page, ``heading`` over it in a file.

    Panels have the axes in common that are ``shared`` (``"y"``, ``"xy"``). The rest lays out a file: ``size``
    of a panel in inches, one color bar or one each, and ``legend``: one under ``"each"`` panel, one for all
    to the ``"right"``, or ``"none"``.
    """

    title: str
    caption: str
    panels: tuple[Panel, ...]
    heading: str = ""
    columns: int = 3
    size: tuple[float, float] = (4.6, 3.6)
    shared: str = ""
    one_bar: bool = False
    legend: str = "each"


def heat_panel(
    values: Array,
    *,
    name: str,
    x: tuple[str, Sequence[object]],
    y: tuple[str, Sequence[object]],
    limits: tuple[float, float] | None = None,
    label: str = "",
    counts: Array | None = None,
    facts: Sequence[str] = (),
    above: Sequence[str] = (),
    **more: Any,
) -> Panel:
    """A panel with ``values[row, column]`` as cells; ``x`` and ``y`` are an axis's name and its labels.

    ``limits`` of the colors are those of the finite values by default; ``more`` are fields of the panel.
    """
    good = values[np.isfinite(values)]
    low, high = limits or ((float(good.min()), float(good.max())) if good.size else (0.0, 1.0))
    across, up = (Axis(each, labels=tuple(str(value) for value in labels)) for each, labels in (x, y))
    heat = Heat(values, low, high, name, label or name, counts, tuple(facts), tuple(above))
    return Panel(across, up, heat=heat, **more)


def as_json(panel: Panel) -> dict[str, Any]:
    """``panel`` as ``page.js`` reads it: lists and dicts without what has its default."""
    return _given(
        title=panel.title,
        x=_axis(panel.x),
        y=_axis(panel.y),
        series=[one for series in panel.series for one in _series(series)],
        rules=[_given(name=r.name, y=r.y, dash=_DASHES[r.dash], color=r.color) for r in panel.rules],
        heat=None if panel.heat is None else _heat(panel.heat),
    )


def _given(**entries: Any) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if value is not None and value is not False}


def _axis(axis: Axis) -> dict[str, Any]:
    return _given(**{**vars(axis), "label": axis.label or axis.name})


def _series(series: Series) -> list[dict[str, Any]]:
    style = {
        "name": series.name,
        "color": series.color,
        "group": series.group or None,
        "shape": _SHAPES.get(series.marker),
        "facts": ([series.note] if series.note else []) + list(series.facts),
    }
    spread = None if series.low is None else series.spread
    points = _points(series.x, series.y, series.low, series.high, series.texts)
    drawn = _given(
        **style,
        line=series.line,
        points=points,
        spread=spread,
        dash=_DASHES[series.dash],
        width=series.width,
        size=None if series.faint else series.size,
        faint=series.faint,
        open=series.open,
        halo=series.halo,
    )
    if series.members is None or len(series.members) < 2:
        return [drawn]
    texts = [name for name in series.each for _ in series.x]
    along = np.tile(series.x, len(series.members))
    return [
        drawn,
        _given(**style, points=_points(along, series.members.ravel(), None, None, texts), faint=True),
    ]


def _points(
    x: Array, y: Array, low: Array | None, high: Array | None, texts: Sequence[str]
) -> list[list[Any]]:
    points: list[list[Any]] = [[float(a), float(b)] for a, b in zip(x, y, strict=True)]
    if low is not None and high is not None:
        for point, ends in zip(points, zip(low, high, strict=True), strict=True):
            point += map(float, ends)
    if texts:
        for point, text in zip(points, texts, strict=True):
            point += [None] * (4 - len(point)) + [text]
    return points


def _heat(heat: Heat) -> dict[str, Any]:
    return _given(
        values=heat.values.tolist(),
        low=heat.low,
        high=heat.high,
        name=heat.name,
        facts=list(heat.facts),
        counts=None if heat.counts is None else heat.counts.tolist(),
    )
