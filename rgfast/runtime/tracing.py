"""Marks for torch's tracer, which is not imported for them: that takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["constant_when_traced"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def constant_when_traced(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function``, called once when a graph is traced, which then has its result as a constant.

    What ``torch.compiler.assume_constant_result`` does after importing the tracer.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
