"""The validated call of this room's op, and what comes out beside the dimension."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rgfast.dispatch import is_plain

__all__ = ["Call", "DimensionInfo"]


@dataclass(frozen=True, eq=False)
class DimensionInfo:
    """The rows behind an intrinsic dimension: ``samples[...]`` distinct ones, ``duplicates[...]`` dropped."""

    samples: Tensor
    duplicates: Tensor


class Call(NamedTuple):
    """Rows `x[..., n, d]`; an implementation returns the dimensions and the numbers of distinct rows."""

    x: Tensor

    @property
    def device(self) -> torch.device:
        return self.x.device

    def multiplications(self) -> float:
        """Of all pairs of samples."""
        *lead, n, d = self.x.shape
        return float(math.prod(lead) * n * n * d)

    def shape_class(self) -> Hashable | None:
        return self.x.device.type if is_plain(self.x) else None
