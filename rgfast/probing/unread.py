"""Checks of values that are on a device while a model runs: what they come to is read later, all at once."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rgfast.runtime.waiting import read, waits_for

__all__ = ["Unread"]

_LOOK_EVERY = 64


class Unread:
    """Counts of what is wrong, made while a model runs: at once on the CPU, elsewhere read every 64 batches
    and at the end."""

    def __init__(self) -> None:
        self._held: list[tuple[Tensor, Callable[[Tensor], str]]] = []
        self._batches = 0

    def check(self, counted: Tensor, said: Callable[[Tensor], str]) -> None:
        """Raise ValueError if ``said(counted)``, of the values on the host, is not empty: now or later."""
        if waits_for(counted.device):
            self._held.append((counted, said))
        elif text := said(counted):
            raise ValueError(text)

    def passed(self) -> None:
        """A batch is over. Looks at what 64 of them left."""
        self._batches += 1
        if self._batches >= _LOOK_EVERY:
            self.look()

    def look(self) -> None:
        """Raise ValueError for the first check that was not passed, and again whenever this is called."""
        counts = read([counted for counted, _ in self._held])
        for counted, (_, said) in zip(counts, self._held, strict=True):
            if text := said(counted):
                raise ValueError(text)
        self._held.clear()
        self._batches = 0
