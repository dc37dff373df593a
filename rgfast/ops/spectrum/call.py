"""The validated calls of this room's ops: what an implementation gets."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from rgfast.dispatch import is_plain

__all__ = ["Again", "Both", "Doubtful", "Groups", "Measure", "Ranks", "Rows", "Symmetric", "Values"]


class Measure(NamedTuple):
    """One measure of `x[..., n, d]`, as public functions ask for it; validated where it is computed."""

    x: Tensor
    measure: str
    centering: str
    precision: str
    rtol: float
    method: str
    impl: str


class Rows(NamedTuple):
    """Second moments of `x[b, n, d]`, their spectra, or effective ranks good to `rtol`, computed in `dtype`.

    Where given, `raw[b, d]` gets the spectra of the data as they are (for n >= d and `centering="mean"`), and
    `means[b, d]` the column means of what the moments are of; `matrix[b, m, m]` gets the moments themselves
    where spectra are asked for. `variance` asks for ranks of variances.
    """

    x: Tensor
    centering: str = "mean"
    dtype: torch.dtype = torch.float64
    raw: Tensor | None = None
    means: Tensor | None = None
    matrix: Tensor | None = None
    variance: bool = False
    rtol: float = 1e-6

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def side(self) -> int:
        """Rows of a second moment."""
        return min(self.x.shape[1:])

    def shape_class(self) -> Hashable | None:
        x = self.x
        return (x.device.type, x.dtype, x.shape, self.dtype) if is_plain(x) else None


class Again(NamedTuple):
    """Spectra of matrices `at[k]` (int64) of `x[b, n, d]`, solved again from the data in fp64 to `rtol`."""

    x: Tensor
    at: Tensor
    centering: str = "mean"
    rtol: float = 1e-6

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def side(self) -> int:
        """Rows of a second moment."""
        return min(self.x.shape[1:])

    def shape_class(self) -> Hashable | None:
        return None  # the number of matrices is seldom the same


class Doubtful(NamedTuple):
    """Spectra of `x[b, n, d]`, also uncentred if wanted, refined where effective ranks may err by `doubt`."""

    x: Tensor
    uncentred: bool
    doubt: float

    @property
    def device(self) -> torch.device:
        return self.x.device

    def shape_class(self) -> Hashable | None:
        x = self.x
        return (x.device.type, x.dtype, x.shape, self.uncentred) if is_plain(x) else None


class Groups(NamedTuple):
    """Spectra of `x[b, n, d]` without samples g, g + groups, ... for every g, also uncentred if wanted."""

    x: Tensor
    groups: int
    uncentred: bool

    @property
    def device(self) -> torch.device:
        return self.x.device

    def shape_class(self) -> Hashable | None:
        x = self.x
        return (x.device.type, x.dtype, x.shape, self.groups) if is_plain(x) else None


class Symmetric(NamedTuple):
    """Eigenvalues of `a[..., d, d]`."""

    a: Tensor

    @property
    def device(self) -> torch.device:
        return self.a.device

    @property
    def side(self) -> int:
        """Rows of a matrix."""
        return self.a.shape[-1]

    @property
    def matrices(self) -> int:
        """How many matrices there are."""
        return math.prod(self.a.shape[:-2])

    def shape_class(self) -> Hashable | None:
        a = self.a
        return (a.device.type, a.dtype, a.shape) if is_plain(a) else None


class Both(NamedTuple):
    """Eigenvalues `[2, b, d]` of `a[b, d, d]`, by the lower triangle, and of a + mean meanᵀ, `mean[b, d]`."""

    a: Tensor
    mean: Tensor

    @property
    def device(self) -> torch.device:
        return self.a.device

    @property
    def side(self) -> int:
        """Rows of a matrix."""
        return self.a.shape[-1]

    def shape_class(self) -> Hashable | None:
        a = self.a
        return (a.device.type, a.dtype, a.shape) if is_plain(a) else None


class Values(NamedTuple):
    """Eigenvalues of b moments of the same samples, to be measured.

    `values[kinds · b, m]`, ascending, are those of centered rows, and if there are two kinds below them those
    of raw ones; `variance[kinds · b, d]`, d ≥ m, are sums of squares of all features, `accumulated[b]`
    Σ|x − shift|² and `samples[b]` (int64) their number. `by_features` if the moments are sums over features.
    """

    values: Tensor
    variance: Tensor
    accumulated: Tensor
    samples: Tensor
    by_features: bool = False
    tol: float = 1e-7

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def kinds(self) -> int:
        """1 or 2."""
        return len(self.values) // len(self.samples) if len(self.samples) else 1

    def shape_class(self) -> Hashable:
        return self.device.type, self.values.shape, self.variance.shape


class Ranks(NamedTuple):
    """Singular values of centered rows `sigma[b, d]`, descending, and rows of a `table[10, b]`: measures and
    bounds, NaN for fewer than two samples, and 1 where all eigenvalues were finite (`rank_kernel.py` has the
    order)."""

    sigma: Tensor
    table: Tensor
