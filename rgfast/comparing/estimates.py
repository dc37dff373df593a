"""CKA between the layers of two models: from moments as batches come, or from rows that are held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rgfast.comparing.rows import Rows, end_to_end
from rgfast.ops.cka import cka_matrix
from rgfast.ops.cka.streaming import cka_of_sums
from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.estimators.finite import FiniteCheck
from rgfast.probing.estimators.moments import Moments
from rgfast.probing.options import human_bytes
from rgfast.probing.plan import Plan
from rgfast.probing.unread import Unread
from rgfast.runtime.threads import one_thread
from rgfast.runtime.waiting import sent
from rgfast.streaming import MomentAccumulator, Together

__all__ = ["Counted", "Estimate", "HeldRows", "OfMoments", "Values"]

# More sequences than these are summed up as they come.
LIMIT = 4096
_DEBIASED = {"cka": True, "cka_biased": False}
_LEAST = {"cka": 4, "cka_biased": 2}


@dataclass(frozen=True)
class Values:
    """The measures of one view: ``of[name]`` ``[L_a, L_b, P]``, and how many rows ``[P]`` they are of."""

    count: Tensor
    of: Mapping[str, Tensor]


class Estimate(Protocol):
    """Takes the rows of both models, layers of a first, and gives the measures of each view of its plan."""

    route: str
    takes_rows: bool

    @property
    def plan(self) -> Plan:
        """What is compared."""

    @property
    def sequences(self) -> int:
        """How many sequences were added."""

    def add(self, batch: RowBatch, rows: Mapping[str, Rows]) -> None:
        """Add a batch; ``rows`` are those of every view if it :attr:`takes_rows`.

        Raises ValueError for NaN or infinity, naming layer and position.
        """

    def finish(self) -> None:
        """No more will be added."""

    def values(self, view: str, measures: Sequence[str]) -> Values:
        """The measures of a view."""

    def without(self, view: str, measures: Sequence[str]) -> Iterator[Values]:
        """The measures of a view without the sequences of group g, for every g."""


class OfMoments:
    """From second and cross moments of all pairs, in memory that does not depend on the number of rows."""

    route, takes_rows = "moments", False

    def __init__(self, plan: Plan, layers_a: int, *, masked: bool, unread: Unread) -> None:
        self._moments, self._first = Moments(plan, masked=masked, unread=unread), layers_a

    @property
    def plan(self) -> Plan:
        return self._moments.plan

    @property
    def sequences(self) -> int:
        return self._moments.sequences

    def add(self, batch: RowBatch, rows: Mapping[str, Rows]) -> None:
        self._moments.note(batch.notes)
        self._moments.add(batch)

    def finish(self) -> None:
        self._moments.measures()

    def values(self, view: str, measures: Sequence[str]) -> Values:
        ((_, moments),) = self._moments.moments_of(view)
        return self._of(moments, measures)

    def without(self, view: str, measures: Sequence[str]) -> Iterator[Values]:
        ((_, parts),) = self._moments.moments_without(view)
        for part in parts:
            yield self._of(part, measures)

    def _of(self, moments: MomentAccumulator, measures: Sequence[str]) -> Values:
        # Sums over whole matrices are cut by the number of threads.
        with one_thread():
            sums = Together([moments]).kernels(products="cka" in measures)
            found, _ = cka_of_sums(sums, [_DEBIASED[name] for name in measures])
        at = self._first
        return Values(sums.count, {name: x[:at, at:] for name, x in zip(measures, found, strict=True)})


class HeldRows:
    """From all rows, on the smaller side of rows and features: of at most 4,096 sequences.

    What is held are the rows of each view, so that a mean over positions takes one row. ``too_big`` says why
    moments were not taken, if not because rows were asked for.
    """

    route, takes_rows = "samples", True

    def __init__(self, plan: Plan, layers_a: int, *, memory: int, unread: Unread, too_big: str = "") -> None:
        self._too_big = too_big
        self.plan, self._first, self._memory = plan, layers_a, memory
        self.sequences = 0
        self._held: dict[str, list[Rows]] = {view: [] for view in plan.views}
        self._finite = FiniteCheck(plan.names, unread)
        self._bytes = 0

    def add(self, batch: RowBatch, rows: Mapping[str, Rows]) -> None:
        self.plan = self.plan.noted(batch.notes)
        self._finite.check(batch, self.sequences)
        if self.sequences + batch.sequences > LIMIT:
            if self._too_big:
                raise ValueError(f"{self._too_big} (rows are held of at most {LIMIT} sequences)")
            raise ValueError(f"route: 'samples' takes at most {LIMIT} sequences; take route='moments'")
        if "flattened" in self.plan.views and batch.first.shape[1] != self.plan.length:
            self.plan.without_flattened(batch.first.shape[1])  # raises, since the view was asked for
        for view, found in rows.items():
            self._held[view].append(found)
            self._bytes += sum(x.nbytes for x in found.layers)
        if self._bytes > self._memory:
            taken, allowed = human_bytes(self._bytes), human_bytes(self._memory)
            raise ValueError(
                f"memory: rows of {self.sequences + batch.sequences} sequences take {taken}, and memory "
                f"allows {allowed}; raise memory= or take fewer layers, views or sequences"
            )
        self.sequences += batch.sequences

    def finish(self) -> None:
        self._finite.look()

    def values(self, view: str, measures: Sequence[str]) -> Values:
        return self._of(view, measures, None)

    def without(self, view: str, measures: Sequence[str]) -> Iterator[Values]:
        for group in range(self.plan.groups):
            yield self._of(view, measures, group)

    def _of(self, view: str, measures: Sequence[str], left_out: int | None) -> Values:
        rows = end_to_end(self._held[view])
        if left_out is not None:
            rows = rows.at((rows.sequence % self.plan.groups != left_out).nonzero()[:, 0])
        found = [self._aligned(layers, measures) for layers, _ in rows.by_position()]
        of = {name: torch.stack([each[name] for each in found], -1) for name in measures}
        return Values(rows.counts(), of)

    def _aligned(self, rows: list[Tensor], measures: Sequence[str]) -> dict[str, Tensor]:
        n, first, here = len(rows[0]), self._first, rows[0].device
        a, b = rows[:first], [sent(x, here) for x in rows[first:]]
        found = {}
        for name in measures:
            if n < _LEAST[name]:
                shape = (len(a), len(b))
                found[name] = torch.full(shape, torch.nan, dtype=torch.float64, device=here)
            else:
                found[name] = cka_matrix(a, b, debiased=_DEBIASED[name], precision="double")
        return found


class Counted:
    """No measure of all rows, which are only counted."""

    route, takes_rows = "samples", True

    def __init__(self, plan: Plan, *, unread: Unread) -> None:
        self.plan, self.sequences = plan, 0
        self._counts: dict[str, Tensor] = {}
        self._finite = FiniteCheck(plan.names, unread)

    def add(self, batch: RowBatch, rows: Mapping[str, Rows]) -> None:
        self.plan = self.plan.noted(batch.notes)
        self._finite.check(batch, self.sequences)
        for view, found in rows.items():
            self._counts[view] = found.counts() + self._counts.get(view, 0)
        self.sequences += batch.sequences

    def finish(self) -> None:
        self._finite.look()

    def values(self, view: str, measures: Sequence[str]) -> Values:
        return Values(self._counts[view], {})

    def without(self, view: str, measures: Sequence[str]) -> Iterator[Values]:
        return iter(())
