"""Orders of samples under which two representations have nothing to do with each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgfast.validation import as_tensor, kind_of

__all__ = ["orders"]


def orders(n: int, count: int, seed: int, sequences: Any = None) -> Tensor:
    """``count`` permutations ``[count, n]`` (int64, on the CPU) of n samples.

    The i-th depends on ``seed``, n and ``sequences`` alone. With ids ``sequences[n]`` the rows of a sequence
    move together and in their order, and sequences change places with those of the same number of rows, so
    that the permutations are exact whatever rows of one sequence have to do with each other. Raises
    TypeError or ValueError for ids that are no whole numbers ``[n]``, ValueError if no two sequences are of
    one length.
    """
    rng = np.random.default_rng(seed)
    places = None if sequences is None else _by_length(sequences, n)
    out = np.tile(np.arange(n), (count, 1))
    for order in out:
        if places is None:
            order[:] = rng.permutation(n)
            continue
        for rows in places:
            order[rows] = rows[rng.permutation(len(rows))]
    return torch.from_numpy(out)


def _by_length(sequences: Any, n: int) -> list[NDArray[np.int64]]:
    """The rows ``[count, length]`` of the sequences of each length that occurs more than once."""
    ids = as_tensor(sequences, "sequences")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"sequences must be whole numbers, got {kind_of(ids)}")
    if tuple(ids.shape) != (n,):
        raise ValueError(f"sequences must be one id per sample, shape ({n},), got {tuple(ids.shape)}")
    _, inverse, lengths = np.unique(ids.cpu().numpy(), return_inverse=True, return_counts=True)
    rows = np.split(np.argsort(inverse, kind="stable"), np.cumsum(lengths)[:-1])
    same = [np.stack([r for r in rows if len(r) == length]) for length in np.unique(lengths)]
    movable = [each for each in same if len(each) > 1]
    if not movable:
        raise ValueError(
            f"sequences must have two of the same number of rows, which can change places, "
            f"got {len(lengths)} sequences of {len(same)} lengths"
        )
    return movable
