"""Each sequence's mean over the positions that count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rgfast.runtime.threads import aligned, one_thread
from rgfast.runtime.waiting import sent, waits_for

__all__ = ["means_of"]


def means_of(
    layers: Sequence[Tensor], keeps: Sequence[Tensor | None], known: Mapping[int, Tensor] | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Each sequence's means ``[B, d_l]`` over the rows that count, fp64, and which sequences have such rows
    in all layers (None: all). Those of some layers may be ``known``."""
    known = known or {}
    rows: list[Tensor] = []
    some: Tensor | None = None
    for layer, (x, keep) in enumerate(zip(layers, keeps, strict=True)):
        if keep is None or keep.shape[1] != x.shape[1]:
            rows.append(known[layer] if layer in known else _mean(x))
            continue
        counted = keep.any(1)
        some = counted if some is None else some & counted
        if layer in known:
            rows.append(known[layer])
            continue
        keep = sent(keep, x.device)
        number = keep.sum(1, keepdim=True)
        if waits_for(x.device):
            total = x.masked_fill(~keep[..., None], 0.0).sum(1, dtype=torch.float64)  # widened on the way
        else:
            with one_thread():
                total = aligned(x.to(torch.float64).masked_fill(~keep[..., None], 0.0)).sum(1)
        rows.append(total / number.clamp_min(1))
    return rows, some


def _mean(x: Tensor) -> Tensor:
    """``[B, T, d]`` over T in fp64."""
    if waits_for(x.device):
        return x.mean(1, dtype=torch.float64)  # in one launch
    with one_thread():  # rows of channels-first layers are laid out and widened in one pass
        return aligned(x.to(torch.float64, memory_format=torch.contiguous_format)).sum(1) / x.shape[1]
