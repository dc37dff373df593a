"""Sampling of a Markov chain by alias tables (Walker 1977; Vose, IEEE Trans. Softw. Eng. 17, 1991)."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["AliasTables", "sample"]

Array = NDArray[np.float64]

# Sequences walked together, and uniforms drawn together: the working set stays in L2, and every operation
# below the 32,768 elements from which torch hands it to several threads, which costs more than it gains here.
_ROWS = 2048
_DRAWS = 30_000
# Up to this many sequences, one after the other in plain Python beats a handful of tensor operations a step.
_FEW = 48


class AliasTables:
    """Alias tables of the rows of a transition matrix and, as the last row, of the stationary distribution.

    A uniform u picks column j = floor(u V); its fraction accepts j below ``threshold[row, j]``, else the draw
    is ``alias[row, j]``. Exact to the 53 bits of u; a transition of probability zero is never drawn.
    """

    def __init__(self, matrix: Array, stationary: Array) -> None:
        self.states = len(matrix)
        rows = [_alias_row(row) for row in [*matrix, stationary]]
        self.threshold = torch.from_numpy(np.stack([threshold for threshold, _ in rows])).flatten()
        self.alias = torch.from_numpy(np.stack([alias for _, alias in rows])).flatten()

    @cached_property
    def as_lists(self) -> tuple[list[float], list[int]]:
        return self.threshold.tolist(), self.alias.tolist()

    def to(self, device: torch.device) -> AliasTables:
        if device == self.threshold.device:
            return self
        moved = object.__new__(AliasTables)
        moved.states = self.states
        moved.threshold, moved.alias = self.threshold.to(device), self.alias.to(device)
        return moved


def _alias_row(row: Array) -> tuple[Array, NDArray[np.int64]]:
    size = len(row)
    weight = (row / row.sum() * size).tolist()
    threshold, alias = np.ones(size), np.arange(size, dtype=np.int64)
    small = [j for j in range(size) if weight[j] < 1]
    large = [j for j in range(size) if weight[j] >= 1]
    while small and large:
        j, donor = small.pop(), large[-1]
        threshold[j], alias[j] = weight[j], donor
        weight[donor] -= 1 - weight[j]
        if weight[donor] < 1:
            small.append(large.pop())
    # Whatever is left is 1 up to rounding, unless rounding used the donors up before an impossible state.
    for j in small:
        if row[j] == 0:
            threshold[j], alias[j] = 0.0, int(row.argmax())
    return threshold, alias


def sample(
    tables: AliasTables, n: int, length: int, generator: torch.Generator | None, *, few: bool | None = None
) -> Tensor:
    """``n`` stationary sequences, int64 ``[n, length]``; see :meth:`MarkovChain.sample`.

    ``few`` forces (or forbids) the route for few sequences; both give the same bits.
    """
    device = torch.device("cpu") if generator is None else generator.device
    tables = tables.to(device)
    walk = _walk_few if (n <= _FEW if few is None else few) else _walk
    out = torch.empty(n, length, dtype=torch.int64, device=device)
    for first in range(0, n, _ROWS):
        rows = out[first : first + _ROWS]
        width = len(rows)
        # The stationary distribution is the row of a state V that precedes every sequence.
        state = torch.full((width,), tables.states, dtype=torch.int64, device=device)
        step = max(1, _DRAWS // width)
        for begin in range(0, length, step):
            end = min(length, begin + step)
            u = torch.rand(end - begin, width, dtype=torch.float64, device=device, generator=generator)
            column = u.mul_(tables.states).long().clamp_(max=tables.states - 1)
            tokens = walk(tables, column, u.sub_(column), state)
            rows[:, begin:end] = tokens.T
            state = tokens[-1]
    return out


def _walk(tables: AliasTables, column: Tensor, fraction: Tensor, state: Tensor) -> Tensor:
    """States ``[steps, n]`` after each draw (``column``, ``fraction``) from ``state`` ``[n]``."""
    out = torch.empty_like(column)
    for t in range(len(column)):
        index = torch.add(column[t], state, alpha=tables.states)
        accepted = fraction[t] < tables.threshold.take(index)
        state = torch.where(accepted, column[t], tables.alias.take(index), out=out[t])
    return out


def _walk_few(tables: AliasTables, column: Tensor, fraction: Tensor, state: Tensor) -> Tensor:
    """What :func:`_walk` gives, sequence by sequence."""
    states, threshold, alias = tables.states, *tables.as_lists
    walked = []
    for columns, fractions, s in zip(column.T.tolist(), fraction.T.tolist(), state.tolist(), strict=True):
        sequence = []
        for c, f in zip(columns, fractions, strict=True):
            i = s * states + c
            s = c if f < threshold[i] else alias[i]
            sequence.append(s)
        walked.append(sequence)
    return torch.tensor(walked, dtype=torch.int64, device=column.device).T
