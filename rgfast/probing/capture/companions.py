"""What goes with the activations of a batch: which rows count, which were hidden, and targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rgfast.validation import as_tensor

__all__ = ["MaskSpec", "row_masks"]

MaskSpec = str | Callable[[Mapping[str, Any]], Tensor] | None


def row_masks(
    mask: MaskSpec, entries: Mapping[str, Any], rows: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Which rows count (None: all) and which were hidden (None: no mask), ``[B, T]`` bool."""
    shape = tuple(rows.shape[:2])
    device = rows.device
    keep = entries.get("attention_mask")
    if isinstance(keep, Tensor):
        if tuple(keep.shape) == shape:
            keep = keep.to(device) != 0
        elif shape[1] == 1:  # a layer without positions: what a sequence was reduced to
            keep = None
        else:
            raise ValueError(
                f"attention_mask must be {list(shape)}, as the layers are, got shape {list(keep.shape)}"
            )
    if not isinstance(keep, Tensor) or bool(keep.all()):
        keep = None
    if mask is None:
        return keep, None
    if isinstance(mask, str):
        if mask not in entries:
            raise ValueError(f"mask: there is no entry {mask!r} in the batch ({', '.join(entries)})")
        masked = entries[mask]
    else:
        masked = mask(entries)
    masked = as_tensor(masked).to(device)
    if masked.dtype != torch.bool or tuple(masked.shape) != shape:
        raise ValueError(
            f"mask must be bool {list(shape)}, got {str(masked.dtype).removeprefix('torch.')} "
            f"{list(masked.shape)}"
        )
    return keep, masked
