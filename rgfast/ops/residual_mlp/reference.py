"""The residual block in plain PyTorch: the specification that every other implementation is held to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "residual_mlp_reference"]

# gelu: x Phi(x), Hendrycks & Gimpel 2016 (arXiv 1606.08415), gelu_tanh its tanh approximation there;
# silu: x sigmoid(x), same paper, section 4.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def residual_mlp_reference(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str | None,
    activation: str,
    residual_scale: float,
    eps: float,
    across: str = "features",
) -> Tensor:
    """``x + residual_scale * (act(norm(x) w1^T + b1) w2^T + b2)`` in ``x``'s dtype, ``x[..., D]``.

    ``across="positions"``: the MLP acts on each column of ``norm(x)[..., T, D]``, the norm still on rows, as
    in the token-mixing block of Tolstikhin et al. 2021 (arXiv 2105.01601).

    norm: layer, Ba et al. 2016 (arXiv 1607.06450), biased variance; rms, Zhang & Sennrich 2019
    (arXiv 1910.07467). fp64 and fp32 compute in kind, bf16 and fp16 in fp32. Autocast does not reach inside.
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        options = (norm, activation, residual_scale, eps, across)
        with torch.autocast(x.device.type, enabled=False):
            return residual_mlp_reference(x, w1, b1, w2, b2, norm_weight, norm_bias, *options)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32

    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(compute)

    residual = x.to(compute)
    normed = residual
    if norm == "layer":
        normed = F.layer_norm(residual, (x.shape[-1],), wide(norm_weight), wide(norm_bias), eps)
    elif norm == "rms":
        normed = F.rms_norm(residual, (x.shape[-1],), wide(norm_weight), eps)
        if norm_bias is not None:
            normed = normed + norm_bias.to(compute)
    if across == "positions":
        normed = normed.transpose(-1, -2)  # [..., D, T]
    hidden = ACTIVATIONS[activation](F.linear(normed, w1.to(compute), wide(b1)))  # [..., H]
    update = F.linear(hidden, w2.to(compute), wide(b2))  # [..., D], or [..., D, T] across positions
    if across == "positions":
        update = update.transpose(-1, -2)
    if residual_scale != 1.0:
        update = update * residual_scale
    return (residual + update).to(x.dtype)
