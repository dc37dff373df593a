"""Public function of the room: the intrinsic dimension of a representation."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from rgfast.dispatch import Impl, ImplName, Op, register
from rgfast.ops.cka.checks import check_finite
from rgfast.ops.device import by_itself
from rgfast.ops.intrinsic_dimension import reference
from rgfast.ops.intrinsic_dimension.call import Call, DimensionInfo
from rgfast.ops.intrinsic_dimension.impl import library
from rgfast.validation import as_real_tensor, check_choice, check_readable

__all__ = ["intrinsic_dimension"]

Method = Literal["twonn"]


def _reference(call: Call) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), by_itself(call.device.type):
        return reference.run(call)


OP = Op(
    "intrinsic_dimension",
    [
        library.DIMENSION,
        Impl("reference", _reference, cost=lambda call: 4.0 * library.DIMENSION.cost(call)),
    ],
)


@overload
def intrinsic_dimension(
    x: Any, *, method: Method = "twonn", return_info: Literal[False] = False, impl: ImplName = "auto"
) -> Tensor: ...


@overload
def intrinsic_dimension(
    x: Any, *, method: Method = "twonn", return_info: Literal[True], impl: ImplName = "auto"
) -> tuple[Tensor, DimensionInfo]: ...


def intrinsic_dimension(
    x: Any, *, method: Method = "twonn", return_info: bool = False, impl: ImplName = "auto"
) -> Tensor | tuple[Tensor, DimensionInfo]:
    """Intrinsic dimension ``[...]`` (fp64) of the n samples of ``x[..., n, d]``.

    TwoNN (Facco et al. 2017): (n − 1)/Σ ln(r₂/r₁) over samples, r₁ and r₂ the Euclidean distances to the
    two nearest others, which takes the density to be even on that scale only. Rows that equal another
    exactly are dropped first; with ``return_info`` a :class:`DimensionInfo` says how many. NaN for fewer
    than 3 distinct rows, infinite if both distances are equal everywhere. Low where the dimension is high
    and samples are few (about 17 for 1,000 samples of a Gaussian in 20 dimensions). Any of fp64, fp32,
    bf16, fp16; distances are fp64. Not differentiable.

    Raises TypeError for anything but floating tensors or arrays, ValueError for fewer than 3 samples, no
    feature, NaN or Inf, an unknown ``method``.

    >>> import rgfast, torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> plane = torch.rand(2000, 2, generator=generator) @ torch.randn(2, 50, generator=generator)
    >>> round(float(rgfast.intrinsic_dimension(plane)), 1)
    2.0
    """
    check_choice(method, "method", ("twonn",))
    x = as_real_tensor(x, "x", min_dim=2)
    check_readable(x, "x")
    if x.shape[-2] < 3 or x.shape[-1] == 0:
        raise ValueError(f"x must have at least 3 samples and one feature, got shape {tuple(x.shape)}")
    check_finite([x], "x", stacked=False)
    values, samples = OP(impl, Call(x))
    if not return_info:
        found: Tensor = values
        return found
    return values, DimensionInfo(samples, x.shape[-2] - samples)


register(OP, intrinsic_dimension)
