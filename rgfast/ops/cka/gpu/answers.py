"""Small problems with known answers, on which the kernels are tried before a result of theirs is used."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rgfast.ops.cka.gpu.launch import sums
from rgfast.ops.cka.sums import Wanted
from rgfast.ops.residual_mlp.gpu import needs
from rgfast.runtime.known_answers import KnownAnswer

__all__ = ["ANSWERS", "name_of", "problem"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def name_of(dtype: torch.dtype, *, near: bool) -> str:
    """Under which the answer of the kernels that a call runs is registered."""
    return f"cka_split_{'near' if near else 'all'}_{str(dtype).removeprefix('torch.')}"


def problem(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Two layers of small numbers, of 130 samples and of two blocks of features or one."""
    rows = torch.arange(130, dtype=torch.float64, device=device)[:, None]
    columns = torch.arange(67, dtype=torch.float64, device=device)
    x = ((7 * rows + 3 * columns + rows * columns) % 5 - 2)[None].to(dtype)
    return [x, x[..., 60:65]]


def _values(dtype: torch.dtype, near: bool, device: torch.device) -> Tensor:
    """Debiased and biased CKA, each of both layers with both."""
    found, fine = sums(problem(dtype, device), 0, 1, Wanted(2, 2, near))
    values = torch.cat([found.ratio(True), found.ratio(False)]).flatten()
    return torch.where(fine, values, torch.nan)


# Debiased, then biased.
_DEBIASED, _BIASED = 0.9997683165606264, 0.9997714546879077
_WANTED = (1.0, _DEBIASED, _DEBIASED, 1.0, 1.0, _BIASED, _BIASED, 1.0)


def _refusal(device: torch.device) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_available():
        return needs.missing() or "torch finds no GPU"
    return needs.missing() or needs.too_old(device)


ANSWERS = [
    KnownAnswer((name_of(dtype, near=near),), partial(_values, dtype, near), _WANTED, 1e-6, _refusal)
    for dtype in _DTYPES
    for near in (False, True)
]
