"""One palette for every figure, in a PNG and on a page: a colour means the same thing everywhere.

ξ runs from warm (short) to blue (long); a view, a stage and a chain have their own colours, and a marker or
dash besides. All are told apart with a colour-vision deficiency (Okabe and Ito; Tol's muted scheme).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb

from rgfast.flow.stages import in_words

__all__ = [
    "BASELINE",
    "CONTROL",
    "CONTROLS",
    "KIND_COLOURS",
    "LIGHT",
    "STYLE",
    "VIEW_COLOURS",
    "VIEW_MARKERS",
    "depth_colours",
    "kind_colours",
    "ramp",
    "view_styles",
    "xi_colours",
]

CONTROL, DARK, LIGHT, MARKED = "#777777", "#404040", "#BBBBBB", "#AA3377"
POSTERIOR = "#44AA99"
MODE_COLOURS = ("#117733", "#88CC88")  # slow and fast modes of the own token, on visible rows
BASELINE: Any = (0, (1, 2))
HEAT = "viridis"
# Stages that are compared with: color, dash, marker of their seeds, and words.
CONTROLS = {
    "control_iid": (CONTROL, "--", "^", in_words("control_iid")),
    "control_permuted": (DARK, "-.", "D", in_words("control_permuted")),
}
VIEW_COLOURS = {
    "visible": "#009E73",
    "masked": "#AA4499",
    "position": "#444444",
    "pooled": "#B38F00",
    "mean_pooled": "#882255",
    "flattened": "#8C564B",
}
VIEW_MARKERS = {
    "visible": "o",
    "masked": "s",
    "position": "D",
    "pooled": "^",
    "mean_pooled": "v",
    "flattened": "P",
}
# What has no order (chains, rank definitions, targets): Tol's muted scheme, apart from both ends of ξ.
KIND_COLOURS = (
    "#332288", "#117733", "#CC6677", "#88CCEE", "#999933", "#882255", "#44AA99", "#DDCC77", "#AA4499",
)  # fmt: skip
DASHES = ("-", "--", ":", "-.")
SHAPES = ("o", "s", "^", "D", "v", "P")

_XI = (
    (0.5, "#8A2F00"),
    (1.0, "#D55E00"),
    (3.0, "#E69F00"),
    (5.0, "#56B4E9"),
    (7.0, "#0072B2"),
    (20.0, "#00314D"),
)
_APART = 0.25  # RGB distance below which two colours are too alike for one figure

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def _between(place: float, places: Sequence[float]) -> str:
    colours = np.array([to_rgb(colour) for _, colour in _XI])
    return to_hex(tuple(np.interp(place, places, colours[:, c]) for c in range(3)))


def xi_colours(xis: Iterable[float]) -> dict[float, str]:
    """Color of each correlation length, short warm and long blue.

    A length has the same colour in every figure, unless two of one figure would look alike: then they are
    spread evenly from vermillion to blue.

    >>> xi_colours([1.0, 7.0])
    {1.0: '#d55e00', 7.0: '#0072b2'}
    """
    ordered = sorted({float(xi) for xi in xis})
    places = [math.log(xi) for xi, _ in _XI]
    found = {xi: _between(math.log(xi), places) for xi in ordered}
    if any(math.dist(to_rgb(found[a]), to_rgb(found[b])) < _APART for a, b in pairwise(ordered)):
        spread = np.linspace(1, 4, len(ordered))  # from the second anchor to the fifth
        return {xi: _between(place, range(len(_XI))) for xi, place in zip(ordered, spread, strict=True)}
    return found


def kind_colours(names: Sequence[str]) -> dict[str, str]:
    """Color of each name, in their order, which says nothing more."""
    return {name: KIND_COLOURS[k % len(KIND_COLOURS)] for k, name in enumerate(names)}


def view_styles(views: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Color and marker of each view: its own, or one by one for those that ``rows=`` names.

    >>> view_styles(["pooled", "nouns"])
    {'pooled': ('#B38F00', '^'), 'nouns': ('#332288', 'o')}
    """
    others = [view for view in views if view not in VIEW_COLOURS]
    free = [color for color in KIND_COLOURS if color not in VIEW_COLOURS.values()]
    styles = {view: (VIEW_COLOURS[view], VIEW_MARKERS[view]) for view in views if view in VIEW_COLOURS}
    styles |= {view: (free[k % len(free)], SHAPES[k % len(SHAPES)]) for k, view in enumerate(others)}
    return styles


def depth_colours(layers: int) -> list[str]:
    """A color per layer, dark (input) to light (last)."""
    return [to_hex(colour) for colour in colormaps[HEAT](np.linspace(0, 0.9, layers))]


def ramp(steps: int = 64) -> list[str]:
    """The colours of every heat map, from low to high."""
    return [to_hex(colour) for colour in colormaps[HEAT](np.linspace(0, 1, steps))]
