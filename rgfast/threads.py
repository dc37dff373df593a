"""Library calls whose bits depend on the thread count run at a fixed one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread"]

_LOCK = threading.RLock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU operators on one thread inside the block, so that results do not depend on the count.

    The count is process-wide state of the libraries below torch, so Python threads take turns here.
    """
    with _LOCK:
        before = torch.get_num_threads()
        if before == 1:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
