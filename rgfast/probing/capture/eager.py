"""Compiled models and modules run eagerly while they are watched, since compiled code calls no hooks."""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any

import torch

__all__ = ["eager_while"]

_lock = threading.RLock()  # a watcher can be collected while another one begins
_watching = 0
_stance: Any = None


def eager_while(watcher: object) -> weakref.finalize[..., Any] | None:
    """Let compiled code run eagerly until the result is called, or ``watcher`` is collected.

    torch has one stance for the whole process. The first watcher sets it and the last restores it, in
    whatever order they end: each on its own would put back what another one had set.
    """
    global _watching, _stance
    if "torch._dynamo" not in sys.modules:  # then nothing was compiled, and the import takes a second
        return None
    with _lock:
        _watching += 1
        try:
            if _watching == 1:
                _stance = torch.compiler.set_stance("force_eager")
        except BaseException:
            _watching -= 1
            raise
    end = weakref.finalize(watcher, _ended)
    end.atexit = False
    return end


def _ended() -> None:
    global _watching, _stance
    with _lock:
        _watching -= 1
        if not _watching:
            _stance.__exit__(None, None, None)
            _stance = None
