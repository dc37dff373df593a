"""Looking for NaN and infinity among the rows that count, at once or later."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NonFiniteError", "check_finite"]


class NonFiniteError(ValueError):
    """A row that counts holds NaN or infinity; ``layer``, ``position`` and ``count`` say where and how."""

    def __init__(self, layer: int, position: tuple[int, ...], count: int) -> None:
        where = f", position {position[0] if len(position) == 1 else position}" if position else ""
        super().__init__(f"layers must be finite, got {count} NaN or infinite values in layer {layer}{where}")
        self.layer, self.position, self.count = layer, position, count


def check_finite(x: Tensor, mask: Tensor | None, layer: int) -> None:
    """Raise :class:`NonFiniteError` where a row of ``x[*, rows, d]`` that ``mask`` keeps is not finite."""
    if not x.numel():
        return
    low, high = torch.aminmax(_in_memory_order(x))  # one pass, and NaN comes through
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return
    bad = ~torch.isfinite(x)
    if mask is not None:
        bad &= mask[..., None]
    if not bool(bad.any()):
        return
    per_position = bad.flatten(-2).sum(-1)  # [*]
    worst = tuple(int(v) for v in per_position.nonzero()[0]) if per_position.dim() else ()
    raise NonFiniteError(layer, worst, int(per_position[worst]))


def _in_memory_order(x: Tensor) -> Tensor:
    """``x`` with its axes as they lie in memory: of strided rows one pass takes several times as long."""
    steps = x.stride()
    return x.permute(sorted(range(x.dim()), key=lambda axis: -steps[axis]))
