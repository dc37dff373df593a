"""One self-contained HTML page: what is put in is escaped, what it needs is inside, nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from rgfast.files import plain
from rgfast.report.definitions import HINT
from rgfast.report.markup import Markup, join, table, tag
from rgfast.report.palette import ramp
from rgfast.report.spec import Chart, as_json

__all__ = ["Page", "as_rows"]


class Page:
    """A page that grows by sections and figures; :meth:`render` gives its HTML.

    It starts with the ``title`` and a paragraph for each part of the ``lead``.
    """

    def __init__(self, title: str, *lead: object) -> None:
        self.title = title
        self._parts: list[Markup] = [tag("h1", title), *(tag("p", each, class_="lead") for each in lead)]
        self._figures: list[dict[str, Any]] = []

    def heading(self, text: str, *, level: int = 2) -> None:
        self._parts.append(tag(f"h{level}", text))

    def add(self, *content: object) -> None:
        self._parts.append(join(content))

    def figure(self, title: str, caption: object, panels: Sequence[dict[str, Any]], shared: str = "") -> None:
        """An interactive figure; ``panels`` are what ``page.js`` reads, ``shared`` as in a chart."""
        name = f"figure-{len(self._figures)}"
        self._figures.append({"id": name, "panels": list(panels), "shared": shared})
        self._parts.append(tag("h3", title))
        self._parts.append(tag("figure", tag("figcaption", caption), tag("div", id=name), class_="chart"))

    def chart(self, chart: Chart) -> None:
        """An interactive figure with its title and caption."""
        self.figure(chart.title, chart.caption, [as_json(panel) for panel in chart.panels], chart.shared)

    def charts(self, heading: str, charts: Iterable[Chart]) -> None:
        """A section of interactive figures with their titles and captions."""
        self.heading(heading)
        self.add(tag("p", HINT, class_="faint"))
        for chart in charts:
            self.chart(chart)

    def render(self) -> str:
        """The whole page. Its policy lets the browser run this script alone, and load nothing."""
        room = files("rgfast.report")
        script = (room / "page.js").read_text(encoding="utf-8")
        style = (room / "page.css").read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
        head = (
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            tag("title", self.title),
            f"<style>{style}</style>",
        )
        drawn = _json({"ramp": ramp(), "figures": self._figures})
        silent = "The figures of this page are drawn by its own script, which is switched off."
        body = (
            tag("main", *self._parts),
            tag("noscript", tag("p", silent)),
            '<div id="tip" role="status" hidden></div>',
            f'<script type="application/json" id="figures">{drawn}</script>',
            f"<script>{script}</script>",
        )
        whole = f'<html lang="en"><head>{"".join(head)}</head>\n<body>{"".join(body)}</body></html>'
        return f"<!doctype html>\n{whole}\n"


def _json(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it closes one, NaN and inf are null."""
    text = json.dumps(_rounded(plain(value)), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _rounded(value: Any) -> Any:
    """``value`` (as :func:`rgfast.files.plain` made it) with the seven digits that a screen can show."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def as_rows(value: Mapping[str, Any], prefix: str = "") -> Markup:
    """Names and values of a nested mapping as a table; what is long is cut to a folded block."""
    rows: list[tuple[object, object]] = []

    def walk(part: Mapping[str, Any], before: str) -> None:
        for key, item in part.items():
            if isinstance(item, Mapping) and item:
                walk(item, f"{before}{key}.")
            else:
                rows.append((f"{before}{key}", _cell(item)))

    walk(value, prefix)
    return table(("entry", "value"), rows, words=(1,))


def _cell(item: Any) -> object:
    text = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
    if len(text) <= 200:
        return text
    return tag("details", tag("summary", f"{text[:60]}…"), tag("div", text, class_="code"))
