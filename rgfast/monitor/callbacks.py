"""Callbacks of trainers, made when they are asked for: their packages need not be installed."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from rgfast.monitor.watching import Monitor

__all__ = ["lightning_callback", "transformers_callback"]

_LIGHTNING = ("lightning.pytorch", "pytorch_lightning")


def transformers_callback(monitor: Monitor) -> Any:
    """See :meth:`Monitor.transformers_callback`."""
    if find_spec("transformers") is None:
        raise ImportError("transformers_callback needs transformers, which is not installed")
    base: Any = import_module("transformers").TrainerCallback

    class MonitorCallback(base):  # type: ignore[misc]
        """Measures a fixed batch as Trainer's steps go."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            monitor.step(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            monitor.step(state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _last(monitor, state.global_step)

    return MonitorCallback()


def lightning_callback(monitor: Monitor) -> Any:
    """See :meth:`Monitor.lightning_callback`."""
    # The one that is in use, if both are installed.
    names = sorted(_LIGHTNING, key=lambda name: name not in sys.modules)
    name = next((n for n in names if find_spec(n.partition(".")[0]) is not None), None)
    if name is None:
        raise ImportError("lightning_callback needs lightning or pytorch_lightning, and neither is installed")
    base: Any = import_module(name).Callback

    class MonitorCallback(base):  # type: ignore[misc]
        """Measures a fixed batch as Lightning's steps go."""

        def on_train_start(self, trainer: Any, module: Any) -> None:
            monitor.step(trainer.global_step)

        def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
            monitor.step(trainer.global_step)

        def on_train_end(self, trainer: Any, module: Any) -> None:
            _last(monitor, trainer.global_step)

    return MonitorCallback()


def _last(monitor: Monitor, step: int) -> None:
    """Measure the last step, if it was not."""
    if monitor.last != step:
        monitor.measure(step)
