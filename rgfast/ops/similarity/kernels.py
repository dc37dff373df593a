"""Measures that are inner products of symmetric n×n matrices, which a permutation reorders.

RSA: the centered ranks of distances. CKA: the centered, or U-centered, Grams.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rgfast.ops.similarity.rows import centered, in_unit

__all__ = ["Kernel", "Kernels", "alignments", "gram", "rank_matrix", "stacked"]

# Entries of a block of rows, and permutations that are multiplied together.
_ENTRIES, _TOGETHER = 1 << 16, 16
# ‖K‖² below this fraction of (tr K)²/n is rounding, not variance.
_NO_VARIANCE = 1e-13


class Kernel(NamedTuple):
    """A symmetric matrix ``[n, n]`` (int32 or fp64) and its squared norm, NaN without variance."""

    matrix: Tensor
    square: Tensor


class Kernels(NamedTuple):
    """Upper triangles by blocks of rows ``[layers, rows * columns]``, with diagonals halved."""

    blocks: list[Tensor]
    square: Tensor


def rank_matrix(x: Tensor) -> Kernel:
    """Twice the centered ranks of the distances of rows ``x[n, d]``: whole numbers, 0 on the diagonal.

    With N distances those at places start + 1 … end of the sorted order, if equal, have rank (start + 1 +
    end)/2.
    """
    n = len(x)
    values = torch.pdist(in_unit(x))
    at = _ascending(values)
    values = values[at]
    count = len(values)
    each = torch.arange(1 - count, count, 2, dtype=torch.int32, device=x.device)
    same = torch.nn.functional.pad(values[1:] == values[:-1], (1, 1))
    del values
    start = (same[1:] & ~same[:-1]).nonzero()[:, 0]
    end = (same[:-1] & ~same[1:]).nonzero()[:, 0] + 1
    sizes = end - start
    tied = torch.arange(int(sizes.sum()), dtype=torch.int64, device=x.device)
    tied += (start - (sizes.cumsum(0) - sizes)).repeat_interleave(sizes)
    each[tied] = (start + end - count).to(torch.int32).repeat_interleave(sizes)
    ranks = torch.empty_like(each)
    ranks[at] = each
    del at, each
    matrix = torch.zeros(n, n, dtype=torch.int32, device=x.device)
    for i, row in enumerate(torch.split(ranks, list(range(n - 1, 0, -1)))):
        matrix[i, i + 1 :] = row
        matrix[i + 1 :, i] = row
    square = _square(matrix)
    return Kernel(matrix, torch.where(square > 0, square, torch.nan))


def gram(x: Tensor, debiased: bool) -> Kernel:
    """The centered Gram of rows ``x[n, d]``, or the U-centered one of Song et al. 2012."""
    x, n = centered(x), len(x)
    matrix = x @ x.mT
    trace = matrix.diagonal().sum()
    if debiased:
        # Row sums of a centered Gram vanish: without the diagonal a they are −a.
        a = matrix.diagonal().clone()
        matrix += (a / (n - 2))[:, None]
        matrix += a / (n - 2)
        matrix -= trace / ((n - 1) * (n - 2))
        matrix.fill_diagonal_(0.0)
    square = _square(matrix)
    return Kernel(matrix, torch.where(square > _NO_VARIANCE * trace.square() / n, square, torch.nan))


def stacked(kernels: Iterator[Kernel], n: int) -> Kernels:
    """The kernels of several layers, each let go once its triangle is copied."""
    parts: list[list[Tensor]] = []
    squares = []
    for matrix, square in kernels:
        upper = []
        for start, stop in _blocks(n):
            part = matrix[start:stop, start:].triu()
            if matrix.is_floating_point():
                part.diagonal().div_(2.0)
            upper.append(part.flatten())
        parts.append(upper)
        squares.append(square)
    return Kernels([torch.stack(block) for block in zip(*parts, strict=True)], torch.stack(squares))


def alignments(first: Kernels, second: Kernel, orders: Tensor) -> Tensor:
    """⟨K, L⟩/(‖K‖‖L‖) ``[orders, layers]`` of the kernels K and of L in each order of its samples."""
    n = len(second.matrix)
    sums = torch.zeros(len(orders), len(first.square), dtype=torch.float64, device=second.matrix.device)
    for begin in range(0, len(orders), _TOGETHER):
        some = orders[begin : begin + _TOGETHER]
        for (start, stop), upper in zip(_blocks(n), first.blocks, strict=True):
            reordered = torch.empty(len(some), upper.shape[1], dtype=torch.float64, device=upper.device)
            for row, order in zip(reordered, some, strict=True):
                row.copy_(_reordered(second.matrix, order[start:stop], order[start:]).flatten())
            sums[begin : begin + _TOGETHER] += reordered @ upper.to(torch.float64).mT
    return 2.0 * sums / (first.square * second.square).sqrt()


def _reordered(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``matrix[rows][:, columns]``; on the CPU by NumPy, which copies columns four times as fast."""
    if matrix.device.type != "cpu":
        return matrix.index_select(0, rows).index_select(1, columns)
    return torch.from_numpy(np.take(np.take(matrix.numpy(), rows.numpy(), 0), columns.numpy(), 1))


def _ascending(values: Tensor) -> Tensor:
    """Places of values in ascending order; on the CPU by NumPy, which needs a third of the memory."""
    if values.device.type != "cpu":
        return values.argsort()
    return torch.from_numpy(np.argsort(values.numpy()))


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < n:
        stop = min(n, start + max(1, _ENTRIES // (n - start)))
        yield start, stop
        start = stop


def _square(matrix: Tensor) -> Tensor:
    step = max(1, _ENTRIES // len(matrix))
    parts = [part.to(torch.float64).square().sum() for part in torch.split(matrix, step)]
    return torch.stack(parts).sum()
