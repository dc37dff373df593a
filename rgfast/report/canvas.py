"""The axes that a figure is drawn on, new ones or the caller's, and what several figures draw alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from rgfast.files import write_atomically
from rgfast.report.extract import Array, DriftFits, mean_of
from rgfast.report.palette import HEAT, STYLE

__all__ = ["Canvas", "canvas", "draw_fits", "draw_heat", "draw_seeds", "save_figure", "styled"]

Canvas = Axes | Sequence[Axes] | None
P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """``draw`` under the style of every figure."""

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


def canvas(ax: Canvas, panels: int, *, columns: int, size: tuple[float, float], **options: Any) -> list[Axes]:
    """As many axes as there are ``panels``: those of ``ax``, or of a new figure with ``size`` a panel.

    Raises ValueError where ``ax`` has another number of axes.
    """
    if ax is not None:
        given = [ax] if isinstance(ax, Axes) else list(ax)
        if len(given) != panels:
            raise ValueError(f"ax must be {panels} axes, one a panel, got {len(given)}")
        return given
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.4))
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for spare in grid.flat[panels:]:
        spare.remove()
    return list(grid.flat[:panels])


def figure_of(axes: Sequence[Axes]) -> Figure:
    """The figure that the first of ``axes`` stands in."""
    found = axes[0].figure
    while isinstance(found, SubFigure):
        found = found.figure
    assert isinstance(found, Figure)
    return found


def draw_seeds(axes: Axes, x: Array, curves: Array, **style: Any) -> None:
    """The mean of ``curves[seed, layer]`` as a line and every seed as a point."""
    label, marker = style.pop("label"), style.pop("marker")
    axes.plot(x, mean_of(curves), label=label, **style)
    jitter = np.linspace(-0.08, 0.08, len(curves)) if len(curves) > 1 else np.zeros(1)
    for offset, values in zip(jitter, curves, strict=True):
        points = {"color": style["color"], "markersize": 4, "alpha": 0.55, "markeredgewidth": 0}
        axes.plot(x + offset, values, marker, **points)


def draw_fits(axes: Axes, x: Array, fits: DriftFits, colour: str) -> None:
    """Both descriptions of a drift, thin in its colour; the legend says which has the lower BIC."""
    first = int(x[0]) + fits.shape.plateau[0]
    chosen = fits.shape.preferred
    told = {
        "decay": f"decay, {fits.shape.decay_rate:.2f} a layer",
        "step": f"step, plateau from {first}→{first + 1}",
    }
    for kind, values, dash in (("decay", fits.decay, "--"), ("step", fits.step, ":")):
        label = told[kind] + (" (better)" if kind == chosen else "")
        axes.plot(x, values, dash, color=colour, linewidth=1.3, label=label)


def draw_heat(
    axes: Axes, values: Array, *, x: Sequence[object], y: Sequence[object], limits: tuple[float, float]
) -> Any:
    """``values[row, column]`` as cells, undefined ones blank, with at most a dozen labels an axis."""
    picture = axes.imshow(
        values, origin="lower", aspect="auto", cmap=HEAT, vmin=limits[0], vmax=limits[1], interpolation="none"
    )
    axes.grid(False)
    for along, labels in ((axes.xaxis, x), (axes.yaxis, y)):
        every = -(-len(labels) // 12)
        along.set_ticks(range(0, len(labels), every), [str(label) for label in labels[::every]])
    return picture


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` to ``path`` as PNG at 150 dpi, atomically."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
