"""What an estimator is: it takes rows batch by batch and gives measures at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.measured import Measured
from rgfast.probing.plan import Plan

__all__ = ["ByGroup", "Estimator", "Findings", "HoldsRows"]


# Measures without each group, and R² of every target [targets, layers, P] with its standard error.
ByGroup = tuple[list[Measured], tuple[Tensor, Tensor] | None]


class Findings(Protocol):
    """What the labelled result is made from."""

    @property
    def plan(self) -> Plan:
        """What was measured."""

    @property
    def sequences(self) -> int:
        """Of how many sequences."""

    @property
    def masked(self) -> bool:
        """Whether they had a mask."""

    @property
    def route(self) -> str:
        """The name of the route."""

    def measured(self, view: str) -> Measured:
        """The measures of a view."""

    def by_group(self, view: str) -> ByGroup:
        """The measures without the sequences of group g, for every g, and R² of the targets if there are any.

        Asked for only if there is more than one group.
        """


class Estimator(Protocol):
    """Takes the rows of a probe and gives :class:`Findings`.

    To add one: implement this in a module of :mod:`rgfast.probing.estimators` and name it in
    :mod:`rgfast.probing.tally`, which chooses. Nothing in :meth:`add` may wait for a device
    (:mod:`rgfast.runtime.waiting`).
    """

    @property
    def sequences(self) -> int:
        """How many sequences were added."""

    def accepts(self, batch: RowBatch) -> str:
        """Why a batch cannot be added, in words; nothing if it can."""

    def add(self, batch: RowBatch) -> None:
        """Add a batch that is accepted."""

    def merge(self, other: Any) -> None:
        """Add all that another estimator of this kind has seen, its sequences numbered on from the own."""

    def state(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """Everything as named arrays, to go on from or to merge later; None if it keeps none."""

    def measures(self) -> Findings:
        """What is known of all rows added so far."""


class HoldsRows(Estimator, Protocol):
    """An estimator that measures rows it holds back, and can hand them over instead."""

    @property
    def plan(self) -> Plan:
        """What is measured."""

    def note(self, sentences: Sequence[str]) -> None:
        """Let the result say these too."""

    def batches(self) -> Iterator[RowBatch]:
        """What is held."""

    def enough(self) -> bool:
        """Whether all measures are defined."""

    def worthwhile(self) -> bool:
        """Whether handing over would take felt time."""
