"""The compiled block's operators and its gradient, for autograd and ``torch.compile``.

Two operators, ``rgfast::residual_mlp`` and ``rgfast::residual_mlp_backward``, are registered with
``torch.library`` whether the compiled module is there or not; a graph that is being traced gets these. Where
nothing is traced an ``autograd.Function`` calls the kernels directly, since on small blocks the dispatcher
costs as much as the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rgfast.dispatch import is_plain, schema
from rgfast.ops.residual_mlp.call import TENSORS, Call
from rgfast.ops.residual_mlp.compiled import backward, check_memory, forward
from rgfast.ops.residual_mlp.reference import residual_mlp_reference
from rgfast.runtime.threads import all_on_one_thread

__all__ = ["differentiable_gradients", "run"]

# The backward pass reads the first product's sums instead of forming them again from this width on, but for
# few rows.
KEPT_FROM, FEW_ROWS = 96, 48


def run(call: Call, by_library: bool) -> Tensor:
    """The block in fp32; narrower types are widened here, so that autograd narrows their gradients."""
    dtype = call.x.dtype
    plain = is_plain(call.x)
    for tensor in call.tensors:
        if tensor is not None and tensor.dtype != torch.float32:
            call = call.to(torch.float32)
            break
    y: Tensor
    if not plain:
        y = torch.ops.rgfast.residual_mlp(*call, by_library)
    elif call.recorded():
        y, _ = _Block.apply(*call, by_library)  # type: ignore[no-untyped-call]  # torch's own
    else:
        y = forward(call, by_library)
    return y if y.dtype == dtype else y.to(dtype)


class _Block(torch.autograd.Function):
    """The output, and what the backward pass need not form again (empty where forming it costs less)."""

    @staticmethod
    def forward(*flat: Any) -> tuple[Tensor, Tensor]:
        call, by_library = Call(*flat[:-1]), flat[-1]
        width, hidden = call.w1.size(1), call.w1.size(0)
        keeps = by_library or (width >= KEPT_FROM and call.rows > FEW_ROWS)
        sums = call.x.new_empty(call.rows if keeps else 0, hidden)
        return forward(call, by_library, sums), sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS], output[1])
        ctx.options, ctx.by_library = inputs[TENSORS:-1], inputs[-1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * (len(ctx.needs_input_grad) - TENSORS)
        if dy is None:
            return (None,) * TENSORS + rest
        wanted = ctx.needs_input_grad[:TENSORS]
        *saved, sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = differentiable_gradients(ctx, saved, dy, wanted)
        else:
            call = Call(*saved, *ctx.options)
            check_memory(call, dy)  # parameters may have become others since, as by module.half()
            gradients = backward(dy, call, ctx.by_library, wanted, sums)
        return (*gradients, *rest)


def differentiable_gradients(
    ctx: Any, saved: list[Tensor | None], dy: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    # The kernels' gradient has no gradient: it is taken from the formula.
    def of_wanted(*values: Tensor) -> Tensor:
        rest = iter(values)
        filled: list[Any] = [next(rest) if want else t for t, want in zip(saved, wanted, strict=True)]
        y: Tensor = residual_mlp_reference(*filled, *ctx.options)
        return y

    chosen = [t for t, want in zip(saved, wanted, strict=True) if want]

    def pulled(dy: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = torch.func.vjp(of_wanted, *values)[1](dy)
        return gradients

    found = iter(all_on_one_thread(pulled, dy, *chosen))
    return tuple(next(found) if want else None for want in wanted)


_BY_LIBRARY = "bool by_library=False"

torch.library.define("rgfast::residual_mlp", schema(Call, after=_BY_LIBRARY))
torch.library.define(
    "rgfast::residual_mlp_backward",
    schema(Call, "Tensor dy", f"bool[] wanted, {_BY_LIBRARY}", f"({', '.join(['Tensor'] * TENSORS)})"),
)


def _call(flat: tuple[Any, ...]) -> tuple[Call, tuple[Any, ...]]:
    """What an operator was called with, and the rest; the dispatcher leaves out a trailing default."""
    count = len(Call._fields)
    return Call(*flat[:count]), flat[count:]


@torch.library.impl("rgfast::residual_mlp", "CPU")
def _op_forward(*args: Any) -> Tensor:
    call, by_library = _call(args)
    check_memory(call)
    return forward(call, by_library == (True,))


@torch.library.register_fake("rgfast::residual_mlp")  # type: ignore[untyped-decorator]  # torch's own
def _fake_forward(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.impl("rgfast::residual_mlp_backward", "CPU")
def _op_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call, (wanted, *by_library) = _call(args)
    check_memory(call, dy)
    found = backward(dy, call, by_library == [True], wanted)
    return tuple(dy.new_empty(0) if g is None else g for g in found)


@torch.library.register_fake("rgfast::residual_mlp_backward")  # type: ignore[untyped-decorator]  # as above
def _fake_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call, (wanted, *_) = _call(args)
    return tuple(
        dy.new_empty(t.shape if want and t is not None else (0,))
        for t, want in zip(call.tensors, wanted, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:TENSORS])
    call, by_library = _call(inputs)
    ctx.options, ctx.by_library = call[TENSORS:], by_library == (True,)


def _op_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:TENSORS]
    gradients = torch.ops.rgfast.residual_mlp_backward(
        dy, *ctx.saved_tensors, *ctx.options, list(wanted), ctx.by_library
    )
    kept = tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))
    return (*kept, *(None,) * (len(ctx.needs_input_grad) - TENSORS))


torch.library.register_autograd("rgfast::residual_mlp", _op_gradients, setup_context=_save)
