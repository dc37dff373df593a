"""Rows in fp64 as the measures take them: in a unit of their size, or centered."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["centered", "directions", "in_unit", "nearness", "widened"]


def widened(x: Tensor) -> Tensor:
    """A new contiguous fp64 tensor of the values of ``x``."""
    return x.detach().contiguous().to(torch.float64, copy=True)


def in_unit(x: Tensor, dims: tuple[int, ...] = (0, 1)) -> Tensor:
    """``x[n, d]`` times the power of two that takes its largest magnitude (over ``dims``) into [1/2, 1)."""
    exponent = torch.frexp(x.abs().amax(dims, keepdim=True)).exponent.long().clamp(-1000, 1000)
    return x * ((1023 - exponent) << 52).view(torch.float64)


def centered(x: Tensor) -> Tensor:
    """``x[n, d]`` less its column means, in a unit of its size.

    The first row goes first: equal rows become zeros, and an offset costs no digits.
    """
    x = in_unit(x)
    x = x - x[:1]
    x = x - x.mean(0)
    return in_unit(x - x.mean(0))


def directions(x: Tensor) -> Tensor:
    """``x[n, d]`` with each row in a unit of its size, or its sign if that is all of its direction."""
    return x.sign() if x.shape[1] == 1 else in_unit(x, (1,))


def nearness(products: Tensor, squares: Tensor) -> Tensor:
    """What orders rows z_j ``[..., U]`` by their cosine with a row: d|d|/|z_j|² of its products d with them.

    Rounded once for whole numbers, so that equal cosines are equal. Rows of zeros have 0.
    """
    return products * products.abs() / torch.where(squares > 0, squares, 1.0)
