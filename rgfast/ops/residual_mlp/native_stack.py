"""A stack of blocks on the CPU in one call: rows pass all layers a tile at a time, and stay in cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rgfast.ops.residual_mlp.native import (
    ACTIVATION_CODES,
    LEAST_WIDTH,
    NORM_CODES,
    TENSORS,
    Arguments,
    as_rows,
    faster_by_library,
)
from rgfast.runtime import native

__all__ = ["residual_stack_native", "supports"]

# All weights are packed before the first row: this many take 256 MiB.
MOST_PACKED = 1 << 26


def supports(layers: Sequence[Arguments], named: bool) -> str | None:
    """None, or why not. What it could run but the library runs faster it refuses unless asked by name."""
    x = layers[0].x
    if x.device.type != "cpu":
        return f"it runs on the cpu, not on {x.device.type}"
    if x.dtype != torch.float32:
        return (
            f"it keeps the stream in fp32 from layer to layer, and x is {str(x.dtype).removeprefix('torch.')}"
        )
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return "a traced graph takes the blocks one by one"
    if any(layer.recorded() for layer in layers):
        return "with gradients blocks run one by one"
    width = x.shape[-1]
    hidden = [layer.w1.shape[0] for layer in layers]
    if 2 * width * sum(hidden) > MOST_PACKED:
        return f"the weights of {len(layers)} layers at D={width} are too many to hold packed all at once"
    if named:
        return None
    if min(width, *hidden) < LEAST_WIDTH:
        return f"D={width}, H={min(hidden)} is too narrow for its vectors"
    return faster_by_library(width, x.numel() // width, False)


def residual_stack_native(
    layers: Sequence[Arguments], consumer: Callable[[int, Tensor], object] | None, tile: int
) -> Tensor:
    """The last layer's output; ``consumer`` sees all layers of ``tile`` entries of x at a time."""
    x, first = layers[0].x, layers[0]
    module, threads, width = native.load(), torch.get_num_threads(), x.size(-1)
    parameters = [
        None if t is None else t.to(torch.float32).contiguous()
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
