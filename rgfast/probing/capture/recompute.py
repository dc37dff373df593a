"""Runs of a model that are no forwards: what a backward runs again (activation checkpointing) or a pipeline
tries on empty tensors; and work that checkpointing does not see."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch.utils import checkpoint
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

__all__ = ["Forwards", "in_pipeline"]


class Forwards:
    """Tells forwards from what a backward runs again to have its activations, and from what a pipeline of
    ``torch.distributed.pipelining`` runs on empty tensors to know shapes.

    A backward that is running already when this is made does not count: what an optimizer measures as soon as
    a gradient is there are forwards.
    """

    def __init__(self) -> None:
        self._within = _backward()

    def hook(self, hook: Callable[..., object]) -> Callable[..., None]:
        """``hook`` for forwards alone, without gradients, returning nothing."""

        @functools.wraps(hook)
        def called(*args: Any) -> None:
            if not self.run_again() and not _for_shapes():
                with torch.no_grad(), _unseen():
                    hook(*args)

        return called

    def run_again(self) -> bool:
        """Whether a backward is running a forward again."""
        return _backward() not in (_NONE, self._within)


_NONE = -1
_STAGE = "torch.distributed.pipelining.stage"


def in_pipeline() -> bool:
    """Whether a stage of a pipeline is what runs."""
    return _STAGE in sys.modules and any(True for _ in _of_stage())


def _for_shapes() -> bool:
    # Memory that nothing was written to: what it holds may pass for activations.
    return _STAGE in sys.modules and any("inference" in name for name in _of_stage())


def _of_stage() -> Iterator[str]:
    """The functions of a pipeline's stage that are running, by name."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == _STAGE:
            yield frame.f_code.co_name
        frame = frame.f_back


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
