"""The sample route: all rows of a position pass all layers at once, and only their measures are kept.

Where every position of a stack goes its own way and all samples are at hand, nothing has to be accumulated: a
few positions at a time run through all layers, and their spectra and alignments are computed while the rows
are there. No layer's output is stored for more positions than these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rgfast.probing.capture.batches import batch_items
from rgfast.probing.capture.layers import Tap
from rgfast.probing.estimators.rows import measure_rows
from rgfast.probing.measures import Measured, joined
from rgfast.probing.plan import Plan
from rgfast.stack import ResidualStack

__all__ = [
    "LIMIT",
    "Part",
    "SampleState",
    "at_once",
    "enough",
    "gather",
    "measured_by_samples",
    "measured_part",
    "worthwhile",
]

# More sequences than these are summed up as they come.
LIMIT = 4096
# What the rows alive at a time may take, over all layers, and how many tiles there are at least: enough
# matrices for the eigenvalue solver's lanes, and a fraction of what storing every layer takes.
_TILE_BYTES, _LEAST_TILES = 112 << 20, 4
# With fewer products of pairs than these any route takes a moment, and moments can be merged.
_LEAST_FLOPS = 1e9


# The measures of some positions: of all sequences, and of all but those of each group.
Part = tuple[Measured, ...]


@dataclass(frozen=True)
class SampleState:
    """What was measured of ``sequences`` sequences, a few positions a part. It cannot be added to."""

    plan: Plan
    sequences: int
    parts: tuple[Part, ...]
    masked: bool = False

    @property
    def measured(self) -> Measured:
        """All positions, all groups."""
        return joined([part[0] for part in self.parts])

    @property
    def left_out(self) -> list[Measured]:
        """All positions without the sequences of group g, for every g; nothing for a single group."""
        return [joined(some) for some in zip(*(part[1:] for part in self.parts), strict=True)]


def worthwhile(plan: Plan, sequences: int) -> bool:
    """Whether the products that moments of so many sequences take would be felt."""
    layers = len(plan.names)
    pairs = 2 * layers if plan.pairs == "adjacent" else layers * (layers + 1) / 2
    flops = 2.0 * sequences * len(plan.positions) * plan.widths[0] ** 2 * pairs
    return flops >= _LEAST_FLOPS


def enough(sequences: int, groups: int) -> bool:
    """Whether all measures are defined, without any group too."""
    most = -(-sequences // groups) if groups > 1 else 0
    return sequences - most >= 4 and sequences >= 2 * groups


def at_once(plan: Plan, sequences: int, memory: int) -> int:
    """How many positions of all layers are alive at a time."""
    bytes_each = len(plan.names) * sequences * plan.widths[0] * 4
    bytes_each *= 3 if plan.groups > 1 else 1  # at worst two copies without a group each
    return max(1, min(min(_TILE_BYTES, memory // 4) // bytes_each, -(-len(plan.positions) // _LEAST_TILES)))


def gather(
    model: ResidualStack, taps: Sequence[Tap], batches: Iterator[Any]
) -> tuple[Tensor | None, list[Any]]:
    """All batches as one ``[n, T, D]``, or None where they are not few and alike; and what was taken."""
    taken: list[Any] = []
    parts: list[Tensor] = []
    stream = ["blocks.0:input", *(f"blocks.{k}" for k in range(model.depth))]
    if [tap.name for tap in taps] != stream or model._forward_hooks or model._forward_pre_hooks:
        return None, taken
    if not all(w.is_cpu and w.dtype == torch.float32 for w in model.parameters()):
        return None, taken
    n = 0
    for batch in batches:
        taken.append(batch)
        items = batch_items(batch)
        x = items[0] if len(items) == 1 else None
        if not isinstance(x, Tensor) or x.dim() != 3 or not x.is_cpu or x.dtype != torch.float32:
            return None, taken
        if x.shape[2] != model.width or (parts and x.shape[1:] != parts[0].shape[1:]):
            return None, taken
        parts += [x] if len(x) else []
        n += len(x)
        if n > LIMIT:
            return None, taken
    return (_end_to_end(parts) if parts else None), taken


def _end_to_end(parts: Sequence[Tensor]) -> Tensor:
    """``parts`` as one tensor: a view where they are pieces of one, as those of an array are."""
    first, at = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.stride() != first.stride() or part.storage_offset() != at:
            return torch.cat(list(parts))
        at += len(part) * part.stride(0)
    rows = sum(len(part) for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def measured_by_samples(
    stack: ResidualStack,
    x: Tensor,
    plan: Plan,
    *,
    uncentred: bool,
    memory: int,
    advance: Callable[[int], object],
) -> SampleState:
    """The measures of ``x[n, T, D]`` at the positions of ``plan``; ``advance(k)`` after every k of them.

    Raises ValueError where a layer is not finite, naming it and the position.
    """
    parts: list[Part] = []

    def take(first: int, states: Tensor) -> None:
        found = measured_part(states, plan, uncentred)
        if found is None:
            raise ValueError(_not_finite(states, plan, plan.positions[first:]))
        parts.append(found)
        advance(states.shape[1])

    handle = stack.watch(take, at_once(plan, len(x), memory))
    try:
        every = len(plan.positions) == x.shape[1]
        stack((x if every else x[:, list(plan.positions)]).transpose(0, 1))
    finally:
        handle.remove()
    return SampleState(plan, len(x), tuple(parts))


def measured_part(states: Tensor, plan: Plan, uncentred: bool) -> Part | None:
    """The measures of ``states[L, P, n, d]``, and without each group; None where NaN or infinity is met."""
    adjacent = plan.pairs == "adjacent"
    return measure_rows(states, adjacent=adjacent, uncentred=uncentred, groups=plan.groups)


def _not_finite(states: Tensor, plan: Plan, where: Sequence[int]) -> str:
    bad = (~torch.isfinite(states)).sum((2, 3))
    layer, k = (int(i) for i in bad.nonzero()[0])
    return (
        f"activations must be finite, got {int(bad[layer, k])} NaN or infinite values in layer {layer} at "
        f"position {where[k]} ({plan.names[layer]}, sequences 0 to {states.shape[2] - 1})"
    )
