"""Timing: contenders take turns in one process; medians and quartiles of the ratios by turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rgfast.dispatch import record

__all__ = [
    "Absent",
    "Call",
    "Checked",
    "Contest",
    "Row",
    "Size",
    "WrongResult",
    "hold",
    "on_one_thread",
    "ratio",
    "run_contest",
    "threads",
    "turns",
    "wait",
]

Call = Callable[[], object]
# "tiny" is for tests, which time nothing.
Size = Literal["tiny", "quick", "full"]


class Absent(Exception):
    """A rival cannot run here; the message says why."""


class WrongResult(Exception):
    """A value is further from the truth than allowed, so that its time means nothing; ``check`` is which."""

    def __init__(self, check: Checked) -> None:
        super().__init__(f"{check}; nothing is timed")
        self.check = check


@dataclass(frozen=True)
class Checked:
    """One value held against fp64 truth: its error and what was allowed."""

    name: str
    error: float
    allowed: float

    @property
    def good(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        sign = "<=" if self.good else "is more than"
        return f"{self.name}: error {self.error:.1e} {sign} {self.allowed:.0e}"


@dataclass(frozen=True, eq=False)
class Contest:
    """One case: its input, our call with its check, and the rivals. Nothing is computed until it is called.

    ``ours`` and the rivals take the input and return the call to time; an absent rival raises
    :class:`Absent`. ``ours`` and ``check`` also take the name of an implementation of ``op`` (only "auto" if
    that is None). With ``one_thread`` rivals run on one thread as well, and the faster counts: batched LAPACK
    is often faster so. ``size`` is that of :class:`rgfast.runtime.measured.Measured`.
    """

    case: str
    data: Callable[[], Any]
    ours: Callable[[Any, str], Call]
    check: Callable[[Any, str], Checked]
    rivals: Mapping[str, Callable[[Any], Call]]
    op: str | None = None
    one_thread: bool = False
    size: int | None = None


@dataclass(frozen=True)
class Row:
    """A rival's median time over ours, with the quartiles of the ratio by turn; times in seconds."""

    benchmark: str
    case: str
    device: str
    impl: str
    against: str
    times_faster: float
    low: float
    high: float
    seconds: float
    rival_seconds: float


def hold(check: Checked) -> None:
    """Raise WrongResult unless the check is good."""
    if not check.good:
        raise WrongResult(check)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch on ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def turns(
    candidates: Mapping[str, Call], seconds: float, *, least: int = 3, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each call of each candidate, in turns for about ``seconds`` (at least ``least`` turns).

    The order moves on by one from turn to turn: PyTorch's workers spin for a while after they are done, and
    hold up whoever comes next.
    """
    for run in candidates.values():
        run()
    wait(device)
    names = list(candidates)
    spent: dict[str, list[float]] = {name: [] for name in names}
    until = time.perf_counter() + seconds
    turn = 0
    while turn < least or time.perf_counter() < until:
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            candidates[name]()
            wait(device)
            spent[name].append(time.perf_counter() - start)
        turn += 1
    return spent


def ratio(over: list[float], under: list[float]) -> tuple[float, float, float]:
    """Median over median, with the quartiles of the ratio by turn."""
    each = [a / b for a, b in zip(over, under, strict=True)]
    low, _, high = statistics.quantiles(each, n=4, method="inclusive")
    return statistics.median(over) / statistics.median(under), low, high


def run_contest(
    benchmark: str,
    contest: Contest,
    seconds: float,
    *,
    device: str = "cpu",
    skip: Callable[[str, str], object] = lambda rival, why: None,
) -> list[Row]:
    """A row per rival; ``skip`` is called with the name of each absent one and the reason.

    Raises WrongResult, before anything is timed, if our value is wrong.
    """
    data = contest.data()
    hold(contest.check(data, "auto"))
    mine = contest.ours(data, "auto")
    with record() as log:
        mine()
    impl = ", ".join(sorted({entry.impl for entry in log})) or "torch"
    calls = {"ours": mine}
    variants: dict[str, list[str]] = {}
    for rival, make in contest.rivals.items():
        try:
            call = make(data)
        except Absent as error:
            skip(rival, str(error))
            continue
        calls[rival] = call
        variants[rival] = [rival]
        if contest.one_thread and torch.get_num_threads() > 1:
            calls[f"{rival}, one thread"] = on_one_thread(call)
            variants[rival].append(f"{rival}, one thread")
    spent = turns(calls, seconds, device=device)
    rows = []
    for rival, names in variants.items():
        theirs = min((spent[name] for name in names), key=statistics.median)
        times, low, high = ratio(theirs, spent["ours"])
        medians = statistics.median(spent["ours"]), statistics.median(theirs)
        rows.append(Row(benchmark, contest.case, device, impl, rival, times, low, high, *medians))
    return rows


def on_one_thread(call: Call) -> Call:
    """``call`` with torch on one thread."""

    def run() -> object:
        with threads(1):
            return call()

    return run


def wait(device: str) -> None:
    """Wait until the device has done what it was asked for."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
