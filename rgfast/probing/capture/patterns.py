"""Options that may be given by pattern of layer names, as ``{"encoder.*": "N T D"}``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

__all__ = ["beside", "by_layer"]


def by_layer(option: str, asked: Any, names: Sequence[str], default: Any = None) -> list[tuple[str, Any]]:
    """For each layer the first pattern that it matches, and what was asked with it.

    Without patterns that is ``asked`` for all layers, and ``default`` for a layer that matches none; the
    pattern is then empty. Raises ValueError for a pattern that no layer matches.
    """
    if not isinstance(asked, Mapping):
        return [("", asked)] * len(names)
    for pattern in asked:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{option}: no layer matches {pattern!r}, the layers are {', '.join(names)}")
    every = {"": default, **asked}
    found = [next((p for p in asked if fnmatchcase(name, p)), "") for name in names]
    return [(pattern, every[pattern]) for pattern in found]


def beside(name: str) -> str:
    """A pattern of the layers beside ``name``, if it is numbered."""
    return re.sub(r"(^|\.)\d+(:input|#\d+)*$", r"\1*", name)
