"""Blocks too wide to be fused: the library's products, with as few passes between them as there can be.

Forward a kernel normalizes the rows, the library multiplies, a kernel adds the bias and activates, the
library multiplies again, and the rows are added. In fp32 the first kernel starts that sum, and the second
product is added to it; in narrower types this would round once more than eager PyTorch, if there is a bias.
Backward a kernel takes the gradient through the activation, and one through the norm to the rows. Both add up
the gradients of vectors on the way, in a fixed order. A traced graph gets PyTorch's operators, which its
compiler fuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rgfast.dispatch import is_plain
from rgfast.ops.residual_mlp.call import TENSORS, Call
from rgfast.ops.residual_mlp.compiled import as_rows, readable
from rgfast.ops.residual_mlp.contract import differentiable_gradients
from rgfast.ops.residual_mlp.gpu.launch import on
from rgfast.ops.residual_mlp.gpu.needs import dtype_of
from rgfast.ops.residual_mlp.gpu.table import OPTIONS, padded
from rgfast.ops.residual_mlp.reference import ACTIVATIONS
from rgfast.runtime.threads import no_autocast

__all__ = ["run"]

# Numbers that a program of the activation's kernel takes, and rows and columns of its gradient's at a time.
_CHUNK, _BM, _BC = 2048, 16, 128
# How many parts the rows are cut into for gradients of vectors: of hidden units, and of features.
_PARTS_HIDDEN, _PARTS = 128, 528


def run(call: Call, products: str) -> Tensor:
    """The block in the library's products, differentiable."""
    y: Tensor
    dtype = dtype_of(products)
    if not is_plain(call.x) or call.x.numel() == 0:
        y = _by_library(call, dtype)
    elif call.recorded():
        y = _Block.apply(*call, dtype)  # type: ignore[no-untyped-call]  # torch's own
    else:
        y = _forward(call, dtype, in_place=True)[0]
    return y


