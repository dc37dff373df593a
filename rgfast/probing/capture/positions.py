"""Positions that are counted from a sequence's own tokens rather than from the first column."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from rgfast.probing.capture.rows import RowBatch
from rgfast.runtime.streams import current
from rgfast.runtime.waiting import numbers, sent, waits_for

__all__ = ["Origin", "columns_of", "from_first_token", "index_of"]

Origin = Literal["column", "token"]


def from_first_token(batch: RowBatch) -> RowBatch:
    """The batch with every sequence's first token that counts in column 0, and the columns before it last."""
    shifts = {id(keep): _first(keep) for keep in batch.keeps if keep is not None}
    if not any(waits_for(shift.device) or bool(shift.any()) for shift in shifts.values()):
        return batch

    def moved(x: Tensor | None, keep: Tensor | None) -> Tensor | None:
        if x is None or keep is None:
            return x
        every = torch.arange(x.shape[1], dtype=torch.int64, device=x.device)
        index = (sent(shifts[id(keep)], x.device)[:, None] + every) % x.shape[1]
        return x.gather(1, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand_as(x))

    keeps = list(batch.keeps)
    first = keeps[0]
    return replace(
        batch,
        layers=[moved(x, keep) for x, keep in zip(batch.layers, keeps, strict=True)],
        keeps=[moved(keep, keep) for keep in keeps],
        masked=moved(batch.masked, first),
        targets=[_given(moved(target, first)) for target in batch.targets],
        chosen=[x if isinstance(x, str) else _given(moved(x, first)) for x in batch.chosen],
    )


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _first(keep: Tensor) -> Tensor:
    """The column of every sequence's first token that counts ``[B]``, int64."""
    return keep.to(torch.uint8).argmax(1)


def columns_of(positions: Sequence[int], keep: Tensor) -> Tensor:
    """Where positions stand in each sequence ``[B, P]``, negative ones from its last token that counts.

    Columns that a sequence does not have are negative or beyond its end.
    """
    every = torch.arange(keep.shape[1], dtype=torch.int64, device=keep.device)
    last = torch.where(keep, every, -1).amax(1, keepdim=True)
    wanted = index_of(tuple(positions), keep.device)
    return torch.where(wanted < 0, last + 1 + wanted, wanted)


def index_of(positions: tuple[int, ...], device: torch.device) -> Tensor:
    """``positions`` as a tensor on ``device``, which goes there once and not with every batch.

    Once by every stream: what is queued on another one does not wait until it is there.
    """
    return _index_of(positions, device, current(device))


@functools.lru_cache(maxsize=256)
def _index_of(positions: tuple[int, ...], device: torch.device, stream: Any) -> Tensor:
    return numbers(positions, device)
