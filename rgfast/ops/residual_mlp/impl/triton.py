"""The block and the stack on an NVIDIA GPU: fused in Triton, wide blocks by the library's products."""

from __future__ import annotations

import torch
from torch import Tensor

from rgfast.dispatch import Impl, Unproven, is_plain
from rgfast.ops.residual_mlp.call import Call, StackCall
from rgfast.ops.residual_mlp.gpu import answers, contract, needs, wide
from rgfast.ops.residual_mlp.gpu.launch import forward, ready, through
from rgfast.ops.residual_mlp.gpu.table import WIDEST, WIDEST_STACK, tile_width
from rgfast.runtime import known_answers, measured

__all__ = ["BLOCK", "STACK"]

known_answers.register(*answers.ANSWERS)

# Products a second on an H100, both passes, by the width of a tile: the prototypes' (README).
_FLOPS = {
    "bf16": {64: 170e12, 128: 250e12, 256: 340e12, 512: 400e12},
    "tf32": {64: 120e12, 128: 200e12, 256: 250e12, 512: 220e12},
    "fp32": {64: 80e12, 128: 115e12, 256: 110e12, 512: 45e12},
}
# The backward pass, with its weight gradients, is so much slower per product.
_RECORDED = 0.5
_SECONDS_PER_CALL = 3e-5

# Settled on import: a traced graph reads a constant, where it could not follow the search for a compiler.
_MISSING = needs.missing()


def _can_run(call: Call) -> str | None:
    if call.x.dtype == torch.float64:
        return "it computes in fp32 and narrower types, and x is float64"
    if call.mixes:
        return "it does not mix positions"
    return needs.too_old(call.device)


def _by_name_only(call: Call) -> str | None:
    return call.too_narrow() or _unmeasured("residual_mlp", call)


def _unmeasured(op: str, call: Call) -> str | None:
    """Why rows speak against the kernels at this width; in a traced graph, whose sizes may vary, at any."""
    width = call.x.shape[-1] if is_plain(call.x) else None
    return measured.refusal(op, "triton", call.device, width)


def _unproven(call: Call) -> Unproven | None:
    found: Unproven | None = known_answers.unproven(call.device, *answers.kernels_of(call, call.products()))
    return found


def _cost(call: Call) -> float:
    products = call.products()
    rates = _FLOPS["bf16" if products == "fp16" else products]
    rate = rates[min(tile_width(call.w1.shape[1]), 512)]
    return _SECONDS_PER_CALL + call.flops() / (rate * (_RECORDED if call.recorded() else 1.0))


def _run(call: Call) -> Tensor:
    products = call.products()
    return wide.run(call, products) if call.w1.shape[1] > WIDEST else contract.run(call, products)


def _can_run_stack(call: StackCall) -> str | None:
    first = call.layers[0]
    width = first.w1.shape[1]
    if not is_plain(first.x):
        return "a traced graph takes the blocks one by one"
    if call.recorded():
        return "with gradients blocks run one by one"
    if width > WIDEST_STACK:
        return (
            f"rows of D={width} do not stay on a multiprocessor from layer to layer, up to {WIDEST_STACK} do"
        )
    if any(layer.w1.shape != first.w1.shape for layer in call.layers):
        return "its layers have different numbers of hidden units"
    if call.products() is None:
        return "the weights of its layers have different types"
    return _can_run(first)


def _by_name_only_stack(call: StackCall) -> str | None:
    return call.layers[0].too_narrow() or _unmeasured("residual_stack", call.layers[0])


def _unproven_stack(call: StackCall) -> Unproven | None:
    found: Unproven | None = known_answers.unproven(call.device, answers.kernel_of_stack(call))
    return found


def _cost_of_stack(call: StackCall) -> float:
    # Rows are read and written once; a block spends about a third of its time on that.
    return _SECONDS_PER_CALL + sum(0.7 * (_cost(layer) - _SECONDS_PER_CALL) for layer in call.layers)


def _run_stack(call: StackCall) -> Tensor:
    """The last layer's output; ``consumer`` sees all layers of ``tile`` entries of x at a time."""
    layers, consumer, tile = call
    x, products = layers[0].x, layers[0].products()
    if consumer is None:
        return forward(layers, products)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    parameters = ready(layers, products)
    states = torch.empty(len(layers) + 1, min(tile, len(x)), *x.shape[1:], dtype=x.dtype, device=x.device)
    for at in range(0, len(x), tile):
        part = x[at : at + tile]
        if len(part) < states.size(1):
            states = torch.empty_like(states[:, : len(part)], memory_format=torch.contiguous_format)
        states[0].copy_(part)
        through(parameters, states[0], states[1:], every_layer=True)
        consumer(at, states)
        y[at : at + tile] = states[-1]
    return y


BLOCK = Impl("triton", _run, _can_run, _cost, ("cuda",), lambda: _MISSING, _by_name_only, unproven=_unproven)
STACK = Impl(
    "triton",
    _run_stack,
    _can_run_stack,
    _cost_of_stack,
    ("cuda",),
    lambda: _MISSING,
    _by_name_only_stack,
    unproven=_unproven_stack,
)
