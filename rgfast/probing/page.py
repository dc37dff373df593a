"""A probe's result as one self-contained HTML page: figures inside, nothing fetched."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rgfast.probing.html import as_html

if TYPE_CHECKING:
    from rgfast.probing.result import ProbeResult

__all__ = ["as_page"]

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "img{max-width:100%;height:auto}table{border-collapse:collapse;display:block;overflow-x:auto}"
    "td,th{padding:.2rem .8rem .2rem 0;vertical-align:middle}pre{white-space:pre-wrap}"
)


def as_page(result: ProbeResult) -> str:
    """The page: what was probed, its flow in words, a figure a measure that the result holds, provenance."""
    names = result.measures
    parts = [as_html(result)]
    if {"effective_rank", "kernel_drift"} <= set(names) and len(result.layers) > 1:
        told = "\n".join(str(result.flow(view)) for view in result.views)
        parts.append(f"<h2>Flow with depth</h2><pre>{html.escape(told)}</pre>")
    if "effective_rank" in names:
        parts.append(_figure("Effective rank by layer", lambda ax: result.plot_rank(ax=ax)))
    if "kernel_drift" in names and len(result.layers) > 1:
        parts.append(_figure("Kernel drift by transition", lambda ax: result.plot_drift(ax=ax)))
    if "cka" in names:
        parts.append(_figure("CKA between layers", lambda ax: result.plot_cka(ax=ax)))
    if result.views[0] != "flattened":
        parts.append(_figure("Singular values by layer", lambda ax: result.plot_spectra(ax=ax)))
    origin = html.escape(json.dumps(result.provenance, indent=2, ensure_ascii=False))
    parts.append(f"<h2>Provenance</h2><pre>{origin}</pre>")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>rgfast probe</title><style>{_STYLE}</style></head><body><h1>rgfast probe</h1>"
        + "".join(parts)
        + "</body></html>\n"
    )


def _figure(title: str, draw: Callable[[Axes], object]) -> str:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    draw(figure.subplots())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"<h2>{title}</h2><img alt='{title}' src='data:image/png;base64,{data}'>"
