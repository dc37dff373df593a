"""The moments behind a result: they stay on the device that summed them up until somebody asks for them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

__all__ = ["LaterState", "bring"]

_WAITING: weakref.WeakSet[LaterState] = weakref.WeakSet()


class LaterState:
    """The arrays that ``state`` gives, copied to the host when this is first called; ``state`` is let go of
    then. Whoever changes what it would give calls this before.

    Pickling and deep copies ask for them.
    """

    def __init__(self, state: Callable[[], dict[str, np.ndarray[Any, Any]]], device: torch.device) -> None:
        self._state: Callable[[], dict[str, np.ndarray[Any, Any]]] | None = state
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}
        self._lock = threading.Lock()
        if device.type != "cpu":
            _WAITING.add(self)

    def __call__(self) -> dict[str, np.ndarray[Any, Any]]:
        with self._lock:
            if self._state is not None:
                self._arrays, self._state = self._state(), None
                _WAITING.discard(self)
        return self._arrays

    def __reduce__(self) -> Any:
        return _known, (self(),)


def _known(arrays: dict[str, np.ndarray[Any, Any]]) -> LaterState:
    return LaterState(lambda: arrays, torch.device("cpu"))


def bring() -> None:
    """Copy to the host what earlier results have left on devices, so that it does not pile up there."""
    for later in list(_WAITING):
        later()
