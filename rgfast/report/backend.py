"""matplotlib, imported in a way that no ``MPLBACKEND`` can make fail.

A notebook's kernel sets it to its own module for every process that it starts, and matplotlib refuses to be
imported where that module is not installed. A backend that is installed is honored.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["new_axes"]


def _import_matplotlib() -> None:
    asked = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    if asked:
        with contextlib.suppress(ValueError):  # no backend of this environment: matplotlib chooses one
            matplotlib.rcParams["backend"] = asked


def new_axes(size: tuple[float, float]) -> Axes:
    """The axes of a new pyplot figure, or of a plain one if the chosen backend cannot be loaded."""
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    try:
        return pyplot.subplots(figsize=size, layout="constrained")[1]
    except ImportError:
        return Figure(figsize=size, layout="constrained").subplots()


_import_matplotlib()
