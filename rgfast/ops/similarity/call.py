"""The validated call of this room's op: what an implementation gets."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgfast.dispatch import is_plain

__all__ = ["Call"]


class Call(NamedTuple):
    """A measure of layers `[..., n, d_l]`, all of `first` with all of `second`, for each of `orders`.

    `orders[1 + m, n]` (int64, on the CPU) permute the samples of `second`; the first one leaves them alone.
    An implementation returns `[1 + m, ..., L, L']` in fp64.
    """

    measure: str
    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    orders: Tensor
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def device(self) -> torch.device:
        return self.first[0].device

    def multiplications(self) -> float:
        """About how many products over samples take."""
        *lead, n, _ = self.first[0].shape
        widths = sum(x.shape[-1] for x in (*self.first, *self.second))
        pairs = len(self.first) * len(self.second) * len(self.orders)
        return math.prod(lead) * n * n * (widths + pairs)

    def shape_class(self) -> Hashable | None:
        # Sizes are not part of it: they change costs, but not which implementation has the least.
        return (self.measure, self.device.type) if is_plain(self.first[0]) else None
