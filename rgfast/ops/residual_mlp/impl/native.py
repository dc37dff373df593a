"""The compiled block and stack, on our own products."""

from __future__ import annotations

import torch
from torch import Tensor

from rgfast.dispatch import Impl, is_plain
from rgfast.ops.residual_mlp import contract
from rgfast.ops.residual_mlp.call import LEAST_WIDTH, SECONDS_PER_CALL, TENSORS, Call, StackCall
from rgfast.ops.residual_mlp.compiled import ACTIVATION_CODES, NORM_CODES, as_rows, readable
from rgfast.runtime import native

__all__ = ["BLOCK", "STACK"]

# All weights of a stack are packed before the first row: this many take 256 MiB.
MOST_PACKED = 1 << 26

# Products a second on one AVX-512 core (README, "Library or ours?"). Forward: fewer above this width, except
# for few rows. With gradients: fewer above this one, and from a lesser one on for a middling number of rows.
WIDEST, FEW_ROWS = 2047, 48
WIDEST_RECORDED, WIDE_RECORDED, FEWEST_RECORDED_ROWS, LEAST_RECORDED_ROWS = 511, 256, 17, 1024
_FLOPS, _FLOPS_WIDE = 135e9, 115e9
_FLOPS_RECORDED, _FLOPS_RECORDED_WIDE = 125e9, 105e9

# Settled on import: a traced graph reads a constant, where it could not follow the attempt to load.
_BROKEN = native.unavailable_reason()


def _rate(width: int, rows: int, recorded: bool) -> float:
    if not recorded:
        return _FLOPS_WIDE if width > WIDEST and rows > FEW_ROWS else _FLOPS
    middling = width >= WIDE_RECORDED and FEWEST_RECORDED_ROWS <= rows < LEAST_RECORDED_ROWS
    return _FLOPS_RECORDED_WIDE if width > WIDEST_RECORDED or middling else _FLOPS_RECORDED


def _can_run(call: Call) -> str | None:
    return "it computes in fp32, and x is float64" if call.x.dtype == torch.float64 else None


def _cost(call: Call) -> float:
    return SECONDS_PER_CALL + call.flops() / _rate(call.w1.shape[1], call.rows, call.recorded())


def _can_run_stack(call: StackCall) -> str | None:
    x = call.layers[0].x
    if x.dtype != torch.float32:
        return (
            f"it keeps the stream in fp32 from layer to layer, and x is {str(x.dtype).removeprefix('torch.')}"
        )
    if not is_plain(x):
        return "a traced graph takes the blocks one by one"
    if call.recorded():
        return "with gradients blocks run one by one"
    width, depth = x.shape[-1], len(call.layers)
    if 2 * width * sum(layer.w1.shape[0] for layer in call.layers) > MOST_PACKED:
        return f"the weights of {depth} layers at D={width} are too many to hold packed all at once"
    return None


def _cost_of_stack(call: StackCall) -> float:
    # A little less than one by one: weights are packed once, and no layer's output goes to memory and back.
    return sum(SECONDS_PER_CALL + 0.99 * (_cost(layer) - SECONDS_PER_CALL) for layer in call.layers)


def _too_narrow(call: StackCall) -> str | None:
    width, hidden = call.layers[0].x.shape[-1], min(layer.w1.shape[0] for layer in call.layers)
    if min(width, hidden) < LEAST_WIDTH:
        return f"D={width}, H={hidden} is too narrow for its vectors"
    return None


def _run_stack(call: StackCall) -> Tensor:
    """The last layer's output; ``consumer`` sees all layers of ``tile`` entries of x at a time."""
    layers, consumer, tile = call
    x, first = layers[0].x, layers[0]
    module, threads, width = native.load(), torch.get_num_threads(), x.size(-1)
    parameters = [
        None if t is None else readable(t.to(torch.float32))
        for layer in layers
        for t in layer.tensors[1:TENSORS]
    ]
    addresses = [0 if t is None else t.data_ptr() for t in parameters]
    hidden = [layer.w1.size(0) for layer in layers]
    in_all = x.numel() // width
    floats = module.residual_stack_floats(width, hidden, addresses, in_all)
    packed = torch.empty(max(floats, 1), dtype=torch.float32, device="cpu")
    if floats:
        module.residual_stack_pack(width, hidden, addresses, in_all, packed.data_ptr(), threads)

    def run(rows: Tensor, stride: int, outputs: int, step: int, count: int) -> None:
        module.residual_stack_forward(
            count,
            in_all,
            width,
            hidden,
            addresses,
            NORM_CODES[first.norm],
            ACTIVATION_CODES[first.activation],
            first.residual_scale,
            first.eps,
            packed.data_ptr(),
            rows.data_ptr(),
            stride,
            outputs,
            step,
            threads,
        )

    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if consumer is None:
        rows, stride = as_rows(x)
        run(rows, stride, y.data_ptr(), 0, in_all)
        return y
    entry = x[:1].numel()
    buffer = x.new_empty((len(layers) + 1) * min(tile, max(x.size(0), 1)) * entry)
    for begin in range(0, x.size(0), tile):
        piece = x[begin : begin + tile]
        size = piece.numel()
        states = buffer[: (len(layers) + 1) * size].view(len(layers) + 1, *piece.shape)
        states[0].copy_(piece)
        if size:
            run(states, width, states[1].data_ptr(), size, size // width)
        y[begin : begin + tile].copy_(states[-1])
        consumer(begin, states)
    return y


BLOCK = Impl(
    "native",
    lambda call: contract.run(call, by_library=False),
    _can_run,
    _cost,
    ("cpu",),
    lambda: _BROKEN,
    Call.too_narrow,
    native.active_isa,
)
STACK = Impl(
    "native",
    _run_stack,
    _can_run_stack,
    _cost_of_stack,
    ("cpu",),
    lambda: _BROKEN,
    _too_narrow,
    native.active_isa,
)
