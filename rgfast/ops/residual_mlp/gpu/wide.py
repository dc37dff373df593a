"""Blocks too wide to be fused: the library's products, with as few passes between them as there can be.

Without gradients a kernel normalizes the rows and starts the sum of the residual, the library multiplies, a
kernel adds the bias and activates in place, and the library adds the second product to the residual. With
gradients autograd needs what lies between, and the passes are PyTorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rgfast.dispatch import is_plain
from rgfast.ops.residual_mlp.call import Call
from rgfast.ops.residual_mlp.compiled import as_rows
from rgfast.ops.residual_mlp.gpu.launch import on
from rgfast.ops.residual_mlp.gpu.needs import dtype_of
from rgfast.ops.residual_mlp.gpu.table import OPTIONS, padded
from rgfast.ops.residual_mlp.reference import ACTIVATIONS
from rgfast.runtime.threads import no_autocast

__all__ = ["run"]

# Numbers that a program of the activation's kernel takes.
_CHUNK = 2048


def run(call: Call, products: str) -> Tensor:
    """The block in the library's products, differentiable."""
    if call.recorded() or not is_plain(call.x):
        return _by_library(call, dtype_of(products))
    return _in_few_passes(call, dtype_of(products))


def _by_library(call: Call, dtype: torch.dtype) -> Tensor:
    x, w1, b1, w2, b2, weight, bias = call.tensors
    assert x is not None
    assert w1 is not None
    assert w2 is not None

    def to(t: Tensor | None, kind: torch.dtype) -> Tensor | None:
        return None if t is None else t.to(kind)

    with no_autocast(x.device.type):
        normed = x
        if call.norm == "layer":
            normed = F.layer_norm(x, x.shape[-1:], to(weight, x.dtype), to(bias, x.dtype), call.eps)
        elif call.norm == "rms":
            normed = F.rms_norm(x, x.shape[-1:], to(weight, x.dtype), call.eps)
            normed = normed if bias is None else normed + bias.to(x.dtype)
        hidden = ACTIVATIONS[call.activation](F.linear(normed.to(dtype), w1.to(dtype), to(b1, dtype)))
        update = F.linear(hidden, w2.to(dtype), to(b2, dtype))
        return torch.add(x, update.to(x.dtype), alpha=call.residual_scale)


def _in_few_passes(call: Call, dtype: torch.dtype) -> Tensor:
    from rgfast.ops.residual_mlp.gpu import passes as kernels

    x, (hidden, features) = call.x, call.w1.shape
    rows = x.numel() // features
    start = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    if rows == 0:
        return start.view(x.shape)
    with on(x.device):
        source, stride = as_rows(x)
        normed = torch.empty(rows, features, dtype=dtype, device=x.device)
        vectors = [
            None if t is None else t.contiguous()
            for t in (call.norm_weight, call.norm_bias, call.b1, call.b2)
        ]
        width = padded(features)
        kernels.begin[(rows,)](
            source, stride, normed, start, *vectors[:2], vectors[3], call.eps, call.residual_scale,
            D=features, D_PADDED=width, NORM=call.norm or "none", num_warps=min(16, max(1, width // 256)),
            **OPTIONS,
        )  # fmt: skip
        between = torch.mm(normed, call.w1.to(dtype).t())
        kernels.activate[(-(-between.numel() // _CHUNK),)](
            between, vectors[2], between.numel(),
            H=hidden, ACTIVATION=call.activation, FINE=dtype == torch.float32, CHUNK=_CHUNK, **OPTIONS,
        )  # fmt: skip
        down = call.w2.to(dtype).t()
        if dtype == x.dtype:
            return start.addmm_(between, down, alpha=call.residual_scale).view(x.shape)
        return start.add_(torch.mm(between, down), alpha=call.residual_scale).view(x.shape)
