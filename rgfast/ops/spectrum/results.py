"""What the functions of this room return beside plain tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from rgfast.ops.spectrum.baseline import IsotropicBaseline

__all__ = ["RankMeasures", "SpectrumInfo"]


@dataclass(frozen=True)
class SpectrumInfo:
    """How a spectrum was computed and how far it can be off.

    `path[...]` (numpy strings) is `"gram"`, `"refined"`, `"svd"` or `"lanczos"` per matrix.
    `error_bound[...]` bounds the relative error of the singular effective rank, `variance_error_bound[...]`
    of the variance one, `singular_value_error[..., m]` the absolute error of every singular value, against
    the exact spectrum of the given data. After `"lanczos"` they hold the half-width of a 95% interval for
    the rank asked for and NaN elsewhere. `impl` is the implementation that ran.
    """

    path: np.ndarray[Any, Any]
    error_bound: Tensor
    variance_error_bound: Tensor
    singular_value_error: Tensor
    impl: str
    n: int
    d: int


@dataclass(frozen=True)
class RankMeasures:
    """All rank measures of one spectrum, each fp64 `[...]`, with the spectrum and its provenance.

    `baseline` is what isotropic Gaussian data of the same (n, d) would give; None where n differs between
    matrices.
    """

    effective_rank: Tensor
    effective_rank_variance: Tensor
    participation_ratio: Tensor
    stable_rank: Tensor
    numerical_rank: Tensor
    singular_values: Tensor
    error_bound: Tensor
    variance_error_bound: Tensor
    path: np.ndarray[Any, Any]
    n: int | Tensor
    d: int
    tol: float
    baseline: IsotropicBaseline | None
