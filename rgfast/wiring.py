"""Functions that a package lends to one below it, imported when they are first called.

Imports point one way: a probe's result knows nothing of figures. Its methods that draw ask here for a
function by name, and :mod:`rgfast`, which is above every package, says which module has it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["lend", "lent"]

_LENT: dict[str, str] = {}


def lend(module: str, *names: str) -> None:
    """Register the functions ``names`` of ``module``, which is not imported yet."""
    _LENT.update(dict.fromkeys(names, module))


def lent(name: str) -> Callable[..., Any]:
    """The function registered as ``name``. Raises LookupError for an unknown one."""
    if name not in _LENT:
        raise LookupError(f"name must be one of {', '.join(sorted(_LENT))}, got {name!r}")
    function: Callable[..., Any] = getattr(import_module(_LENT[name]), name)
    return function
