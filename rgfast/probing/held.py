"""Rows held back until it is known whether they are few enough to be measured all at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rgfast.probing import samples
from rgfast.probing.plan import Plan
from rgfast.probing.samples import Part, SampleState, at_once, enough, measured_part, worthwhile

__all__ = ["HeldRows"]


class HeldRows:
    """The rows of every layer by batch, as they came: fp32, on the CPU, of one shape but for the batch.

    Rows are copied if ``copied`` (they are about to be overwritten), else until it is known which outputs the
    model leaves alone from one forward to the next. That shows in the third batch: the probe copies what it
    captures in the first one.
    """

    def __init__(self, plan: Plan, memory: int, *, copied: bool) -> None:
        self.plan, self._memory, self._copied = plan, memory, copied
        self.batches: list[list[Tensor]] = []
        self.sequences = 0
        self._bytes = 0
        self._second: list[tuple[Tensor, int]] = []
        self._reused: set[int] = set()

    def refusal(self, rows: Sequence[Tensor]) -> str:
        """Why a batch of ``rows[l]`` ``[B, T, D]`` cannot be held beside the others, or nothing."""
        shape = (len(rows[0]), self.plan.length, self.plan.widths[0])
        if any(not x.is_cpu or x.dtype != torch.float32 for x in rows):
            return "it is for fp32 on the CPU"
        if any(x.shape != shape for x in rows):
            return "every layer must have the same width, and every batch the same positions"
        if self.sequences + len(rows[0]) > samples.LIMIT:
            return f"there are more than {samples.LIMIT} sequences"
        if self._bytes + sum(x.nbytes for x in rows) > self._memory:
            return "the rows of all layers do not fit memory="
        return ""

    def add(self, rows: Sequence[Tensor]) -> None:
        """Hold a batch that :meth:`refusal` has nothing against."""
        number = len(self.batches)
        if number == 2:
            for layer, (x, version) in enumerate(self._second):
                if x.is_inference() or x._version != version:
                    self._reused.add(layer)
        self._second = [(x, _version(x)) for x in rows] if number == 1 else []
        every = self._copied or number < 2
        self.batches.append([x.clone() if every or k in self._reused else x for k, x in enumerate(rows)])
        self.sequences += len(rows[0])
        self._bytes += sum(x.nbytes for x in rows)

    def enough(self) -> bool:
        """Whether all measures are defined."""
        return enough(self.sequences, self.plan.groups)

    def worthwhile(self) -> bool:
        """Whether accumulating their moments would be felt."""
        return worthwhile(self.plan, self.sequences)

    def measured(self, *, uncentred: bool) -> SampleState:
        """The measures of all that is held, a few positions at a time."""
        plan, parts = self.plan, list[Part]()
        step = at_once(plan, self.sequences, self._memory)
        one = (self.sequences, plan.widths[0])
        # One for all turns: fresh pages cost as much as a copy.
        room = torch.empty(len(plan.names) * step * math.prod(one))
        for start in range(0, len(plan.positions), step):
            where = plan.positions[start : start + step]
            at = _slice_or_list(where)
            shape = (len(plan.names), len(where), *one)
            states = room[: math.prod(shape)].view(shape)
            for layer, to in enumerate(states):
                torch.cat([batch[layer][:, at].transpose(0, 1) for batch in self.batches], 1, out=to)
            found = measured_part(states, plan, uncentred)
            assert found is not None  # every batch was looked at when it came
            parts.append(found)
        return SampleState(plan, self.sequences, tuple(parts))


def _slice_or_list(where: tuple[int, ...]) -> slice | list[int]:
    """Positions to index with; without a copy where they are neighbours."""
    near = slice(where[0], where[-1] + 1)
    return near if where == tuple(range(near.start, near.stop)) else list(where)


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version
