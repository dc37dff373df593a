"""Ranks that rows which repeat cannot exceed, as those of tokens do at the input of a language model."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rgfast.ops.spectrum.solve import Solved

__all__ = ["limit_by_equal_rows"]


def limit_by_equal_rows(
    x: Tensor, solved: Solved, at: Tensor, *, centering: str, kept: Tensor | None = None
) -> None:
    """Lower the rank limits of matrices `at` of `x[b, n, d]` to what so many different rows can have.

    k different rows have at most rank k, and k − 1 when centred. Values beyond the limit, of which a moment
    knows only that they are small, become zero with no error. From rows `kept[n]` alone, if given.
    """
    less = int(centering == "mean")
    for index in at.tolist():
        limit = int(solved.rank_limit[index])
        rows = x[index] if kept is None else x[index, kept]
        most = _different(rows, limit + less) - less
        if most < limit:
            solved.rank_limit[index] = most
            solved.sigma[index, most:] = solved.error[index, most:] = 0.0


def _different(rows: Tensor, enough: int) -> int:
    """How many rows of `[n, d]` differ from each other, or a number from `enough` on that is no larger."""
    by_first = len(set(rows[:, 0].tolist()))
    if by_first >= enough:
        return by_first
    same = rows.contiguous().view(torch.uint8).cpu().numpy()
    return len(np.unique(same.view(np.dtype((np.void, same.shape[1]))).ravel()))
