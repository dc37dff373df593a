"""Rows held back until it is known whether they are few enough to be measured all at once."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rgfast.ops.fast import made_for
from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.estimators import samples
from rgfast.probing.estimators.samples import Part, SampleState, at_once, enough, measured_part, worthwhile
from rgfast.probing.plan import Plan

__all__ = ["Rows"]


class Rows:
    """The estimator that holds rows back by batch: fp32, on the CPU, of one shape but for the batch.

    It keeps nothing to go on from or to merge later: :meth:`batches` hands the rows over to one that does.
    Rows are copied if ``copied`` (they are about to be overwritten), else those of outputs that the model
    does not leave alone from one forward to the next. That shows from the third batch on (the probe copies
    what it captures in the first one): the memory of the second batch was written to, or is given out again.
    It is held for that, so that a model that takes turns between buffers is found out before one is lost.
    """

    def __init__(self, plan: Plan, memory: int, *, copied: bool, uncentred: bool) -> None:
        self.plan, self._memory, self._copied, self._uncentred = plan, memory, copied, uncentred
        self._batches: list[list[Tensor]] = []
        self.sequences = 0
        self._bytes = 0
        self._second: list[tuple[Tensor, int]] = []
        self._reused: set[int] = set()
        self._as_given: list[dict[int, tuple[Tensor, int]]] = []

    def accepts(self, batch: RowBatch) -> str:
        """Why a batch cannot be held beside the others, or nothing."""
        rows = batch.present
        shape = (len(rows[0]), self.plan.length, self.plan.widths[0])
        if batch.missing:
            return "a layer did not run"
        if any(keep is not None for keep in batch.keeps):
            return "positions are left out"
        if any(not made_for(x) or x.dtype != torch.float32 for x in rows):
            return "it is for fp32 on the CPU"
        if any(x.shape != shape for x in rows):
            return "every layer must have the same width, and every batch the same positions"
        if self.sequences + len(rows[0]) > samples.LIMIT:
            return f"there are more than {samples.LIMIT} sequences"
        if self._bytes + sum(x.nbytes for x in rows) > self._memory:
            return "the rows of all layers do not fit memory="
        return ""

    def add(self, batch: RowBatch) -> None:
        """Hold a batch that :meth:`accepts` has nothing against; its values are not looked at."""
        rows, number = batch.present, len(self._batches)
        if number == 1:
            self._bytes += sum(x.nbytes for x in rows)
            self._second, self._as_given = [(x, _version(x)) for x in rows], [{} for _ in rows]
        if self._copied or number < 2:
            self._batches.append([x.clone() for x in rows])
        else:
            self._batches.append([self._kept(layer, x) for layer, x in enumerate(rows)])
        self.sequences += len(rows[0])
        self._bytes += sum(x.nbytes for x in rows)

    def merge(self, other: Rows) -> None:
        """Hold what ``other`` holds too, its sequences numbered on from the own."""
        for rows in other.batches():
            self._batches.append(rows.present)
            self.sequences += rows.sequences
        self._bytes += other._bytes

    def state(self) -> None:
        """Nothing: rows are neither written nor merged later."""

    def batches(self) -> Iterator[RowBatch]:
        """What is held. Raises RuntimeError if rows that were not copied have been written to since."""
        self._check()
        for rows in self._batches:
            yield RowBatch(rows, [None] * len(rows))

    def _kept(self, layer: int, x: Tensor) -> Tensor:
        """``x``, or a copy where its memory will be written to again."""
        if layer not in self._reused:
            second, version = self._second[layer]
            given_again = x.data_ptr() == second.data_ptr()
            if second.is_inference() or second._version != version or given_again:
                self._reused.add(layer)
                self._check_unchanged(layer)
                for batch in self._batches[2:]:
                    batch[layer] = batch[layer].clone()
                self._as_given[layer].clear()
        if layer in self._reused:
            return x.clone()
        if x.data_ptr() in self._as_given[layer]:
            self._check_unchanged(layer)
        self._as_given[layer][x.data_ptr()] = x, _version(x)
        return x

    def _check_unchanged(self, layer: int) -> None:
        if any(_version(x) != version for x, version in self._as_given[layer].values()):
            raise RuntimeError(
                f"the model wrote to the output of {self.plan.names[layer]} of an earlier forward, which it "
                "left alone in its first ones; take route='moments'"
            )

    def _check(self) -> None:
        for layer in range(len(self._as_given)):
            self._check_unchanged(layer)

    def enough(self) -> bool:
        """Whether all measures are defined."""
        return enough(self.sequences, self.plan.groups)

    def worthwhile(self) -> bool:
        """Whether accumulating their moments would be felt."""
        return worthwhile(self.plan, self.sequences)

    def measures(self) -> SampleState:
        """The measures of all that is held, a few positions at a time."""
        self._check()
        plan, parts = self.plan, list[Part]()
        step = at_once(plan, self.sequences, self._memory)
        one = (self.sequences, plan.widths[0])
        # One for all turns: fresh pages cost as much as a copy.
        room = torch.empty(len(plan.names) * step * math.prod(one), dtype=torch.float32, device="cpu")
        for start in range(0, len(plan.positions), step):
            where = plan.positions[start : start + step]
            at = _slice_or_list(where)
            shape = (len(plan.names), len(where), *one)
            states = room[: math.prod(shape)].view(shape)
            for layer, to in enumerate(states):
                torch.cat([batch[layer][:, at].transpose(0, 1) for batch in self._batches], 1, out=to)
            found = measured_part(states, plan, self._uncentred)
            assert found is not None  # every batch was looked at when it came
            parts.append(found)
        return SampleState(plan, self.sequences, tuple(parts))


def _slice_or_list(where: tuple[int, ...]) -> slice | list[int]:
    """Positions to index with; without a copy where they are neighbours."""
    near = slice(where[0], where[-1] + 1)
    return near if where == tuple(range(near.start, near.stop)) else list(where)


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version
