"""A seeded sample of the rows of a view, for measures that compare every row with every other one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from rgfast.comparing.rows import Rows, end_to_end

__all__ = ["Sample"]


@dataclass
class _Held:
    """The rows of a sequence in an order of chance, of which the first ones are kept, and where each was."""

    key: float
    rows: Rows
    place: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, dtype=np.int64))


class Sample:
    """At most ``limit`` of the rows that come, and all of them if they are no more.

    Where they are more, every sequence keeps half its rows, drawn at random, as often as needed, down to one;
    then sequences are drawn. What is drawn depends on ``seed`` and the sequences alone, not on how they are
    cut into batches.
    """

    def __init__(self, limit: int, seed: int) -> None:
        self._limit, self._seed = limit, seed
        self._held: dict[int, _Held] = {}
        self._size = 0
        self.each: int | None = None  # rows of a sequence that are kept, None: all
        self._below = 1.0  # sequences with larger keys are out
        self.seen = 0

    @property
    def size(self) -> int:
        """How many rows are held."""
        return self._size

    def add(self, rows: Rows) -> None:
        """Add the rows of some sequences that were not there yet, in the order of their numbers."""
        self.seen += len(rows.sequence)
        numbers, counts = torch.unique_consecutive(rows.sequence, return_counts=True)
        ends = counts.cumsum(0).tolist()
        for number, end, count in zip(numbers.tolist(), ends, counts.tolist(), strict=True):
            generator = np.random.default_rng((self._seed, number))
            key = float(generator.random())
            if key > self._below:
                continue
            order = generator.permutation(count)[: self.each]
            at = torch.from_numpy(order + (end - count))
            self._held[number] = _Held(key, rows.at(at), order)
            self._size += len(order)
            while self._size > self._limit:
                self._shrink()

    def _shrink(self) -> None:
        most = max(len(held.place) for held in self._held.values())
        if most > 1:
            self.each = (most + 1) // 2
            part = torch.arange(self.each, dtype=torch.int64, device="cpu")
            for number, held in self._held.items():
                if len(held.place) > self.each:
                    self._held[number] = _Held(held.key, held.rows.at(part), held.place[: self.each])
        else:
            last = max(self._held, key=lambda number: self._held[number].key)
            self._below = self._held.pop(last).key
        self._size = sum(len(held.place) for held in self._held.values())

    def rows(self) -> Rows:
        """What is held, by sequence and place."""
        found = []
        for number in sorted(self._held):
            held = self._held[number]
            found.append(held.rows.at(torch.from_numpy(np.argsort(held.place))))
        return end_to_end(found)

    def words(self) -> Mapping[str, int]:
        """What was drawn, for the result: rows held, rows seen, and sequences held."""
        return {"rows": self._size, "of": self.seen, "sequences": len(self._held)}
