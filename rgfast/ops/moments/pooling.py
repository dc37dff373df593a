"""Moments of all positions together by kernels for a GPU, csrc/cuda/moments_pooled.cu: one pass over all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rgfast.dispatch import HandOff
from rgfast.ops.device import LAUNCH, STREAM
from rgfast.ops.moments.call import Moved
from rgfast.ops.moments.tiles import MOST_SIDE
from rgfast.runtime import cuda
from rgfast.runtime.known_answers import KnownAnswer
from rgfast.runtime.waiting import numbers

__all__ = ["POOLING", "pooled", "pooling_answer", "pooling_cost", "pooling_refusal"]

POOLING = ("rgfast_moments_pool", "rgfast_moments_pool_ends")
# Of moments_pooled.cu, which holds its side of these numbers against its sources: threads, rows of a block,
# bytes of shared memory of the first kernel, and of the second for a position.
_THREADS, _ROWS, _SHARED, _EACH = 256, 32, 2048, 40


def pooled(call: Moved) -> Tensor:
    """As `reference.pooled`."""
    if cuda.capturing(call.device):
        reason = "a CUDA graph would read the table of pairs where it was on the host, when it is replayed"
        raise HandOff(reason, lambda run: run(call))
    device, (positions, d, e) = call.device, call.sizes
    pairs, blocks = len(call.sums), -(-d // _ROWS)
    out = torch.empty((pairs, d + 2, e + 2), dtype=torch.float64, device=device)
    parts = torch.empty((pairs, blocks, e + 1), dtype=torch.float64, device=device)
    # What is copied has to be there until the kernels were queued.
    kept = [[x.contiguous() for x in some] for some in (call.sums, call.left, call.right)]
    start, step = out.data_ptr(), 8 * (d + 2) * (e + 2)
    words = []
    for k, tensors in enumerate(zip(*kept, strict=True)):
        words += [*(x.data_ptr() for x in tensors), start + k * step]
    table, sizes = numbers(words, device), (positions, d, e)
    cuda.launch(POOLING[0], (blocks, pairs, 1), _THREADS, _SHARED, table, *sizes, parts, device=device)
    shared = _EACH * positions
    cuda.launch(POOLING[1], (pairs, 1, 1), _THREADS, shared, table, *sizes, blocks, parts, device=device)
    return out


def pooling_refusal(call: Moved) -> str | None:
    """Why the kernels cannot take the call."""
    tensors: list[Tensor] = [*call.sums, *call.left, *call.right]
    if any(x.device != call.device for x in tensors):
        return "sums and moves must be on one device"
    if len(call.sums) > MOST_SIDE:
        return f"a grid has {MOST_SIDE} blocks of pairs at most"
    if not all(call.sizes):
        return "there must be positions and features"
    return cuda.refusal(POOLING[1], call.device, block=_THREADS, shared=_EACH * call.sizes[0])


def pooling_cost(call: Moved) -> float:
    """A pass over all moments."""
    positions, d, e = call.sizes
    return 6 * LAUNCH + 8.0 * len(call.sums) * positions * (d + 2) * (e + 2) / STREAM


def _tried(device: torch.device) -> Tensor:
    """Of two pairs of layers of whole numbers at three positions, whose moves are whole numbers too."""

    def layer(width: int, by: int) -> tuple[Tensor, Tensor]:
        rows = torch.arange(3 * 6, dtype=torch.float64, device=device).view(3, 6, 1)
        columns = torch.arange(width, dtype=torch.float64, device=device)
        x = (by * rows + 5 * columns) % 8 - 3
        places = torch.arange(3, dtype=torch.float64, device=device)[:, None]
        return torch.cat([x, x.square().sum(2, keepdim=True), torch.ones_like(rows)], 2), (
            columns + places
        ) % 3

    (x, left), (y, right), (z, other) = layer(35, 3), layer(34, 7), layer(34, 1)
    pairs: Sequence[Tensor] = [x.mT @ y, x.mT @ z]
    found = pooled(Moved(pairs, [left, -left], [right, other]))
    places = torch.arange(found[0].numel(), dtype=torch.float64, device=device).view_as(found[0]) % 7
    return torch.cat([found.sum((1, 2)), (found * places).sum((1, 2)), found[:, -2:, -2:].flatten()])


_VALUES = (
    1996402.0,
    1213578.0,
    10200520.0,
    6946104.0,
    1415109.0,
    5103.0,
    4994.0,
    18.0,
    1111801.0,
    3915.0,
    5110.0,
    18.0,
)


def pooling_answer() -> KnownAnswer:
    """Of :data:`POOLING`."""
    return KnownAnswer(POOLING, _tried, _VALUES)
