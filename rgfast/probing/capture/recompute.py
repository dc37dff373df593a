"""Forwards that a backward runs again (activation checkpointing), and work that it does not see."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils import checkpoint
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

__all__ = ["Forwards"]


class Forwards:
    """Tells forwards from what a backward runs again to have its activations.

    A backward that is running already when this is made does not count: what an optimizer measures as soon as
    a gradient is there are forwards.
    """

    def __init__(self) -> None:
        self._within = _backward()

    def hook(self, hook: Callable[..., object]) -> Callable[..., None]:
        """``hook`` for forwards alone, without gradients, returning nothing."""

        @functools.wraps(hook)
        def called(*args: Any) -> None:
            if not self.run_again():
                with torch.no_grad(), _unseen():
                    hook(*args)

        return called

    def run_again(self) -> bool:
        """Whether a backward is running a forward again."""
        return _backward() not in (_NONE, self._within)


_NONE = -1


def _backward() -> int:
    """The number of the backward that runs on this thread, -1 for none."""
    number: int = torch._C._current_graph_task_id()
    return number


def _unseen() -> AbstractContextManager[object]:
    """A block in which selective checkpointing does not count operators, which a second run would repeat."""
    saving = checkpoint._CachingTorchDispatchMode
    if any(isinstance(mode, saving) for mode in _get_current_dispatch_mode_stack()):
        return _disable_current_modes()
    return nullcontext()
