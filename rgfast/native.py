"""The compiled CPU module: loading it once, and saying why when it cannot be had."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from rgfast.dispatch import ImplUnavailable

__all__ = ["active_isa", "load", "unavailable_reason"]


@functools.cache
def _attempt() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("rgfast._native"), None
    except ImportError as error:
        return None, f"the native module is not importable ({error})"


def load() -> ModuleType:
    """The compiled module. Raises :class:`ImplUnavailable` where it is not built or does not load."""
    module, reason = _attempt()
    if module is None:
        raise ImplUnavailable(str(reason))
    return module


def unavailable_reason() -> str | None:
    """None where the compiled module loads, else the reason in words."""
    return _attempt()[1]


def active_isa() -> str | None:
    """The instruction set that compiled kernels use in this process (``RGFAST_ISA`` forces one)."""
    module, _ = _attempt()
    return None if module is None else str(module.active_isa())
