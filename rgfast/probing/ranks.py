"""The processes ("ranks") of one probe: who is alive, what each says, and arrays from one to another."""

from __future__ import annotations

import datetime
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["RankError", "Ranks"]

_PIECE = 64 << 20
_RUNNING, _DONE, _FAILED = 0, 1, 2
# What gloo and NCCL say where a collective has lost a rank.
_OF_CONNECTION = r"gloo|nccl|connection (closed|reset)"


class RankError(RuntimeError):
    """Another rank of a distributed probe died, hangs or raised; the message says which, and what it said."""


class Ranks:
    """All ranks of one probe, seen from one of them.

    A thread gives a sign of life about once a second and looks for those of the others. A rank that has given
    none for ``timeout`` seconds counts as dead; :meth:`check`, and everything that waits, then raises
    :class:`RankError`. It starts with the object and ends with :meth:`close`, :meth:`fail` or :meth:`leave`.
    ``members`` are the numbers that all ranks have in the default process group.
    """

    def __init__(self, store: Any, rank: int, members: Sequence[int], timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, len(members), timeout
        self.members = tuple(members)
        self._store, self._clone = store, store.clone()
        self._interval = min(1.0, timeout / 10)
        self._trouble: str | None = None
        self.dead = False  # whether a rank has gone without a word
        self.said = ""  # what this rank told the others that it failed of
        self._end = threading.Event()
        self._lines: Any = None
        self.sent = self.received = 0  # bytes of arrays
        self._rounds = 0
        self._aside = store.clone()  # for what waits beside other calls: swaps in their thread, connecting
        self._ending: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._watch, name="rgfast-ranks", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise :class:`RankError` where another rank has died or failed."""
        if self._trouble is not None:
            raise RankError(self._trouble)

    def round(self) -> str:
        """A new name, the same on every rank, for what is exchanged next."""
        self._rounds += 1
        return str(self._rounds)

    def gather(self, name: str, value: Any) -> list[Any]:
        """What every rank gave under ``name``, as JSON gives it back, in the order of ranks."""
        with self._talking():
            return self._gathered(self._store, name, value)

    def post(self, name: str, value: bytes = b"") -> None:
        """Put up a value under ``name``, for any rank to read."""
        with self._talking():
            self._store.set(name, value)

    def posted(self, name: str) -> bytes:
        """What some rank puts up under ``name``, which is waited for."""
        with self._talking():
            self._wait_for(name)
            found: bytes = self._store.get(name)
            return found

    def until(self, name: str, over: Callable[[], bool]) -> bool:
        """True once a rank has put up something under ``name``, False once it is ``over`` without."""
        pauses = _pauses(0.02)
        while True:
            # Read first, then asked: what was put up before a rank failed, or it was over, is seen.
            trouble, ended = self._trouble, over()
            with self._talking():
                if self._store.check([name]):
                    return True
            if ended:
                return False
            if trouble is not None and not self._end.is_set():
                raise RankError(trouble)
            time.sleep(next(pauses))

    def count(self, name: str, more: int = 0) -> int:
        """The sum of what all ranks have counted under ``name``, after ``more``."""
        with self._talking():
            return int(self._store.add(name, more))

    def send(self, name: str, to: int, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Hand ``arrays`` to another rank, which calls :meth:`receive` with the same name."""
        spec = [[key, value.dtype.str, list(value.shape)] for key, value in arrays.items()]
        with self._talking():
            self._store.set(f"{name}/offer", json.dumps(spec))
            self._wait_for(f"{name}/accept")
            for value in arrays.values():
                for piece in _pieces(np.ascontiguousarray(value)):
                    self._line().send([piece], to, 0).wait()
                self.sent += value.nbytes

    def receive(self, name: str, source: int) -> dict[str, np.ndarray[Any, Any]]:
        """What another rank hands to this one under ``name``."""
        out = {}
        with self._talking():
            self._wait_for(f"{name}/offer")
            spec = json.loads(self._store.get(f"{name}/offer"))
            self._store.set(f"{name}/accept", "")
            for key, kind, shape in spec:
                out[key] = np.empty(shape, dtype=np.dtype(kind))
                for piece in _pieces(out[key]):
                    self._line().recv([piece], source, 0).wait()
                self.received += out[key].nbytes
        return out

    def swap(
        self,
        name: str,
        value: Any,
        out: Tensor,
        sizes: Sequence[int],
        met: Callable[[list[Any], int], None],
    ) -> tuple[Tensor, list[int]]:
        """Hand ``sizes[r]`` bytes of ``out`` to every rank r, one after the other there; what all hand to
        this one, in the order of ranks, and how many bytes each. For one thread beside all other calls.

        ``met`` is given what every rank said (its ``value``), and how many bytes come, once all are here. A
        rank that ends before that calls it off for all; after it all of them swap.
        """
        with self._talking():
            try:
                given = self._gathered(self._aside, f"{name}/size", [value, list(sizes)])
            except BaseException:
                self._aside.set(f"{name}/goes/{self.rank}", "no")
                raise
            coming = [sizes[self.rank] for _, sizes in given]
            met([value for value, _ in given], sum(coming))
            self._aside.set(f"{name}/goes/{self.rank}", "yes")
            self._all_go(name)
            into = torch.empty(sum(coming), dtype=torch.uint8, device="cpu")
            if any(
                size for rank, (_, sizes) in enumerate(given) for to, size in enumerate(sizes) if to != rank
            ):
                self._line().alltoall_base(into, out, coming, list(sizes)).wait()
                self.sent += len(out)
                self.received += len(into)
            return into, coming

    def at_end(self, work: Callable[[], None]) -> None:
        """Have ``work()`` done when this rank stops, before its connections close."""
        self._ending.append(work)

    def connect(self) -> None:
        """Open the connections that :meth:`send` uses, once; all ranks at the same time."""
        with self._talking():
            self._line()

    def close(self) -> None:
        """Say that this rank has all it needs, wait until all say so (or fail), and stop."""
        self._say(_DONE)
        while self._trouble is None and not self._all_done():
            time.sleep(0.01)
        self._stop()

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank raised ``error``, and stop."""
        if self._end.is_set():
            return
        said = str(error) if isinstance(error, RankError) else f"{type(error).__name__}: {error}"
        text = said if isinstance(error, RankError) else f"rank {self.rank} of {self.size} failed: {said}"
        self.said = text
        self._say(_FAILED, text)
        if self.rank == 0:
            time.sleep(3 * self._interval)  # time to read it: with this process the store may go
        self._stop()

    def lost(self, error: BaseException) -> RankError | None:
        """What befell another rank, if ``error`` is of a collective that it left. Waits until it is known."""
        if not isinstance(error, RuntimeError) or isinstance(error, RankError):
            return None
        if not re.search(_OF_CONNECTION, str(error), re.IGNORECASE):
            return None
        end = time.monotonic() + self.timeout + 3 * self._interval
        while self._trouble is None and time.monotonic() < end:
            time.sleep(self._interval)
        return RankError(self._trouble or _lost(error))

    def all_gone(self) -> bool:
        """Whether all other ranks have ended this probe."""
        return all(self.count(f"state/{rank}") != _RUNNING for rank in range(self.size) if rank != self.rank)

    def leave(self) -> None:
        """Stop; where nothing was said before, tell the others that no result will be read here."""
        if not self._end.is_set():
            self.fail(RankError(f"rank {self.rank} of {self.size} left the probe before its end"))

    def _say(self, state: int, text: str = "") -> None:
        try:
            self._store.set(f"said/{self.rank}", text)
            self._store.add(f"state/{self.rank}", state)
        except RuntimeError:
            pass  # the store went with its process: there is nobody left to tell

    def _stop(self) -> None:
        self._end.set()
        if self._thread is not threading.current_thread():
            self._thread.join(self.timeout)
        for work in self._ending:
            work()
        self._ending.clear()
        self._lines = None

    def _all_done(self) -> bool:
        try:
            return all(self._store.add(f"state/{rank}", 0) != _RUNNING for rank in range(self.size))
        except RuntimeError:
            return True

    def _watch(self) -> None:
        looked = time.monotonic()
        others = [rank for rank in range(self.size) if rank != self.rank]
        last = dict.fromkeys(others, (0, looked))
        while not self._end.is_set():
            before, looked = looked, time.monotonic()
            if looked - before > self.timeout / 2:  # this process was held up, and perhaps its machine
                last = {rank: (count, looked) for rank, (count, _) in last.items()}
            try:
                self._clone.add(f"beat/{self.rank}", 1)
                for rank in others:
                    count, now = self._clone.add(f"beat/{rank}", 0), time.monotonic()
                    if count != last[rank][0]:
                        last[rank] = (count, now)
                    state = self._clone.add(f"state/{rank}", 0)
                    if state == _FAILED:
                        self._trouble = self._clone.get(f"said/{rank}").decode()
                        return
                    if state == _RUNNING and now - last[rank][1] > self.timeout:
                        self.dead = True
                        self._trouble = self._missing(rank, begun=last[rank][0] > 0)
                        return
            except RuntimeError as error:
                self.dead = True
                self._trouble = _lost(error)
                return
            self._end.wait(self._interval)

    def _missing(self, rank: int, *, begun: bool) -> str:
        who = f"rank {rank} of {self.size}"
        if not begun:
            return (
                f"{who} has not begun this probe within timeout={self.timeout:g} s: every rank must call it "
                "(distributed=False probes on one rank alone)"
            )
        return (
            f"{who} has given no sign of life for timeout={self.timeout:g} s: it has died or hangs; "
            "checkpoints, where asked for, are good, and the same call on all ranks goes on from them"
        )

    def _gathered(self, store: Any, name: str, value: Any) -> list[Any]:
        store.set(f"{name}/{self.rank}", json.dumps(value))
        for rank in range(self.size):
            self._wait_for(f"{name}/{rank}", store)
        return [json.loads(store.get(f"{name}/{rank}")) for rank in range(self.size)]

    def _all_go(self, name: str) -> None:
        """Wait until no rank can call a swap off any more. Raises RankError if one has."""
        end = None
        for rank in range(self.size):
            pauses = _pauses(0.1)
            while not self._aside.check([f"{name}/goes/{rank}"]):
                # A rank that lives says one or the other, and of its death nobody tells once this one ends.
                if end is None and (self._end.is_set() or self._trouble is not None):
                    end = time.monotonic() + self.timeout
                if self.dead or (end is not None and time.monotonic() > end):
                    raise RankError(self._trouble or _lost(RuntimeError("no answer")))
                time.sleep(next(pauses))
            if self._aside.get(f"{name}/goes/{rank}") != b"yes":
                self._end.wait(2 * self._interval)  # until it is known why
                raise RankError(self._trouble or f"rank {rank} of {self.size} left the probe before its end")

    def _wait_for(self, key: str, store: Any = None) -> None:
        pauses = _pauses(0.1)
        store = self._store if store is None else store
        while not store.check([key]):
            self.check()
            if store is self._aside and self._end.is_set():
                raise RankError(f"rank {self.rank} of {self.size} left the probe before its end")
            time.sleep(next(pauses))

    def _line(self) -> Any:
        if self._lines is None:
            from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo

            limit = datetime.timedelta(seconds=self.timeout)
            self._lines = ProcessGroupGloo(PrefixStore("lines", self._aside), self.rank, self.size, limit)
        return self._lines

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Turn what torch.distributed raises for a lost peer into one message."""
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            self._end.wait(2 * self._interval)  # if a rank has said what happened, that is what is wanted
            self.check()
            raise RankError(_lost(error)) from error


def _pauses(longest: float) -> Iterator[float]:
    """Seconds to sleep between looks at the store, more each time up to ``longest``."""
    pause = 0.001
    while True:
        yield pause
        pause = min(1.5 * pause, longest)


def _lost(error: BaseException) -> str:
    return (
        f"the connection between the ranks broke, so one of them has ended ({str(error).splitlines()[0]}); "
        "checkpoints, where asked for, are good, and the same call on all ranks goes on from them"
    )


def _pieces(value: np.ndarray[Any, Any]) -> Iterator[Tensor]:
    """The bytes of a contiguous array, as tensors that share its memory."""
    if value.size:
        whole = torch.from_numpy(value.reshape(-1).view(np.uint8))
        yield from torch.split(whole, _PIECE)