class _Block(torch.autograd.Function):
    """The output; what the backward pass needs of what lies between is kept."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Tensor:
        call, dtype = Call(*flat[:-1]), flat[-1]
        need = ctx.needs_input_grad
        slopes = _slopes(need)
        y, normed, sums, hidden = _forward(call, dtype, in_place=not slopes)
        kept = (normed if need[1] else None, sums if slopes else None, hidden if need[3] else None)
        ctx.save_for_backward(*call.tensors, *kept)
        ctx.options, ctx.dtype = call[TENSORS:], dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:TENSORS]
        everything = ctx.saved_tensors  # which a checkpoint lets be asked for once
        saved, kept = list(everything[:TENSORS]), everything[TENSORS:]
        if torch.is_grad_enabled():
            gradients = differentiable_gradients(ctx, saved, dy, wanted)
        else:
            gradients = _backward(dy, Call(*saved, *ctx.options), ctx.dtype, wanted, *kept)
        return (*gradients, *(None,) * (len(ctx.needs_input_grad) - TENSORS))


def _slopes(wanted: Sequence[bool]) -> bool:
    """Whether a wanted gradient goes through the activation: all but those of ``w2`` and ``b2``."""
    return any(wanted[:3]) or any(wanted[5:TENSORS])


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


def _forward(call: Call, dtype: torch.dtype, *, in_place: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, the first product's input, its sums, and the second's input, which overwrites the sums if
    ``in_place``."""
    from rgfast.ops.residual_mlp.gpu import passes as kernels

    x, (units, features) = call.x, call.w1.shape
    rows = x.numel() // features
    with on(x.device):
        source, stride = as_rows(x)
        starts = x.dtype == dtype and (dtype == torch.float32 or call.b2 is None)
        start = torch.empty(rows, features, dtype=dtype, device=x.device) if starts else None
        normed = torch.empty(rows, features, dtype=dtype, device=x.device)
        vectors = [
            None if t is None else readable(t) for t in (call.norm_weight, call.norm_bias, call.b1, call.b2)
        ]
        kernels.begin[(rows,)](
            source, stride, normed, start, *vectors[:2], vectors[3], call.eps, call.residual_scale,
            **_columns(call), **OPTIONS,
        )  # fmt: skip
        sums = torch.mm(normed, call.w1.to(dtype).t())
        hidden = sums if in_place else torch.empty_like(sums)
        kernels.activate[(-(-sums.numel() // _CHUNK),)](
            sums, vectors[2], hidden, sums.numel(),
            H=units, ACTIVATION=call.activation, FINE=dtype == torch.float32, CHUNK=_CHUNK, **OPTIONS,
        )  # fmt: skip
        down = call.w2.to(dtype).t()
        if start is not None:
            y = start.addmm_(hidden, down, alpha=call.residual_scale).view(x.shape)
        else:
            bias = None if call.b2 is None else call.b2.to(dtype)
            update = torch.mm(hidden, down) if bias is None else torch.addmm(bias, hidden, down)
            y = torch.add(source.view(x.shape), update.view(x.shape), alpha=call.residual_scale)
        return y, normed, sums, hidden


def _columns(call: Call) -> dict[str, Any]:
    """What kernels of whole rows are compiled for."""
    features = call.w1.size(1)
    width = padded(features)
    warps = min(16, max(1, width // 256))
    return {"D": features, "D_PADDED": width, "NORM": call.norm or "none", "num_warps": warps}


def _backward(
    dy: Tensor, call: Call, dtype: torch.dtype, wanted: Sequence[bool],
    normed: Tensor | None, sums: Tensor | None, hidden: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of the wanted tensors."""
    from rgfast.ops.residual_mlp.gpu import passes as kernels

    x, (units, features), scale = call.x, call.w1.shape, call.residual_scale
    rows = x.numel() // features
    found: list[Tensor | None] = [None] * TENSORS
    with on(x.device):
        dy = readable(dy).view(rows, features)
        narrow = dy.to(dtype)
        if hidden is not None:
            found[3] = torch.mm(narrow.t(), hidden) * scale
        ends = None
        if sums is not None:
            slopes = torch.mm(narrow, call.w2.to(dtype))
            each = _BM * -(-rows // (_BM * _PARTS_HIDDEN))
            programs = -(-rows // each)
            parts = _parts(wanted[2], programs, units, x.device)
            kernels.descend[(programs, -(-units // _BC))](
                sums, None if call.b1 is None else readable(call.b1), slopes, parts, rows, each, scale,
                H=units, ACTIVATION=call.activation, FINE=dtype == torch.float32, BM=_BM, BC=_BC, **OPTIONS,
            )  # fmt: skip
            found[2] = None if parts is None else parts.sum(0, dtype=torch.float64)
            found[1] = None if normed is None else torch.mm(slopes.t(), normed)
            if wanted[0] or wanted[5] or wanted[6]:
                back = torch.mm(slopes, call.w1.to(dtype))
                each = -(-rows // _PARTS)
                programs = -(-rows // each)
                parts = _parts(any(wanted[4:]), programs, 3 * features, x.device)
                found[0] = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted[0] else None
                source, stride = as_rows(x)
                weight = None if call.norm_weight is None else readable(call.norm_weight)
                kernels.finish[(programs,)](
                    source, stride, back, dy, found[0], parts, weight, rows, each, call.eps,
                    **_columns(call), **OPTIONS,
                )  # fmt: skip
                if parts is not None:
                    found[5], found[6], ends = parts.sum(0, dtype=torch.float64).view(3, features)
        if wanted[4]:
            found[4] = (dy.sum(0, dtype=torch.float32) if ends is None else ends) * scale
    return tuple(
        g.to(t.dtype) if want and g is not None and t is not None else None
        for g, t, want in zip(found, call.tensors, wanted, strict=True)
    )


def _parts(wanted: bool, programs: int, numbers: int, device: torch.device) -> Tensor | None:
    return torch.empty(programs, numbers, dtype=torch.float32, device=device) if wanted else None
