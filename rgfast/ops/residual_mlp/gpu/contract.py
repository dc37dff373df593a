"""The block on a GPU as operators of torch, and its gradient, for autograd and ``torch.compile``.

As on the CPU: a graph that is being traced gets the operators, and otherwise an ``autograd.Function`` calls
the kernels directly. Which products are made is settled when the block is called: autocast's region has ended
by the time a graph or a backward pass runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rgfast.dispatch import is_plain, schema
from rgfast.ops.residual_mlp.call import TENSORS, Call
from rgfast.ops.residual_mlp.contract import differentiable_gradients
from rgfast.ops.residual_mlp.gpu.launch import backward, forward

__all__ = ["op_backward", "op_forward", "run"]


def run(call: Call, products: str) -> Tensor:
    """The fused block, differentiable."""
    y: Tensor
    if not is_plain(call.x):
        y = torch.ops.rgfast.residual_mlp_gpu(*call, products)
    elif call.recorded():
        y = _Block.apply(*call, products)  # type: ignore[no-untyped-call]  # torch's own
    else:
        y = forward([call], products)
    return y


class _Block(torch.autograd.Function):
    """The output; the backward pass forms the hidden layer again."""

    @staticmethod
    def forward(*flat: Any) -> Tensor:
        return forward([Call(*flat[:-1])], flat[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:TENSORS])
        ctx.options, ctx.products = inputs[TENSORS:-1], inputs[-1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:TENSORS]
        saved = list(ctx.saved_tensors)
        if torch.is_grad_enabled():
            gradients = differentiable_gradients(ctx, saved, dy, wanted)
        else:
            gradients = backward(dy, Call(*saved, *ctx.options), ctx.products, wanted)
        return (*gradients, *(None,) * (len(ctx.needs_input_grad) - TENSORS))


torch.library.define("rgfast::residual_mlp_gpu", schema(Call, after="str products"))
torch.library.define(
    "rgfast::residual_mlp_gpu_backward",
    schema(Call, "Tensor dy", "str products, bool[] wanted", f"({', '.join(['Tensor'] * TENSORS)})"),
)


def op_forward(*args: Any) -> Tensor:
    return forward([Call(*args[:-1])], args[-1])


@torch.library.register_fake("rgfast::residual_mlp_gpu")  # type: ignore[untyped-decorator]  # torch's own
def _fake_forward(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


def op_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *flat, products, wanted = args
    found = backward(dy, Call(*flat), products, wanted)
    return tuple(dy.new_empty(0) if g is None else g for g in found)


@torch.library.register_fake("rgfast::residual_mlp_gpu_backward")  # type: ignore[untyped-decorator]  # as above
def _fake_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *flat, _, wanted = args
    return tuple(
        dy.new_empty(0) if t is None or not want else t.new_empty(t.shape)
        for t, want in zip(Call(*flat).tensors, wanted, strict=True)
    )


torch.library.impl("rgfast::residual_mlp_gpu", "CUDA", op_forward)
torch.library.impl("rgfast::residual_mlp_gpu_backward", "CUDA", op_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _Block.setup_context(ctx, inputs, output)


def _op_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:TENSORS]
    gradients = torch.ops.rgfast.residual_mlp_gpu_backward(
        dy, *ctx.saved_tensors, *ctx.options, ctx.products, list(wanted)
    )
    kept = tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))
    return (*kept, *(None,) * (len(ctx.needs_input_grad) - TENSORS))


torch.library.register_autograd("rgfast::residual_mlp_gpu", _op_gradients, setup_context=_save)
