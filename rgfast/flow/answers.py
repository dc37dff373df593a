"""What a verdict is made of: two answers, the checks that they rest on, and quantities by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rgfast.flow.curves import Interval, paired_interval

__all__ = [
    "FORMAT",
    "Answer",
    "Check",
    "Quantity",
    "Status",
    "Thresholds",
    "Verdict",
    "quantity",
    "spread",
]

# Of verdict.json; 1 was that of rgfast 0.1, whose rules gave one answer.
FORMAT = "rgfast.verdict/2"

Status = Literal[
    "reproduced", "partial", "not reproduced",
    "supported", "not supported", "undecided",
    "valid", "refuted", "undertrained", "reported", "not measured",
]  # fmt: skip


@dataclass(frozen=True)
class Thresholds:
    """The bars of the verdicts; the defaults are the published ones.

    ``gap`` is asked of the default set-up, ``gap_elsewhere`` of any other.
    """

    captured: float = 0.90
    short_ratio: float = 0.85
    rise: float = 0.05
    gap: float = 0.25
    gap_elsewhere: float = 0.15
    long_ratio: float = 0.95
    modes: float = 0.25
    rest_share: float = 0.10
    rest_median: float = 0.05


@dataclass(frozen=True)
class Check:
    """One numbered condition: what was asked, what came, and whether it holds.

    ``seed`` is None for a check on all seeds together.
    """

    name: str
    value: float
    bar: str
    holds: bool
    seed: int | None = None


@dataclass(frozen=True)
class Answer:
    """One of the two answers on a finding: a word, one line of numbers, and the checks behind the word.

    ``claim`` is what the paper says in its own words, if the answer is on a reading of the numbers.
    """

    status: Status
    summary: str
    checks: tuple[Check, ...] = ()
    claim: str = ""


@dataclass(frozen=True)
class Quantity:
    """A number by seed, and its mean with an interval over seeds."""

    name: str
    by_seed: dict[str, float]
    pooled: Interval


@dataclass(frozen=True)
class Verdict:
    """A finding with its two answers: what the numbers are, and whether they mean what the paper reads there.

    ``as_stated`` is *reproduced*, *partial* or *not reproduced*; ``reading`` is *supported*, *not supported*
    or *undecided*, None for what is no finding (whether the stacks learned, what a control chain does).
    ``quantities`` are the numbers by seed and pooled, ``details`` those that have another form, ``beside`` is
    what other views say, in a line.
    """

    key: str
    title: str
    as_stated: Answer
    reading: Answer | None = None
    quantities: tuple[Quantity, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    beside: str = ""

    @property
    def status(self) -> Status:
        """The word of the first answer."""
        return self.as_stated.status

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Both answers, or the only one."""
        return (self.as_stated,) if self.reading is None else (self.as_stated, self.reading)

    def quantity(self, name: str) -> Quantity:
        """The quantity ``name``. Raises KeyError, naming the known ones, for another."""
        for found in self.quantities:
            if found.name == name:
                return found
        raise KeyError(f"name must be one of {', '.join(q.name for q in self.quantities)}, got {name!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def quantity(name: str, by_seed: Mapping[int, float]) -> Quantity:
    """The :class:`Quantity` of one value per seed."""
    values = {str(seed): float(value) for seed, value in by_seed.items()}
    return Quantity(name, values, paired_interval(list(values.values())))


def spread(values: Iterable[float], digits: int = 2) -> str:
    """The mean of the values that are defined and, of several, the smallest and the largest."""
    good = [value for value in values if math.isfinite(value)]
    if not good:
        return "undefined"
    mean = f"{sum(good) / len(good):.{digits}f}"
    return mean if len(good) == 1 else f"{mean} ({min(good):.{digits}f} to {max(good):.{digits}f})"
