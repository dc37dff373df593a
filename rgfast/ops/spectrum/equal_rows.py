"""Ranks that rows which repeat cannot exceed, as those of tokens do at the input of a language model."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rgfast.ops.spectrum.solve import Solved

__all__ = ["limit_by_equal_rows"]

_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def limit_by_equal_rows(
    x: Tensor, solved: Solved, at: Tensor, *, centering: str, kept: Tensor | None = None
) -> None:
    """Lower the rank limits of matrices `at` of `x[b, n, d]` to what so many different rows can have.

    k different rows have at most rank k, and k − 1 when centred. Values beyond the limit, of which a moment
    knows only that they are small, become zero with no error. From rows `kept[n]` alone, if given. A GPU is
    read once, and once more for each matrix whose rows are compared as a whole; these stay there.
    """
    less = int(centering == "mean")
    first = x[:, :, 0][at] if kept is None else x[:, kept, 0][at]
    first = first.sort(1).values
    by_first = (first[:, 1:] != first[:, :-1]).sum(1) + 1  # no more than the rows that differ
    for index, limit, most in torch.stack([at, solved.rank_limit[at], by_first - less], 1).cpu().tolist():
        if most < limit:
            most = _different(x[index] if kept is None else x[index, kept]) - less
        if most < limit:
            solved.rank_limit[index] = most
            solved.sigma[index, most:] = solved.error[index, most:] = 0.0


def _different(rows: Tensor) -> int:
    """How many rows of `[n, d]` differ from each other."""
    if not rows.is_cpu:
        return len(torch.unique(rows.contiguous().view(_WHOLE[rows.element_size()]), dim=0))
    same = rows.contiguous().view(torch.uint8).numpy()
    return len(np.unique(same.view(np.dtype((np.void, same.shape[1]))).ravel()))
