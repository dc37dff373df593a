"""Sums of extended rows that have moved."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["moved", "norms_moved"]


def norms_moved(moment: Tensor, delta: Tensor) -> Tensor:
    """Σ z |y + delta|² ``[P, d_i + 2]`` of the rows' z, in few launches."""
    norms = torch.addcmul(moment[..., -2], delta.square().sum(-1, keepdim=True), moment[..., -1])
    return torch.baddbmm(norms[..., None], moment[..., :-2], delta[..., None], alpha=2.0)[..., 0]


def moved(
    moment: Tensor, left: Tensor, right: Tensor, norms: Callable[[Tensor, Tensor], Tensor] = norms_moved
) -> Tensor:
    """The sums of ``[x + left, |x + left|², 1]`` and ``[y + right, …]`` from those of x and y: Tᵀ M T'.

    ``norms`` says how squared norms are added up, on which their last bits depend.
    """
    columns = _columns(moment, right, norms)
    return _columns(columns.transpose(1, 2), left, norms).transpose(1, 2)


def _columns(moment: Tensor, delta: Tensor, norms: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    d = delta.shape[1]
    out = torch.empty(moment.shape, dtype=moment.dtype, device=moment.device)
    torch.addcmul(moment[..., :d], moment[..., d + 1, None], delta[:, None], out=out[..., :d])
    out[..., d], out[..., d + 1] = norms(moment, delta), moment[..., d + 1]
    return out
