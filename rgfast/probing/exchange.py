"""Messages from every rank to every other, round by round, on their way while the caller goes on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rgfast.probing.packing import Message
from rgfast.probing.ranks import Ranks

__all__ = ["Exchange"]


class _Flight:
    """A round on its way, in a thread of its own."""

    def __init__(self, ranks: Ranks, name: str, said: Any, out: Tensor, sizes: Sequence[int]) -> None:
        self._out: Tensor | None = out
        self._came: tuple[Tensor, list[int]] | None = None
        self._said: list[Any] = []
        self._error: BaseException | None = None
        self._met = threading.Event()
        self.nbytes = len(out)
        arguments = (ranks, name, said, sizes)
        self.thread = threading.Thread(target=self._go, args=arguments, name="rgfast-rows", daemon=True)
        self.thread.start()

    def _go(self, ranks: Ranks, name: str, said: Any, sizes: Sequence[int]) -> None:
        try:
            assert self._out is not None
            self._came = ranks.swap(name, said, self._out, sizes, self._meet)
        except BaseException as error:
            self._error = error
        finally:
            self.nbytes -= 0 if self._out is None else len(self._out)
            self._out = None
            self._met.set()

    def _meet(self, said: list[Any], coming: int) -> None:
        self._said = said
        self.nbytes += coming
        self._met.set()

    def said(self) -> list[Any]:
        self._met.wait()
        if not self._said:
            self.came()
        return self._said

    def came(self) -> tuple[Tensor, list[int]]:
        self.thread.join()
        if self._error is not None:
            raise self._error
        assert self._came is not None
        return self._came


class Exchange:
    """Rounds in which every rank hands a message to every other, and says something to all.

    One round is on its way at a time, beside whatever the caller does; all ranks start each of them. It ends
    with ``ranks``: nothing is on its way after that.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._name = ranks, f"rows/{ranks.round()}"
        self._rounds = 0
        self._flight: _Flight | None = None
        ranks.at_end(self._end)

    @property
    def pending(self) -> bool:
        """Whether a round has been started and not been read."""
        return self._flight is not None

    @property
    def nbytes(self) -> int:
        """Bytes on their way, in and out."""
        return 0 if self._flight is None else self._flight.nbytes

    def start(self, said: Any, messages: Sequence[Message | None]) -> None:
        """Begin a round with ``messages[r]`` to rank r, None to those that get nothing. The one before must
        have been read."""
        assert self._flight is None
        sizes = [0 if message is None else message.nbytes for message in messages]
        out, at = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu"), 0
        for message, size in zip(messages, sizes, strict=True):
            if message is not None:
                message.write(out[at : at + size])
            at += size
        self._rounds += 1
        self._flight = _Flight(self._ranks, f"{self._name}/{self._rounds}", said, out, sizes)

    def said(self) -> list[Any]:
        """What every rank says in the round on its way, as JSON gives it back. Waits until all have begun it.

        Raises RankError if one has died or failed.
        """
        assert self._flight is not None
        return self._flight.said()

    def finish(self) -> tuple[list[Any], list[tuple[int, Tensor]]]:
        """What every rank has said, and the messages that came, of bytes, each with its rank, in their order.
        Waits for them."""
        assert self._flight is not None
        flight = self._flight
        came, sizes = flight.came()
        self._flight, at, found = None, 0, []
        for rank, size in enumerate(sizes):
            if size:
                found.append((rank, came[at : at + size]))
            at += size
        return flight.said(), found

    def _end(self) -> None:
        if self._flight is not None:
            self._flight.thread.join(self._ranks.timeout)
            self._flight = None
