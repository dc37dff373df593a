"""What the room's functions take, and the sentence they say otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rgfast.ops.cka.call import Call
from rgfast.validation import as_real_tensor, check_readable

__all__ = ["as_layers", "as_pair", "check_call", "check_finite", "check_rows", "check_same_rows"]


def as_layers(value: Any, name: str) -> tuple[Tensor, ...]:
    """``value[L, ..., n, d]``, or a sequence of ``[..., n, d_l]``, as a tuple of layers."""
    if not isinstance(value, (list, tuple)):
        layers = as_real_tensor(value, name, min_dim=3).unbind(0)
    else:
        layers = tuple(as_real_tensor(layer, f"{name}[{i}]", min_dim=2) for i, layer in enumerate(value))
    for layer in layers:
        check_readable(layer, name, differentiable=True)
    if not layers:
        raise ValueError(f"{name} must hold at least one layer, got none")
    first = layers[0]
    for i, layer in enumerate(layers):
        if layer.shape[:-1] != first.shape[:-1]:
            raise ValueError(
                f"{name} must have layers of one shape but for the last dimension, got {tuple(first.shape)} "
                f"in layer 0 and {tuple(layer.shape)} in layer {i}"
            )
        if layer.device != first.device:
            raise ValueError(
                f"{name} must lie on one device, got {first.device} in layer 0 and "
                f"{layer.device} in layer {i}"
            )
        if layer.shape[-2] == 0 or layer.shape[-1] == 0:
            raise ValueError(
                f"{name} must have at least one sample and one feature, got shape {tuple(layer.shape)} "
                f"in layer {i}"
            )
    return layers


def as_pair(x: Any, y: Any, names: tuple[str, str] = ("x", "y")) -> tuple[Tensor, Tensor]:
    """``x[..., n, d]`` and ``y[..., n, d']`` of the same leading dimensions and samples."""
    first, second = as_real_tensor(x, names[0], min_dim=2), as_real_tensor(y, names[1], min_dim=2)
    for value, name in ((first, names[0]), (second, names[1])):
        check_readable(value, name, differentiable=True)
        if value.shape[-2] == 0 or value.shape[-1] == 0:
            raise ValueError(
                f"{name} must have at least one sample and one feature, got shape {tuple(value.shape)}"
            )
    check_same_rows(first, second, names)
    return first, second


def check_same_rows(x: Tensor, y: Tensor, names: tuple[str, str]) -> None:
    """Raise unless ``x`` and ``y`` agree in everything but their last dimension."""
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"{names[1]} must have the leading dimensions and samples of {names[0]}, {tuple(x.shape[:-1])}, "
            f"got {tuple(y.shape[:-1])}"
        )
    if x.device != y.device:
        raise ValueError(f"{names[1]} must lie on the device of {names[0]}, {x.device}, got {y.device}")


def check_rows(n: int, name: str, debiased: bool) -> None:
    """Raise unless ``n`` samples are enough: HSIC_1 divides by n(n−3)."""
    if debiased and n < 4:
        raise ValueError(f"{name} must have at least 4 samples for a debiased estimate, got {n}")


def check_call(call: Call) -> None:
    """Raise naming argument, layer, position and count where a call holds NaN or Inf."""
    for side, name in zip((call.first, call.second), call.names, strict=False):
        if isinstance(side, Tensor):
            check_finite([side], name, stacked=False)
        elif side is not None:
            check_finite(side, name)


def check_finite(layers: Sequence[Tensor], name: str, *, stacked: bool = True) -> None:
    """Raise naming layer, position and count where a layer holds NaN or Inf."""
    for i, layer in enumerate(layers):
        if layer.numel() == 0:
            continue
        low, high = torch.aminmax(layer.detach())  # one pass, and NaN comes through
        if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
            continue
        bad = ~torch.isfinite(layer)
        count = int(bad.sum())
        places = bad.flatten(-2).any(-1)
        where = f" in layer {i}" if stacked else ""
        if places.dim():
            position = tuple(int(k) for k in places.nonzero()[0])
            where += f" at position {position[0] if len(position) == 1 else position}"
            if int(places.sum()) > 1:
                where += f" and {int(places.sum()) - 1} more"
        raise ValueError(f"{name} must be finite, got {count} NaN or Inf values{where}")
