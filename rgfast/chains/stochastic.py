"""The checks of a transition matrix that a user gives."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rgfast.validation import refuse_masked

__all__ = ["as_stochastic"]


def as_stochastic(transition: Tensor | ArrayLike) -> NDArray[np.float64]:
    """``transition`` as an fp64 matrix ``[V, V]`` whose rows sum to 1; see :class:`rgfast.MarkovChain`."""
    if isinstance(transition, Tensor):
        if transition.dtype == torch.bfloat16:
            raise TypeError("transition must hold real numbers (fp32 or fp64), got dtype bfloat16")
        if transition.layout != torch.strided:
            raise TypeError(f"transition must be a dense (strided) tensor, got layout {transition.layout}")
        transition = transition.detach().cpu().resolve_neg().numpy()
    refuse_masked(transition, "transition")
    try:
        given = np.asarray(transition)
    except ValueError:
        raise ValueError("transition must be a square matrix, got rows of different lengths") from None
    half, single = (given.dtype.kind == "f" and given.dtype.itemsize == size for size in (2, 4))
    if given.dtype.kind not in "fiu" or half:
        raise TypeError(f"transition must hold real numbers (fp32 or fp64), got dtype {given.dtype}")
    if given.ndim != 2 or given.shape[0] != given.shape[1]:
        raise ValueError(f"transition must be a square matrix, got shape {given.shape}")
    if len(given) < 2:
        raise ValueError(f"transition must have at least 2 states, got {len(given)}")
    matrix = np.array(given, dtype=np.float64)
    bad = np.argwhere(~np.isfinite(matrix) | (matrix < 0))
    if len(bad):
        i, j = bad[0]
        raise ValueError(
            f"transition must be finite and nonnegative, got {matrix[i, j]} at row {i}, column {j}"
        )
    sums = matrix.sum(1)
    slack = 1e-6 if single else 1e-9
    worst = int(np.abs(sums - 1).argmax())
    if abs(sums[worst] - 1) > slack:
        raise ValueError(
            f"transition must have rows that sum to 1, got {float(sums[worst])!r} in row {worst}"
        )
    if abs(sums[worst] - 1) > len(matrix) * np.finfo(np.float64).eps:
        matrix /= sums[:, None]
    return matrix
