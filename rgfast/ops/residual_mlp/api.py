"""The public residual block: validates, selects an implementation, documents."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rgfast import dispatch
from rgfast.dispatch import Impl, ImplName
from rgfast.ops.residual_mlp.call import Call
from rgfast.ops.residual_mlp.impl import mkl, native, triton
from rgfast.ops.residual_mlp.pinned import residual_mlp_pinned
from rgfast.ops.residual_mlp.reference import ACTIVATIONS
from rgfast.validation import as_real_tensor, check_choice

__all__ = ["ACTIVATIONS", "NORMS", "OP", "Across", "Activation", "Norm", "residual_mlp", "validated"]

Norm = Literal["layer", "rms"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"]
Across = Literal["features", "positions"]

NORMS = ("layer", "rms", None)
ACTIVATION_NAMES = tuple(ACTIVATIONS)
ACROSS = ("features", "positions")

# PyTorch's products and passes on one thread (README, "Library or ours?"); in fp64 half as many.
_FLOPS = 80e9


def _narrow(call: Call) -> bool:
    return call.x.dtype != torch.float64 and call.x.device.type == "cpu" and call.too_narrow() is not None


def _in_fp64(call: Call) -> Tensor:
    """A block of few features or hidden units keeps the error budget in fp64.

    Its gradients are sums over every row with no larger numbers beside them, whose rounding errors differ by
    more than the budget allows between one order of adding and another.
    """
    y: Tensor = OP("reference", call.to(torch.float64))
    return y.to(call.x.dtype)


def _cost(call: Call) -> float:
    return 4e-5 + call.flops() / (_FLOPS / 2 if call.x.dtype == torch.float64 else _FLOPS)


OP = dispatch.Op(
    "residual_mlp",
    [
        native.BLOCK,
        mkl.BLOCK,
        triton.BLOCK,
        Impl(
            "fp64",
            _in_fp64,
            lambda call: None if _narrow(call) else "it is for D or H below 8",
            lambda call: 2 * _cost(call),
            ("cpu",),
            route=True,
        ),
        Impl(
            "reference",
            residual_mlp_pinned,
            cost=_cost,
            by_name_only=lambda call: call.too_narrow() if _narrow(call) else None,
        ),
    ],
    also={"library": "mkl"},
)


def residual_mlp(
    x: Tensor | np.ndarray[Any, Any],
    w1: Tensor | np.ndarray[Any, Any],
    b1: Tensor | np.ndarray[Any, Any] | None,
    w2: Tensor | np.ndarray[Any, Any],
    b2: Tensor | np.ndarray[Any, Any] | None,
    *,
    norm: Norm | None = "layer",
    norm_weight: Tensor | np.ndarray[Any, Any] | None = None,
    norm_bias: Tensor | np.ndarray[Any, Any] | None = None,
    activation: Activation = "gelu",
    residual_scale: float = 1.0,
    eps: float = 1e-5,
    across: Across = "features",
    impl: ImplName = "auto",
) -> Tensor:
    """The residual block ``x + residual_scale * (act(norm(x) w1^T + b1) w2^T + b2)``, shaped like ``x``.

    Args:
        x: the residual stream, ``[..., D]``; any leading dimensions, none and zero rows included.
        w1: ``[H, D]``, as in ``nn.Linear(D, H)``; b1: ``[H]`` or None.
        w2: ``[D, H]``, as in ``nn.Linear(H, D)``; b2: ``[D]`` or None.
        across: ``"positions"`` applies the MLP to every feature of ``x[..., T, D]`` along T instead, as mixer
            blocks do: ``x + residual_scale * (act(norm(x)^T w1^T + b1) w2^T + b2)^T`` with ``w1[H, T]``,
            ``w2[T, H]`` and ``b2[T]``; the norm stays one over D.
        norm: ``"layer"`` (biased variance), ``"rms"`` or None.
        norm_weight: ``[D]`` or None for ones. norm_bias: ``[D]`` or None for zeros.
        activation: ``"gelu"`` is exact (erf), ``"gelu_tanh"`` its tanh approximation.
        residual_scale: factor of the update, dimensionless and finite.
        eps: added to the variance (or mean square) under the root.
        impl: which implementation runs; a named one never falls back.

    fp64 is computed in fp64 and fp32 in fp32. bf16 and fp16 are storage: computed in fp32, rounded once at
    the end. ``x`` and the parameters may mix fp32, bf16 and fp16 (autocast regions hand over such mixtures);
    fp64 mixes with nothing. The result has the dtype and device of ``x``. Autocast does not reach inside.
    ``impl="triton"`` multiplies as eager PyTorch would on a GPU instead: in bf16 or fp16 if ``x`` and both
    weights are, in autocast's type inside its region, and in TF32 if torch is set to allow that.
    Differentiable in every tensor argument.

    Raises:
        TypeError: an argument is not a floating tensor or array, fp64 is mixed with a narrower type, or
            ``residual_scale`` or ``eps`` is not a number.
        ValueError: shapes do not fit, devices differ, a name is unknown, ``norm_weight`` or ``norm_bias``
            comes with ``norm=None``, ``residual_scale`` is not finite, or ``eps`` is negative or not finite.
        ImplUnavailable: the named ``impl`` cannot run this input; the message says why.

    The pre-norm block of Xiong et al. 2020 (arXiv 2002.04745) without attention; across positions the token
    mixing of Tolstikhin et al. 2021 (arXiv 2105.01601).

    >>> import rgfast, torch
    >>> x = torch.randn(5, 12, 16)
    >>> w1, w2 = torch.randn(64, 16), torch.zeros(16, 64)
    >>> torch.equal(rgfast.residual_mlp(x, w1, None, w2, None), x)
    True
    """
    given = (x, w1, b1, w2, b2, norm_weight, norm_bias, norm, activation, residual_scale, eps, across)
    y: Tensor = OP(impl, validated(given))
    return y


def validated(given: tuple[Any, ...], at: str = "") -> Call:
    """The fields of a call as implementations take them: tensors that fit together, floats, known names.

    ``at`` is put behind the names of parameters in messages.
    """
    x, w1, b1, w2, b2, norm_weight, norm_bias, norm, activation, residual_scale, eps, across = given
    if across not in ACROSS:
        check_choice(across, "across", ACROSS)
    least = 2 if across == "positions" else 1
    if (
        type(x) not in _PLAIN
        or x.dtype is not torch.float32
        or x.layout is not torch.strided
        or x.dim() < least
    ):
        x = as_real_tensor(x, "x", min_dim=least)
    features: int = x.size(-1)
    if features < 1:
        raise ValueError(
            f"x must have at least one feature in its last dimension, got shape {tuple(x.shape)}"
        )
    width = x.size(-least)
    if width < 1:
        raise ValueError(f"x must have at least one position to mix, got shape {tuple(x.shape)}")
    w1 = _parameter(w1, f"w1{at}", x)
    if w1.dim() != 2 or w1.size(1) != width or w1.size(0) < 1:
        raise ValueError(f"w1{at} must have shape [H, {width}] with H >= 1, got {tuple(w1.shape)}")
    hidden = w1.size(0)
    w2 = _parameter(w2, f"w2{at}", x)
    if w2.dim() != 2 or w2.size(0) != width or w2.size(1) != hidden:
        raise ValueError(f"w2{at} must have shape [{width}, {hidden}], got {tuple(w2.shape)}")
    b1 = _vector(b1, f"b1{at}", x, hidden)
    b2 = _vector(b2, f"b2{at}", x, width)
    if norm not in NORMS:
        check_choice(norm, "norm", NORMS)
    if norm is None:
        for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
            if value is not None:
                raise ValueError(f"{name}{at} must be None where norm=None, got {_kind(value)}")
    norm_weight = _vector(norm_weight, f"norm_weight{at}", x, features)
    norm_bias = _vector(norm_bias, f"norm_bias{at}", x, features)
    if activation not in ACTIVATION_NAMES:
        check_choice(activation, "activation", ACTIVATION_NAMES)
    residual_scale = _number(residual_scale, "residual_scale")
    eps = _number(eps, "eps")
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    return Call(x, w1, b1, w2, b2, norm_weight, norm_bias, norm, activation, residual_scale, eps, across)


# Small blocks are called thousands of times a second: what nearly every argument is, is checked first.
_PLAIN = (Tensor, torch.nn.Parameter)


def _parameter(value: Any, name: str, x: Tensor) -> Tensor:
    plain = type(value) in _PLAIN and value.dtype is x.dtype and value.layout is torch.strided
    tensor: Tensor = value if plain else as_real_tensor(value, name)
    if not plain and tensor.dtype != x.dtype and torch.float64 in (tensor.dtype, x.dtype):
        raise TypeError(
            f"{name} must be {_plain(x.dtype)} like x if either is float64, got {_plain(tensor.dtype)}"
        )
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")
    return tensor


def _vector(value: Any, name: str, x: Tensor, length: int) -> Tensor | None:
    if value is None:
        return None
    tensor = _parameter(value, name, x)
    if tensor.dim() != 1 or tensor.size(0) != length:
        raise ValueError(f"{name} must have shape [{length}] or be None, got {tuple(tensor.shape)}")
    return tensor


def _number(value: Any, name: str) -> float:
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"a value of shape {tuple(shape)}" if shape is not None else type(value).__name__


dispatch.register(OP, residual_mlp)
