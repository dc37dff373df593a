"""A probe's result as a small HTML table, for notebooks."""

from __future__ import annotations

import html

import numpy as np

from rgfast.probing.result import ProbeResult
from rgfast.report.parts import count_text

__all__ = ["as_html"]

_WIDTH, _HEIGHT = 120, 24
_HEADS = ("view", "n", "effective rank by layer", "first → last", "largest drift")


def as_html(result: ProbeResult) -> str:
    """A table: for each view its n, effective rank by layer as a line, first and last, and largest drift."""
    data = result.dataset
    head = html.escape(repr(result).splitlines()[0])
    rows = "".join(_row(result, view) for view in result.views)
    heads = "".join(f"<th style='text-align:left'>{name}</th>" for name in _HEADS)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in result.notes)
    layers = ", ".join(html.escape(name) for name in result.layers)
    return (
        f"<div><b>{head}</b><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        f"{notes}<details><summary>{data.sizes['layer']} layers</summary>{layers}</details></div>"
    )


def _row(result: ProbeResult, view: str) -> str:
    number = count_text(result, view)
    if result.sample_limited(view):
        number += " <i>(sample limited)</i>"
    cells = [html.escape(view), number, "", "", ""]
    if "effective_rank" in result.measures:
        values = np.asarray(result.order_parameter(view).values)
        cells[2], cells[3] = _line(values), f"{_text(values[0])} → {_text(values[-1])}"
    if "kernel_drift" in result.measures:
        drift = np.asarray(result.order_parameter(view, "kernel_drift").values)
        if np.isfinite(drift).any():
            worst = int(np.nanargmax(drift))
            cells[4] = f"{drift[worst]:.3g} at {worst}→{worst + 1}"
    return "<tr>" + "".join(f"<td style='text-align:left'>{cell}</td>" for cell in cells) + "</tr>"


def _text(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.4g}"


def _line(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str:
    top = np.nanmax(values) if np.isfinite(values).any() else 0.0
    if not top > 0:
        return ""
    step = (_WIDTH - 4) / max(1, len(values) - 1)
    points = " ".join(
        f"{2 + k * step:.1f},{_HEIGHT - 2 - (_HEIGHT - 4) * value / top:.1f}"
        for k, value in enumerate(values)
        if np.isfinite(value)
    )
    line = f"<polyline points='{points}' fill='none' stroke='currentColor' stroke-width='1.5'/>"
    return f"<svg width='{_WIDTH}' height='{_HEIGHT}' role='img'>{line}</svg>"
