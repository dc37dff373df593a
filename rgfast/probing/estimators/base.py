"""What an estimator is: it takes rows batch by batch and gives measures at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rgfast.probing.measures import Measured
from rgfast.probing.plan import Plan

__all__ = ["ByGroup", "Estimator", "Findings", "RowBatch"]


@dataclass(frozen=True)
class RowBatch:
    """The rows of one batch: ``layers[l]`` ``[B, T_l, d_l]``, None if the layer did not run, and what goes
    with them.

    ``keeps[l]`` ``[B, T_l]`` bool says which rows of a layer count (None: all do), ``masked`` ``[B, T]``
    which tokens were hidden (None: there is no mask), ``targets[k]`` is ``[B, T, m_k]``. ``places[l]``
    numbers the places that a layer has its rows at. ``padded`` says that some entry tells the padding, and
    ``notes`` what the result has to say of how entries were read. ``reused`` says that the layers' memory is
    about to be overwritten.
    """

    layers: Sequence[Tensor | None]
    keeps: Sequence[Tensor | None]
    masked: Tensor | None = None
    targets: Sequence[Tensor] = ()
    places: Sequence[int] = ()
    padded: bool = False
    notes: tuple[str, ...] = ()
    reused: bool = False

    @property
    def first(self) -> Tensor:
        """The rows of the first layer that ran."""
        return next(x for x in self.layers if x is not None)

    @property
    def present(self) -> list[Tensor]:
        """The rows of the layers that ran."""
        return [x for x in self.layers if x is not None]

    @property
    def sequences(self) -> int:
        """B."""
        return self.first.shape[0]

    @property
    def missing(self) -> list[int]:
        """The layers that did not run."""
        return [layer for layer, x in enumerate(self.layers) if x is None]

    def some(self, part: slice) -> RowBatch:
        """Some of the sequences."""

        def of(xs: Sequence[Tensor | None]) -> list[Tensor | None]:
            return [None if x is None else x[part] for x in xs]

        masked = None if self.masked is None else self.masked[part]
        targets = [target[part] for target in self.targets]
        return replace(self, layers=of(self.layers), keeps=of(self.keeps), masked=masked, targets=targets)


# Measures without each group, and R² of every target [targets, layers, P] with its standard error.
ByGroup = tuple[list[Measured], tuple[NDArray[np.float64], NDArray[np.float64]] | None]


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
    :mod:`rgfast.probing.tally`, which chooses.
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
