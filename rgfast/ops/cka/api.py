"""Public functions of the room: CKA, HSIC and kernel drift of representations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from rgfast.dispatch import Impl, ImplName, Op, register
from rgfast.ops.cka import reference
from rgfast.ops.cka.call import Call
from rgfast.ops.cka.checks import as_layers, as_pair, check_call, check_rows, check_same_rows
from rgfast.ops.cka.impl import cuda, library, native, triton
from rgfast.runtime.threads import on_one_thread
from rgfast.validation import check_choice, check_number, check_positive_int

__all__ = [
    "alignment",
    "cka",
    "cka_matrix",
    "cka_null",
    "hsic",
    "kernel_change",
    "kernel_drift",
    "minibatch_cka",
]

Kernel = Literal["linear", "rbf"]
Precision = Literal["double", "single"]


def _reference(call: Call) -> Tensor:
    """The reference on one thread: the library's bits depend on their number."""
    check_call(call)
    given = (call.first, call.second)[: len(call.names)]
    options = {name: value for name, value in call.options if name != "precision"}

    def run(*tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        sides = [
            side if side is None else next(rest) if isinstance(side, Tensor) else [next(rest) for _ in side]
            for side in given
        ]
        value: Tensor = reference.run(call.task, *sides, **options)
        return value

    return on_one_thread(run, *(x for side in call.sides for x in side))


def _reference_cost(call: Call) -> float:
    """Passes over the data and fp64 products of PyTorch on one thread (README, "Against others")."""
    if call.device.type == "cpu":
        return 5e-4 + call.multiplications() / 8e9
    return 2.0 * library.CKA.cost(call)


OP = Op(
    "cka",
    [
        native.CKA,
        cuda.CKA,
        triton.CKA,
        library.CKA,
        Impl("reference", _reference, cost=_reference_cost),
    ],
)


def alignment(
    layers: Sequence[Tensor], *, adjacent: bool, groups: int = 1, impl: ImplName = "auto"
) -> Tensor:
    """Debiased and biased CKA ``[V, 2, ..., L, L]`` (fp64) of ``layers[l][..., n, d]``, in one pass.

    The values of :func:`cka_matrix`, NaN beside constant layers and, if ``adjacent``, for all pairs but
    neighbours; those of close neighbours are as good as 1 − :func:`kernel_drift`. V is 1; with ``groups`` of
    samples i, i + groups, ... it is 1 + groups: of all samples, then of all but each group. Raises ValueError
    for NaN or Inf.
    """
    checked = as_layers(layers, "layers")
    lead = checked[0].shape[:-2]
    if len(lead) != 1:
        checked = tuple(x.reshape(math.prod(lead), *x.shape[-2:]) for x in checked)
    options = (("adjacent", adjacent), ("groups", groups))
    value: Tensor = OP(impl, Call("alignment", ("layers",), checked, options=options))
    return value if len(lead) == 1 else value.reshape(*value.shape[:2], *lead, *value.shape[3:])


def cka(
    x: Any,
    y: Any,
    *,
    debiased: bool = True,
    kernel: Kernel = "linear",
    threshold: float = 1.0,
    bandwidth: float | None = None,
    impl: ImplName = "auto",
) -> Tensor:
    """Centred kernel alignment ``[...]`` (fp64) of ``x[..., n, d]`` and ``y[..., n, d']``.

    ⟨K, L⟩/(‖K‖‖L‖) of the centred kernels (Kornblith et al. 2019); ``debiased`` (the default, because the
    level of a CKA is what is read) uses the U-centred ones, the ratio of HSIC_1 of Song et al. 2012: it is 0
    in the mean for independent data, and negative values stay. Biased values of independent noise are not 0:
    see :func:`cka_null`. Any of fp64, fp32, bf16, fp16; every sum is fp64. A layer without variance gives
    NaN, with zero gradient. Differentiable, in forward mode too.

    ``kernel="rbf"`` takes exp(−‖x_i − x_j‖²/(2σ²)), σ² = ``threshold``² times the median squared distance (as
    Kornblith's notebook), or σ = ``bandwidth`` in the units of the data; it holds two n×n kernels, and is NaN
    where that median is 0.

    Raises TypeError for anything but dense floating tensors or arrays, and under ``torch.vmap``; ValueError
    for shapes that do not fit, NaN or Inf, a ``debiased`` that is neither True nor False, fewer than 4
    samples if it is True, and a threshold or bandwidth that is not positive or comes with a linear kernel.

    >>> import numpy as np, rgfast
    >>> np.random.seed(1337)
    >>> x = np.random.randn(100, 10)
    >>> y = np.random.randn(100, 10) + x
    >>> round(float(rgfast.cka(x, y)), 10), round(float(rgfast.cka(x, y, debiased=False)), 10)
    (0.5134564895, 0.5576132566)
    """
    value: Tensor = OP(impl, _pair(x, y, debiased, kernel, threshold, bandwidth, normalized=True))
    return value


def hsic(
    x: Any,
    y: Any,
    *,
    debiased: bool = True,
    kernel: Kernel = "linear",
    threshold: float = 1.0,
    bandwidth: float | None = None,
    impl: ImplName = "auto",
) -> Tensor:
    """Hilbert–Schmidt independence criterion ``[...]`` (fp64) of ``x[..., n, d]`` and ``y[..., n, d']``.

    ``debiased``: HSIC_1 = ⟨K_U, L_U⟩/(n(n−3)) (Song et al. 2012), else HSIC_0 = ⟨K_c, L_c⟩/(n−1)² (Gretton et
    al. 2005), in units of (x·y)². Kernels, dtypes and errors as in :func:`cka`; data without variance give 0.

    >>> import rgfast, torch
    >>> x = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    >>> float(rgfast.hsic(x, x, debiased=False))
    1.0
    """
    value: Tensor = OP(impl, _pair(x, y, debiased, kernel, threshold, bandwidth, normalized=False))
    return value


def cka_matrix(
    layers: Any,
    other: Any = None,
    *,
    debiased: bool = True,
    sample_limit: int = 4096,
    precision: Precision | None = None,
    impl: ImplName = "auto",
) -> Tensor:
    """Linear CKA ``[..., L, L']`` (fp64) of every layer with every layer, or with every layer of ``other``.

    ``layers[L, ..., n, d]``, or a sequence of ``[..., n, d_l]`` of different widths; ``other`` likewise, on
    the same samples. Rows follow ``layers``, columns ``other``, both in the order given. Definitions,
    precision and errors as in :func:`cka`. Rows and columns of a layer without variance are NaN.

    Gram tiles over samples are used up to n = ``sample_limit`` where they are cheaper than d×d moments; both
    routes are exact, and neither holds an n×n kernel per layer. ``precision="single"`` lets the compiled
    kernels multiply fp32 or half data in fp32 (after centring, with sums of at most 128 products in fp32 and
    all others in fp64: errors of 1e-9, up to 5e-7 where few features carry the layer), ``"double"`` in fp64;
    None takes the first where it pays and no digits cancel. On a GPU ``"single"`` lets the kernels in Triton
    split numbers into two of half precision (errors of 1e-6 at most; fp64 is used where digits would cancel),
    None only if the GPU is slow in fp64. fp64 data are always multiplied in fp64.

    >>> import rgfast, torch
    >>> layers = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0))
    >>> [round(float(value), 3) for value in rgfast.cka_matrix(layers).diagonal()]
    [1.0, 1.0, 1.0]
    """
    value: Tensor = OP(impl, _matrix(layers, other, debiased, sample_limit, precision))
    return value


def kernel_drift(
    layers: Any, *, debiased: bool = False, precision: Precision | None = None, impl: ImplName = "auto"
) -> Tensor:
    """Kernel drift 1 − CKA(l, l+1) ``[..., L-1]`` (fp64) between neighbours of ``layers[L, ..., n, d]``.

    Biased by default, where :func:`cka` is not: of a drift one reads differences, and the biased one is never
    negative. Computed as ½‖K̂_l − K̂_{l+1}‖² of unit-norm centred kernels, so that a drift of 1e-9, or of
    1e-20, keeps its digits. A sequence of ``[..., n, d_l]`` will do. NaN beside a layer without variance,
    with zero gradient. Blind to scale: see :func:`kernel_change`. ``precision`` as in :func:`cka_matrix`;
    with None drifts that fp32 products would blur are computed again in fp64. Errors as in :func:`cka`.

    >>> import rgfast, torch
    >>> x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    >>> rgfast.kernel_drift([x, 2 * x])
    tensor([0.], dtype=torch.float64)
    """
    checked = as_layers(layers, "layers")
    check_choice(debiased, "debiased", (True, False))
    check_rows(checked[0].shape[-2], "layers", debiased)
    check_choice(precision, "precision", (None, "double", "single"))
    options = (("debiased", debiased), ("precision", precision))
    value: Tensor = OP(impl, Call("drift", ("layers",), checked, options=options))
    return value


def kernel_change(layers: Any) -> Tensor:
    """Relative change ‖K_{l+1} − K_l‖/‖K_l‖ ``[..., L-1]`` (fp64) of neighbouring layers’ centred kernels.

    The drift that sees scale: it is 0 only where the kernel itself stays, and s² − 1 where a layer only
    multiplies by s > 1. ``layers`` as in :func:`kernel_drift`; NaN where layer l has no variance.

    >>> import rgfast, torch
    >>> x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    >>> round(float(rgfast.kernel_change([x, 2 * x])), 12)
    3.0
    """
    checked = as_layers(layers, "layers")
    value: Tensor = OP("reference", Call("change", ("layers",), checked))
    return value


def minibatch_cka(
    layers: Any, other: Any = None, *, batch_size: int = 256, impl: ImplName = "auto"
) -> Tensor:
    """Minibatch CKA ``[..., L, L']`` (fp64) of Nguyen et al. 2021: mean HSIC_1 over batches, then the ratio.

    The samples are cut, in order, into ceil(n/batch_size) batches (fewer where these would hold less than 4)
    whose sizes differ by at most one, so that there is no ragged rest. Not the CKA of the whole data
    (:func:`cka_matrix` gives that, exactly, at any n); it is here to compare with work that used it.
    ``layers`` and ``other`` as in :func:`cka_matrix`.

    Raises what :func:`cka` does, and ValueError for a ``batch_size`` below 4.

    >>> import rgfast, torch
    >>> layers = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))
    >>> one = rgfast.minibatch_cka(layers, batch_size=64)
    >>> torch.allclose(one, rgfast.cka_matrix(layers))
    True
    """
    call = _matrix(layers, other, True, 4096, None)
    check_positive_int(batch_size, "batch_size")
    if batch_size < 4:
        raise ValueError(f"batch_size must be at least 4, got {batch_size}")
    n = call.first[0].shape[-2]
    batches = max(min(math.ceil(n / batch_size), n // 4), 1)
    bounds = tuple(n * k // batches for k in range(batches + 1))
    call = call._replace(task="minibatch", options=(*call.options, ("bounds", bounds)))
    value: Tensor = OP(impl, call)
    return value


def cka_null(n: int, p1: int, p2: int) -> float:
    """Biased linear CKA that independent Gaussian noise of ``n`` samples and ``p1``, ``p2`` features shows.

    [(1 + n/p1)(1 + n/p2)]^(-1/2), its limit at large n and p: 0.94 at n=256, p=4096. Report it beside a
    biased value. Raises TypeError or ValueError unless all three are positive numbers.

    >>> import rgfast
    >>> round(rgfast.cka_null(256, 4096, 4096), 2)
    0.94
    """
    for name, value in (("n", n), ("p1", p1), ("p2", p2)):
        check_number(value, name)
        if not value > 0 or not math.isfinite(value):
            raise ValueError(f"{name} must be positive, got {value!r}")
    return 1.0 / math.sqrt((1.0 + n / p1) * (1.0 + n / p2))


def _pair(
    x: Any,
    y: Any,
    debiased: bool,
    kernel: str,
    threshold: float,
    bandwidth: float | None,
    normalized: bool,
) -> Call:
    check_choice(kernel, "kernel", ("linear", "rbf"))
    first, second = as_pair(x, y)
    check_choice(debiased, "debiased", (True, False))
    check_rows(first.shape[-2], "x", debiased)
    call = Call("cka" if normalized else "hsic", ("x", "y"), first, second, (("debiased", debiased),))
    if kernel == "linear":
        for name, value, usual in (("threshold", threshold, 1.0), ("bandwidth", bandwidth, None)):
            if value != usual:
                raise ValueError(
                    f"{name} is an option of kernel='rbf', and kernel is 'linear': got {value!r}"
                )
        return call
    for name, value in (("threshold", threshold), ("bandwidth", bandwidth)):
        if value is None:
            continue
        check_number(value, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value!r}")
    more = (("threshold", threshold), ("bandwidth", bandwidth), ("normalized", normalized))
    return call._replace(task="rbf", options=(*call.options, *more))


def _matrix(layers: Any, other: Any, debiased: bool, sample_limit: int, precision: str | None) -> Call:
    first = as_layers(layers, "layers")
    second = None if other is None else as_layers(other, "other")
    if second is not None:
        check_same_rows(first[0], second[0], ("layers", "other"))
    check_choice(debiased, "debiased", (True, False))
    check_rows(first[0].shape[-2], "layers", debiased)
    check_positive_int(sample_limit, "sample_limit")
    check_choice(precision, "precision", (None, "double", "single"))
    options = (("debiased", debiased), ("sample_limit", sample_limit), ("precision", precision))
    return Call("matrix", ("layers", "other"), first, second, options)


def _either(x: Any, y: Any = None, **options: Any) -> Tensor:
    """CKA of two representations, or of all pairs of layers."""
    return cka_matrix(x, y, **options) if y is None or isinstance(x, (list, tuple)) else cka(x, y, **options)


register(OP, _either, cka, cka_matrix, hsic, kernel_drift, kernel_change, minibatch_cka)
