"""How is timed: contenders in turns in one process, medians, quartiles of the turn-by-turn ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

__all__ = ["Checked", "Contest", "Row", "WrongResult", "hold", "ratio", "run_contest", "threads", "turns"]

Call = Callable[[], object]


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


@dataclass(frozen=True)
class Contest:
    """One case: our call, and for each rival its variants, of which the fastest counts.

    ``checks`` are made on this very case, before it is timed.
    """

    case: str
    ours: Call
    rivals: Mapping[str, tuple[Call, ...]]
    checks: tuple[Callable[[], Checked], ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)


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
    _wait(device)
    names = list(candidates)
    spent: dict[str, list[float]] = {name: [] for name in names}
    until = time.perf_counter() + seconds
    turn = 0
    while turn < least or time.perf_counter() < until:
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            candidates[name]()
            _wait(device)
            spent[name].append(time.perf_counter() - start)
        turn += 1
    return spent


def ratio(over: list[float], under: list[float]) -> tuple[float, float, float]:
    """Median over median, with the quartiles of the ratio by turn."""
    each = [a / b for a, b in zip(over, under, strict=True)]
    low, _, high = statistics.quantiles(each, n=4, method="inclusive")
    return statistics.median(over) / statistics.median(under), low, high


def run_contest(
    benchmark: str, contest: Contest, seconds: float, *, impl: str, device: str = "cpu"
) -> list[Row]:
    """A row a rival. Raises WrongResult, before anything is timed, where a value is wrong."""
    for check in contest.checks:
        hold(check())
    calls = {"ours": contest.ours}
    for rival, variants in contest.rivals.items():
        calls |= {f"{rival} {k}": variant for k, variant in enumerate(variants)}
    spent = turns(calls, seconds, device=device)
    mine = spent["ours"]
    rows = []
    for rival, variants in contest.rivals.items():
        theirs = min((spent[f"{rival} {k}"] for k in range(len(variants))), key=statistics.median)
        times, low, high = ratio(theirs, mine)
        medians = statistics.median(mine), statistics.median(theirs)
        rows.append(Row(benchmark, contest.case, device, impl, rival, times, low, high, *medians))
    return rows


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
