"""What charts of probes and of experiments share: transitions, fits to a drift, spectra, row counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rgfast.probing.result import ProbeResult
from rgfast.report.extract import SMALLEST, drift_fits
from rgfast.report.palette import depth_colours
from rgfast.report.spec import Array, Axis, Series

__all__ = [
    "component_axis",
    "count_text",
    "fit_series",
    "layer_axis",
    "plain",
    "rows_text",
    "spectrum_series",
    "transition_axis",
]


def plain(name: str) -> str:
    """A view's or measure's name without underscores."""
    return name.replace("_", " ")


def count_text(result: ProbeResult, view: str) -> str:
    """How many rows a view's values are of: a number, or the fewest to the most if positions differ."""
    return rows_text(result.rows(view))


def rows_text(rows: tuple[int, int]) -> str:
    """The fewest and the most rows of any position as text."""
    fewest, most = rows
    return f"{fewest}" if fewest == most else f"{fewest}–{most}"


def layer_axis(layers: int, first: str) -> Axis:
    """The axis of layers; ``first`` says what layer 0 is."""
    return Axis("layer", f"layer (0 = {first})", whole=True, low=-0.3, high=layers - 0.7)


def transition_axis(transitions: int) -> Axis:
    """The axis of transitions between layers."""
    labels = tuple(f"{k}→{k + 1}" for k in range(transitions))
    return Axis("transition", "transition between layers", labels=labels, low=-0.35, high=transitions - 0.65)


def fit_series(drift: Array, first: int, color: str, of: str, facts: Sequence[str] = ()) -> list[Series]:
    """Both fits to ``drift``, which starts at transition ``first``; nothing if it has no shape."""
    fits = drift_fits(drift)
    if fits is None:
        return []
    shape = fits.shape
    places = " and ".join(f"{first + k}→{first + k + 1}" for k in shape.step_at)
    words = {"decay": f"{shape.decay_rate:.3g} per transition", "step": f"at {places}"}
    better = {"step + plateau": "step", "geometric decay": "decay", "growing": "decay"}.get(shape.word)
    series = []
    for kind, values, dash in (("decay", fits.decay, "--"), ("step", fits.step, ":")):
        note = words[kind] + (", better by BIC" if kind == better else "")
        x = np.arange(first, first + drift.size, dtype=float)
        fit = Series(f"{kind}, {of}", x, values, color, note=note, facts=tuple(facts), dash=dash)
        series.append(replace(fit, width=1.3, size=1.5))
    return series


def component_axis() -> Axis:
    """The axis of the components of a spectrum."""
    return Axis("component", whole=True)


def spectrum_series(mean: Array, facts: Sequence[str]) -> tuple[Series, ...]:
    """A line per layer of ``mean[layer, component]``, relative to the largest; rounding is left out."""
    colors, x = depth_colours(len(mean)), np.arange(1.0, mean.shape[1] + 1)
    return tuple(
        Series(
            f"layer {layer}",
            x,
            np.where(values > SMALLEST, values, np.nan),
            colors[layer],
            facts=tuple(facts),
            width=1.8,
            size=2.2,
        )
        for layer, values in enumerate(mean)
        if np.isfinite(values).any()
    )
