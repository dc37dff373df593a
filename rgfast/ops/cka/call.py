"""The validated call of this room's op: what an implementation gets."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgfast.dispatch import is_plain
from rgfast.validation import ordinary

__all__ = ["Call", "Side"]

Side = Tensor | tuple[Tensor, ...]


class Call(NamedTuple):
    """A task on representations `[..., n, d]`, one or a tuple of layers a side; errors call them `names`."""

    task: str
    names: tuple[str, ...]
    first: Side
    second: Side | None = None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def sides(self) -> tuple[tuple[Tensor, ...], ...]:
        return tuple(_layers(side) for side in (self.first, self.second) if side is not None)

    @property
    def device(self) -> torch.device:
        return _layers(self.first)[0].device

    def recorded(self) -> bool:
        """Whether autograd has to know of this call."""
        tensors = [x for side in self.sides for x in side]
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return True
        return not torch.compiler.is_compiling() and not all(ordinary(x) for x in tensors)

    def multiplications(self) -> float:
        """About how many a computation by samples or by features takes, whichever are fewer."""
        sides = self.sides
        widths = [x.shape[-1] for side in sides for x in side]
        *lead, n, _ = sides[0][0].shape
        near = self.task in ("drift", "change")
        pairs = len(widths) - 1 if near else len(sides[0]) * len(sides[-1])
        by_samples = n * n * (sum(widths) + 2 * pairs)
        by_features = n * (pairs + len(widths)) * (sum(widths) / len(widths)) ** 2
        return math.prod(lead) * min(by_samples, by_features)

    def shape_class(self) -> Hashable | None:
        first = _layers(self.first)[0]
        if not is_plain(first):
            return None
        kind = (self.task, first.device.type, self.recorded())
        if first.device.type == "cpu":
            # Sizes change costs there, but not which implementation has the least.
            return kind
        return (*kind, self.options, *((x.dtype, x.shape) for side in self.sides for x in side))


def _layers(side: Side) -> tuple[Tensor, ...]:
    return (side,) if isinstance(side, Tensor) else side
