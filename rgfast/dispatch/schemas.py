"""The schemas of operators that take a call apart."""

from __future__ import annotations

import typing
from typing import Any

from torch import Tensor

__all__ = ["schema"]

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    str | None: "str?",
    float: "float",
    int: "int",
    bool: "bool",
}


def schema(call: Any, before: str = "", after: str = "", returns: str = "Tensor") -> str:
    """The ``torch.library`` schema of an operator that takes the fields of a ``Call`` in their order.

    A ``Call`` that is a NamedTuple flattens to them by being one, and ``call._make`` goes back.
    """
    fields = [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in typing.get_type_hints(call).items()]
    return f"({', '.join(each for each in (before, *fields, after) if each)}) -> {returns}"
