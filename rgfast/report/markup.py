"""HTML that escapes by construction: whatever is not markup already is text."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

__all__ = ["Markup", "bullets", "join", "table", "tag"]


class Markup(str):
    """Text that is HTML already. Everything else is escaped where it is put into a tag."""

    __slots__ = ()


def _text(value: object) -> str:
    return value if isinstance(value, Markup) else html.escape(str(value))


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """One element. A trailing underscore in an attribute's name is dropped, other underscores are hyphens.

    >>> tag("p", "1 < 2 & ", tag("b", "'"), class_='"x"')
    '<p class="&quot;x&quot;">1 &lt; 2 &amp; <b>&#x27;</b></p>'
    """
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{told}>{''.join(_text(child) for child in children)}</{name}>")


def join(parts: Iterable[object]) -> Markup:
    """The parts one after another."""
    return Markup("".join(_text(part) for part in parts))


def bullets(items: Sequence[object]) -> Markup:
    """A list, or nothing without items."""
    return tag("ul", *(tag("li", item) for item in items)) if items else Markup("")


def table(
    heads: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    caption: object = "",
    words: Iterable[int] = (),
    stack: bool = False,
) -> Markup:
    """A table that scrolls sideways by itself, and says so where it is wider than the page.

    Columns ``words`` wrap; ``stack``: one cell per line on a phone.
    """
    wide = set(words)

    def cell(k: int, content: object) -> Markup:
        if k in wide:
            return tag("td", content, class_="words", data_head=heads[k])
        return tag("td", content, class_="tight")

    head = tag("thead", tag("tr", *(tag("th", each, scope="col") for each in heads)))
    body = tag("tbody", *(tag("tr", *(cell(k, each) for k, each in enumerate(row))) for row in rows))
    whole = tag("table", head, body, **({"class_": "stack"} if stack else {}))
    above = tag("p", caption, class_="caption") if caption else ""
    label = str(caption) or ", ".join(str(each) for each in heads)
    hint = tag("p", "This table scrolls sideways →", class_="hint", hidden="")
    scroll = tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=label)
    return join((above, hint, scroll))
