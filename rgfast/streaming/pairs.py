"""The centred sums of two layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["PairMoments"]


@dataclass(frozen=True)
class PairMoments:
    """Centred sums over the n samples of two layers, in units of 2^exponent of each layer.

    ``cross`` is Σ x_c y_cᵀ ``[*, d_i, d_j]``; ``trace_i`` and ``trace_j`` are Σ|x_c|² and Σ|y_c|² ``[*]``;
    ``norm_product`` is Σ|x_c|²|y_c|² ``[*]``; ``count`` is n ``[*]``. All fp64. A true value is the value
    here times 2^exponent for every power of x (y) in it; in a ratio such as CKA the exponents cancel.
    """

    count: Tensor
    cross: Tensor
    trace_i: Tensor
    trace_j: Tensor
    norm_product: Tensor
    exponent_i: int
    exponent_j: int
