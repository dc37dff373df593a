"""Spectra and rank measures of `x[..., n, d]`: the public functions."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from rgfast.dispatch import register
from rgfast.ops.spectrum.baseline import isotropic_baseline
from rgfast.ops.spectrum.call import Measure
from rgfast.ops.spectrum.compute import (
    checked,
    describe,
    eigenvalues,
    estimated,
    measure_of,
    spectra,
    tolerance,
    value,
)
from rgfast.ops.spectrum.contract import differentiable, differentiable_eigenvalues, wants_gradient
from rgfast.ops.spectrum.measures import (
    effective_rank_of,
    numerical_rank_of,
    participation_ratio_of,
    stable_rank_of,
)
from rgfast.ops.spectrum.results import RankMeasures, SpectrumInfo
from rgfast.ops.spectrum.selection import EIGVALSH, GRAM, SPECTRUM
from rgfast.validation import check_choice

__all__ = [
    "effective_rank",
    "eigvalsh",
    "numerical_rank",
    "participation_ratio",
    "rank_measures",
    "singular_values",
    "stable_rank",
]

Centering = Literal["mean", "none"]
Precision = Literal["double", "single"]
Method = Literal["auto", "gram", "svd"]
RankMethod = Literal["auto", "gram", "svd", "lanczos"]
Kind = Literal["singular", "variance"]


@overload
def singular_values(
    x: Any,
    *,
    centering: Centering = ...,
    precision: Precision = ...,
    rtol: float = ...,
    method: Method = ...,
    impl: str = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...
@overload
def singular_values(
    x: Any,
    *,
    centering: Centering = ...,
    precision: Precision = ...,
    rtol: float = ...,
    method: Method = ...,
    impl: str = ...,
    return_info: Literal[True],
) -> tuple[Tensor, SpectrumInfo]: ...
def singular_values(
    x: Any,
    *,
    centering: Centering = "mean",
    precision: Precision = "double",
    rtol: float = 1e-6,
    method: Method = "auto",
    impl: str = "auto",
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SpectrumInfo]:
    """Singular values `[..., min(n, d)]` of each matrix of `x[..., n, d]`, fp64, descending.

    `x` is a tensor or array of fp64, fp32, bf16 or fp16 with any strides: n samples of d features, less
    their means over the samples if `centering="mean"`. Squared and divided by n they are the eigenvalues of
    the second moment. Values that cannot be but zero (constant columns, more than n - 1 when centred) are
    zero exactly.

    `precision="double"` forms the second moment of the smaller side in fp64 from exactly widened, shifted
    data and takes its eigenvalues; `method="auto"` then bounds the relative error of the singular effective
    rank and goes on, matrix by matrix, where the bound exceeds `rtol`; `"gram"` never goes on; `"svd"` is
    LAPACK's fp64 SVD. `precision="single"` accumulates and solves in fp32, never goes on, and is good to
    about 1e-7 in the participation ratio and 1e-5 in the variance effective rank. With `return_info` a
    `SpectrumInfo` follows.

    Data on a GPU stay there, as do results, in the same precision and within the same bounds as on the CPU
    though not with its bits: moments by torch's fp64 products, eigenvalues by cuSOLVER through torch, or for
    `impl="cuda"` and min(n, d) up to 1,024 by the package's kernels, which `"auto"` takes only on
    architectures where they were measured. The host is told once whether all is finite and which matrices
    are to be solved again. Those are refined there in batches, by torch's products and `eigh`.

    Raises TypeError for anything but a dense floating tensor or array, and under transforms of `torch.func`
    and forward-mode autograd; ValueError for fewer than two dimensions, no samples or features, NaN or
    infinity (naming the matrix and the count), or an unknown option; `rgfast.ImplUnavailable` where `impl`
    names an implementation that cannot run this input.

    >>> import rgfast, torch
    >>> rgfast.singular_values(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 0.0]]))
    tensor([4.2426, 0.0000], dtype=torch.float64)
    """
    return _measured(Measure(x, "singular_values", centering, precision, rtol, method, impl), return_info)


@overload
def effective_rank(
    x: Any,
    *,
    spectrum: Kind = ...,
    centering: Centering = ...,
    precision: Precision = ...,
    rtol: float = ...,
    method: RankMethod = ...,
    impl: str = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...
@overload
def effective_rank(
    x: Any,
    *,
    spectrum: Kind = ...,
    centering: Centering = ...,
    precision: Precision = ...,
    rtol: float = ...,
    method: RankMethod = ...,
    impl: str = ...,
    return_info: Literal[True],
) -> tuple[Tensor, SpectrumInfo]: ...
def effective_rank(
    x: Any,
    *,
    spectrum: Kind = "singular",
    centering: Centering = "mean",
    precision: Precision = "double",
    rtol: float = 1e-6,
    method: RankMethod = "auto",
    impl: str = "auto",
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SpectrumInfo]:
    """Effective rank `[...]`, fp64, of each matrix of `x[..., n, d]`: exp of its spectrum's entropy.

    `spectrum="singular"` takes p_i = sigma_i / sum sigma (Roy & Vetterli, EUSIPCO 2007), `"variance"` takes
    p_i = sigma_i^2 / sum sigma^2 (matrix entropy). The two differ a lot, and a finite sample biases both:
    compare with `isotropic_baseline(n, d)`. A matrix of zeros, or one that centring makes so, has rank 0.

    `method="lanczos"` is for very wide data (min(n, d) from about 4,096): the leading eigenpairs of the
    second moment and stochastic Lanczos quadrature for the rest, with the half-width of its 95% interval as
    the error bound; `rtol` is not consulted. See `effective_rank_estimate` for a second moment or an
    operator.

    Differentiable once, by formula in fp64 on the device of x, as are `singular_values`,
    `participation_ratio` and `stable_rank`. Directions whose singular value is zero (to rounding) get no
    gradient: the entropy has no slope there.

    Input, precision, the other options, what happens on a GPU and errors are those of `singular_values`
    (`method="lanczos"` estimates all matrices on a GPU side by side); by default the relative error is
    within 1e-6 (singular) and 1e-12 (variance, fp32 data) of LAPACK's fp64 SVD.

    >>> import rgfast, torch
    >>> rgfast.effective_rank(torch.eye(8), centering="none")
    tensor(8.0000, dtype=torch.float64)
    """
    check_choice(spectrum, "spectrum", ("singular", "variance"))
    measure = "effective_rank" if spectrum == "singular" else "effective_rank_variance"
    return _measured(Measure(x, measure, centering, precision, rtol, method, impl), return_info)


def participation_ratio(
    x: Any, *, centering: Centering = "mean", precision: Precision = "double", impl: str = "auto"
) -> Tensor:
    """Participation ratio `[...]`, fp64, of each matrix of `x[..., n, d]`: (tr C)^2 / tr C^2.

    C is the second moment; no eigenproblem is solved. Zero data give 0. Input and errors are those of
    `singular_values`. On a GPU it is torch's fp64 products, and the host reads once whether all is finite.

    >>> import rgfast, torch
    >>> rgfast.participation_ratio(torch.eye(8), centering="none")
    tensor(8., dtype=torch.float64)
    """
    return _value(Measure(x, "participation_ratio", centering, precision, 1.0, "auto", impl))


def stable_rank(
    x: Any, *, centering: Centering = "mean", precision: Precision = "double", impl: str = "auto"
) -> Tensor:
    """Stable rank `[...]`, fp64, of each matrix of `x[..., n, d]`: squared Frobenius over squared 2-norm.

    The largest eigenvalue of the second moment is found by Lanczos to a residual of 1e-10; no spectrum is
    computed. Zero data give 0. Input and errors are those of `singular_values`. On a GPU torch's products do
    it there, and the host reads once whether all is finite and once per doubling of the Krylov space from 16
    steps on.

    >>> import rgfast, torch
    >>> rgfast.stable_rank(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), centering="none")
    tensor(1.2500, dtype=torch.float64)
    """
    return _value(Measure(x, "stable_rank", centering, precision, 1.0, "auto", impl))


def numerical_rank(
    x: Any,
    *,
    tol: float | None = None,
    centering: Centering = "mean",
    precision: Precision = "double",
    rtol: float = 1e-6,
    method: Method = "auto",
    impl: str = "auto",
) -> Tensor:
    """Numerical rank `[...]`, fp64, of each matrix of `x[..., n, d]`: the number of sigma_i > tol * sigma_1.

    `tol` is max(n, d) times the machine epsilon of the data (of fp32 for halves) unless given. Under 1e-7 a
    Gram matrix cannot see that far, so `method="auto"` takes the accurate path there. Other arguments, what
    happens on a GPU and errors are those of `singular_values`; ValueError for a `tol` that is negative or not
    under 1.

    >>> import rgfast, torch
    >>> rgfast.numerical_rank(torch.diag(torch.tensor([1.0, 1e-3, 1e-9])), tol=1e-6, centering="none")
    tensor(2., dtype=torch.float64)
    """
    x = checked(x)
    tol = tolerance(tol, x)
    call = Measure(x, "numerical_rank", centering, precision, rtol, method, impl)
    x, solved, _ = spectra(call, tol)
    rank: Tensor = numerical_rank_of(solved.sigma, tol)
    return rank.reshape(x.shape[:-2])


def rank_measures(
    x: Any,
    *,
    tol: float | None = None,
    centering: Centering = "mean",
    precision: Precision = "double",
    rtol: float = 1e-6,
    method: Method = "auto",
    impl: str = "auto",
) -> RankMeasures:
    """Every rank measure of each matrix of `x[..., n, d]` from one spectrum, as a `RankMeasures`.

    It carries the spectrum, the error bound, which path ran for each matrix, n, d and the isotropic Gaussian
    baseline of the same size; nothing in it has a gradient. Arguments, what happens on a GPU and errors are
    those of `singular_values` and `numerical_rank`; measures and bounds are tensors on the device of x.

    >>> import rgfast, torch
    >>> m = rgfast.rank_measures(torch.eye(8), centering="none")
    >>> float(m.participation_ratio), str(m.path), bool(m.error_bound < 1e-6)
    (8.0, 'gram', True)
    """
    x = checked(x)
    tol = tolerance(tol, x)
    call = Measure(x, "rank_measures", centering, precision, rtol, method, impl)
    x, solved, name = spectra(call, tol)
    info = describe(x, solved, name)
    lead = x.shape[:-2]

    def shaped(value: Tensor) -> Tensor:
        return value.reshape(lead)

    return RankMeasures(
        effective_rank=shaped(effective_rank_of(solved.sigma)),
        effective_rank_variance=shaped(effective_rank_of(solved.sigma, spectrum="variance")),
        participation_ratio=shaped(participation_ratio_of(solved.sigma)),
        stable_rank=shaped(stable_rank_of(solved.sigma)),
        numerical_rank=shaped(numerical_rank_of(solved.sigma, tol)),
        singular_values=solved.singular_values().reshape(*lead, min(x.shape[-2:])),
        error_bound=info.error_bound,
        variance_error_bound=info.variance_error_bound,
        path=info.path,
        n=info.n,
        d=info.d,
        tol=tol,
        baseline=isotropic_baseline(info.n, info.d, centering=centering),
    )


def eigvalsh(a: Any, *, impl: str = "auto") -> Tensor:
    """Eigenvalues `[..., d]`, ascending, of each symmetric matrix of `a[..., d, d]`, in its dtype.

    `a` is fp64 or fp32; only the lower triangle is read. Errors are within max(50, d/2) u of the largest
    magnitude, u the unit roundoff of the dtype, at any scale.

    Differentiable once, in fp64 by torch's eigenvectors: V diag(g) V^T, that of a symmetric matrix. Where
    eigenvalues are equal, functions that treat them alike have a gradient.

    Matrices on a GPU stay there: by cuSOLVER through torch in checked parts, or for `impl="cuda"` and up to
    1,024 rows by the package's kernels, in the dtype of `a` or fp64, which `"auto"` takes only on
    architectures where they were measured. The host reads once whether all are finite. Before torch
    2.12, which solves batches there, `"auto"` has the CPU solve what it is faster at.

    Raises TypeError for another dtype, and under transforms of `torch.func` and forward-mode autograd;
    ValueError for matrices that are not square, NaN or infinity (naming the matrix and the count);
    `rgfast.ImplUnavailable` where `impl` cannot run this input.

    >>> import rgfast, torch
    >>> rgfast.eigvalsh(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    tensor([1., 3.])
    """
    return differentiable_eigenvalues(a, impl) if wants_gradient(a) else eigenvalues(a, impl)


def _measured(call: Measure, return_info: bool) -> Tensor | tuple[Tensor, SpectrumInfo]:
    if not return_info:
        return _value(call)
    if call.method == "lanczos":
        found, info = estimated(call)
    else:
        x, solved, name = spectra(call)
        found, info = measure_of(solved, call.measure, x.shape), describe(x, solved, name)
    return (differentiable(call) if wants_gradient(call.x) else found), info


def _value(call: Measure) -> Tensor:
    return differentiable(call) if wants_gradient(call.x) else value(call)


register(SPECTRUM, effective_rank, singular_values, numerical_rank, rank_measures)
register(GRAM, participation_ratio, stable_rank)
register(EIGVALSH, eigvalsh)
