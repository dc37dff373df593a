"""Public functions of the room: what neighbors, rotations and distances have in common; calibration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from rgfast.dispatch import Impl, ImplName, Op, register
from rgfast.ops.cka import cka, cka_matrix
from rgfast.ops.cka.checks import as_layers, as_pair, check_finite, check_rows, check_same_rows
from rgfast.ops.device import by_itself
from rgfast.ops.similarity import reference
from rgfast.ops.similarity.calibrated import Calibrated
from rgfast.ops.similarity.call import Call
from rgfast.ops.similarity.impl import library
from rgfast.ops.similarity.permutations import orders
from rgfast.validation import check_choice, check_integer, check_number, check_positive_int, kind_of

__all__ = ["MEASURES", "calibrate", "mutual_knn", "procrustes", "rsa", "similarity_matrix"]

Metric = Literal["cosine", "euclidean"]
Measure = str | Callable[..., Any]

# What is measured, with its options as they are if not given, and the fewest samples it takes.
_OPTIONS: dict[str, dict[str, Any]] = {
    "cka": {"debiased": True},
    "mutual_knn": {"k": 10, "metric": "cosine"},
    "procrustes": {},
    "rsa": {},
}
_LEAST = {"procrustes": 2, "rsa": 3}
_MOST_RANKED = 1 << 16  # samples whose distances are ranked in int32
MEASURES = tuple(_OPTIONS)


def _reference(call: Call) -> Tensor:
    with torch.no_grad(), by_itself(call.device.type):
        return reference.run(call)


OP = Op(
    "similarity",
    [
        library.SIMILARITY,
        # It prepares every layer anew for every pair and order, by rows.
        Impl("reference", _reference, cost=lambda call: 4.0 * library.SIMILARITY.cost(call)),
    ],
)


def mutual_knn(x: Any, y: Any, *, k: int = 10, metric: Metric = "cosine", impl: ImplName = "auto") -> Tensor:
    """Share ``[...]`` (fp64) of nearest neighbors that ``x[..., n, d]`` and ``y[..., n, e]`` have in common.

    The mean over samples of |N_k(x_i) ∩ N_k(y_i)|/k (Huh et al. 2024): 1 where every sample has the same
    neighbors, k/(n − 1) by chance. Neighbors are by cosine of the rows as given, or by Euclidean distance; a
    sample is none of its own, and ties go to the lower index. Copies of a row are exactly as far from all
    others as the row is. A row of zeros has cosine 0 with every row. Any of fp64, fp32, bf16, fp16;
    distances are fp64. Not differentiable.

    Raises TypeError for anything but floating tensors or arrays, ValueError for shapes that do not fit, NaN
    or Inf, a ``k`` that is not below n, an unknown ``metric``.

    >>> import rgfast, torch
    >>> x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    >>> rgfast.mutual_knn(x, 3 * x)
    tensor(1., dtype=torch.float64)
    """
    return _pair("mutual_knn", x, y, {"k": k, "metric": metric}, impl)


def procrustes(x: Any, y: Any, *, impl: ImplName = "auto") -> Tensor:
    """Procrustes similarity ``[...]`` (fp64) of ``x[..., n, d]`` and ``y[..., n, e]``.

    ‖x_cᵀy_c‖_* / (‖x_c‖_F ‖y_c‖_F) of centered columns, 0 to 1: 1 where a rotation maps one to the other,
    blind to offset and scale (Schönemann 1966). The distance of Ding et al. 2021 is 2 − 2 times this,
    SciPy's disparity 1 minus its square. NaN beside a layer without variance. Any of fp64, fp32, bf16, fp16;
    computed in fp64 by singular values. High by chance where features are many: see :func:`calibrate`. Not
    differentiable.

    Raises TypeError for anything but floating tensors or arrays, ValueError for shapes that do not fit, NaN
    or Inf, fewer than 2 samples.

    >>> import rgfast, torch
    >>> x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    >>> round(float(rgfast.procrustes(x, 2 * x.flip(-1) + 1)), 6)
    1.0
    """
    return _pair("procrustes", x, y, {}, impl)


def rsa(x: Any, y: Any, *, impl: ImplName = "auto") -> Tensor:
    """Spearman correlation ``[...]`` (fp64) of distances in ``x[..., n, d]`` and in ``y[..., n, e]``.

    Representational similarity analysis (Kriegeskorte et al. 2008) over the Euclidean distances of all
    n(n−1)/2 pairs of samples, −1 to 1, with mean ranks for equal distances. NaN where all distances of one
    side are equal. Any of fp64, fp32, bf16, fp16; distances and sums are fp64. Takes about 16n² bytes. Not
    differentiable.

    Raises TypeError for anything but floating tensors or arrays, ValueError for shapes that do not fit, NaN
    or Inf, fewer than 3 samples.

    >>> import rgfast, torch
    >>> x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    >>> round(float(rgfast.rsa(x, 2 * x + 1)), 6)
    1.0
    """
    return _pair("rsa", x, y, {}, impl)


def similarity_matrix(
    measure: str, layers: Any, other: Any, *, impl: ImplName = "auto", **options: Any
) -> Tensor:
    """A measure ``[..., L, L']`` (fp64) of every layer with every layer of ``other``.

    ``layers`` and ``other`` are sequences of ``[..., n, d_l]`` on the same samples; ``measure``, its options
    and errors as in :func:`calibrate`.

    >>> import torch
    >>> from rgfast.ops.similarity import similarity_matrix
    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> similarity_matrix("mutual_knn", [x, x + 1], [x], k=5).shape
    torch.Size([2, 1])
    """
    check_choice(measure, "measure", MEASURES)
    if measure == "cka":
        return cka_matrix(layers, other, impl=impl, **options)
    first, second = as_layers(layers, "layers"), as_layers(other, "other")
    check_same_rows(first[0], second[0], ("layers", "other"))
    return _values(measure, ("layers", "other"), first, second, _first_order(first), options, impl)[0]


def calibrate(
    measure: Measure,
    x: Any,
    y: Any,
    *,
    null: int = 200,
    seed: int = 0,
    sequences: Any = None,
    alpha: float = 0.05,
    maximum: float = 1.0,
    impl: ImplName = "auto",
    **options: Any,
) -> Calibrated:
    """A measure of ``x[..., n, d]`` and ``y[..., n, e]`` beside its values under permutations of y's samples.

    What a measure shows of no relation depends on the measure, n and the widths; this takes it from the
    data: value, ``null_mean``, ``threshold`` τ at level ``alpha``, ``score`` (value − τ)/(``maximum`` − τ)
    and ``p`` = (1 + #{null ≥ value})/(``null`` + 1) (Gröger, Wen and Brbić 2026, arXiv 2602.14486).
    :func:`cka_null` is the mean of biased CKA's null for Gaussian noise, in closed form.

    ``measure`` is ``"cka"`` (linear; option ``debiased=True``), ``"mutual_knn"`` (options ``k``,
    ``metric``), ``"procrustes"``, ``"rsa"``, or a function of x and y that returns a number, or a tensor
    ``[...]`` if there are leading dimensions, and gets the other options. What named measures need of a
    layer is prepared once for all permutations; a function is called for each.

    With lists of layers ``[..., n, d_l]`` for both x and y fields end in ``[L, L']``. All pairs and leading
    dimensions share their permutations, so that :meth:`Calibrated.best` corrects p for the choice of a best
    match.

    Samples that are independent of each other are permuted on their own. If they are not, such as the tokens
    of a text, give the id of the sequence each is from as ``sequences[n]`` (whole numbers): sequences of the
    same number of rows then change places as they are. The same ``seed`` gives the same permutations. Any of
    fp64, fp32, bf16, fp16; computed in fp64. Not differentiable.

    Raises TypeError or ValueError for what the measure refuses, unknown measures and options, ``null`` below
    1, an ``alpha`` outside (0, 1), and sequences that do not fit or of which no two have the same number of
    rows.

    >>> import rgfast, torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> x, noise = torch.randn(2, 100, 8, generator=generator)
    >>> related = rgfast.calibrate("mutual_knn", x, x + noise)
    >>> round(float(related.p), 3), round(float(rgfast.mutual_knn(x, x + noise)), 2)
    (0.005, 0.28)
    >>> bool(rgfast.calibrate("mutual_knn", x, noise).p > 0.05)
    True
    """
    known = _named(measure, options)
    check_positive_int(null, "null")
    check_integer(seed, "seed", least=0)
    for name, number in (("alpha", alpha), ("maximum", maximum)):
        check_number(number, name)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha!r}")
    if not (math.isfinite(maximum) and maximum > 0):
        raise ValueError(f"maximum must be a positive number, got {maximum!r}")
    listed = [isinstance(side, (list, tuple)) for side in (x, y)]
    if listed[0] != listed[1]:
        kinds = ["a list of layers" if each else "one representation" for each in listed]
        raise TypeError(f"y must be of the kind of x, {kinds[0]}, got {kinds[1]}")
    if listed[0]:
        first, second = as_layers(x, "x"), as_layers(y, "y")
        check_same_rows(first[0], second[0], ("x", "y"))
    else:
        first, second = ((side,) for side in as_pair(x, y))
    n = first[0].shape[-2]
    every = torch.cat([_first_order(first), orders(n, int(null), int(seed), sequences)])
    if known is not None:
        values = _values(known, ("x", "y"), first, second, every, options, impl)
    else:
        values = _of_function(measure, first, second, every, options)
    if not listed[0]:
        values = values[..., 0, 0]
    return Calibrated(values[0], values[1:], float(alpha), float(maximum))


def _pair(measure: str, x: Any, y: Any, options: dict[str, Any], impl: ImplName) -> Tensor:
    first, second = ((side,) for side in as_pair(x, y))
    return _values(measure, ("x", "y"), first, second, _first_order(first), options, impl)[0, ..., 0, 0]


def _first_order(layers: tuple[Tensor, ...]) -> Tensor:
    return torch.arange(layers[0].shape[-2], dtype=torch.int64, device="cpu")[None]


def _values(
    measure: str,
    names: tuple[str, str],
    first: tuple[Tensor, ...],
    second: tuple[Tensor, ...],
    every: Tensor,
    options: dict[str, Any],
    impl: ImplName,
) -> Tensor:
    """``[1 + m, ..., L, L']`` of checked layers in every order of the second's samples."""
    unknown = [name for name in options if name not in _OPTIONS[measure]]
    if unknown:
        known = ", ".join(_OPTIONS[measure]) or "none"
        raise TypeError(f"options of {measure} are {known}, got {unknown[0]!r}")
    options = {**_OPTIONS[measure], **options}
    n = first[0].shape[-2]
    if measure == "cka":
        check_choice(options["debiased"], "debiased", (True, False))
        check_rows(n, names[0], options["debiased"])
    elif measure == "mutual_knn":
        check_choice(options["metric"], "metric", ("cosine", "euclidean"))
        check_positive_int(options["k"], "k")
        if options["k"] >= n:
            raise ValueError(f"k must be less than the {n} samples, got {options['k']}")
    elif n < _LEAST[measure]:
        raise ValueError(f"{names[0]} must have at least {_LEAST[measure]} samples, got {n}")
    elif measure == "rsa" and n > _MOST_RANKED:
        raise ValueError(f"{names[0]} must have at most {_MOST_RANKED} samples for RSA, got {n}")
    call = Call(measure, first, second, every, tuple(options.items()))
    for side, name in zip((first, second), names, strict=True):
        check_finite(side, name, stacked=len(side) > 1)
    values: Tensor = OP(impl, call)
    return values


def _named(measure: Measure, options: dict[str, Any]) -> str | None:
    """The name of a measure, also if it is one of our functions; None for one that has to be called."""
    if not isinstance(measure, str):
        if not callable(measure):
            raise TypeError(f"measure must be a name or a function, got {kind_of(measure)}")
        ours: dict[Any, str] = {cka: "cka", mutual_knn: "mutual_knn", procrustes: "procrustes", rsa: "rsa"}
        name = ours.get(measure)
        return name if name is not None and options.keys() <= _OPTIONS[name].keys() else None
    if measure not in MEASURES:
        names = ", ".join(map(repr, MEASURES))
        raise ValueError(f"measure must be one of {names} or a function, got {measure!r}")
    return measure


def _of_function(
    function: Any,
    first: tuple[Tensor, ...],
    second: tuple[Tensor, ...],
    every: Tensor,
    options: dict[str, Any],
) -> Tensor:
    lead = first[0].shape[:-2]
    shape = (len(every), *lead, len(first), len(second))
    out = torch.empty(shape, dtype=torch.float64, device=first[0].device)
    for k, order in enumerate(every.to(out.device)):
        for j, y in enumerate(second):
            reordered = y.index_select(-2, order)
            for i, x in enumerate(first):
                found = torch.as_tensor(
                    function(x, reordered, **options), dtype=torch.float64, device=out.device
                ).detach()
                if found.shape != lead:
                    raise ValueError(
                        f"measure must return a number or tensor of shape {tuple(lead)}, got shape "
                        f"{tuple(found.shape)}"
                    )
                out[k, ..., i, j] = found
    return out


register(OP, mutual_knn, procrustes, rsa, calibrate)
