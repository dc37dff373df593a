"""The compiled block's kernels as they are called, on our own products or the library's (``by_library``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rgfast.ops.residual_mlp.call import Call
from rgfast.runtime import native
from rgfast.runtime.threads import aligned

__all__ = ["ACTIVATION_CODES", "NORM_CODES", "as_rows", "backward", "check_memory", "forward", "readable"]

# The codes of csrc/kernels/residual_mlp.hpp.
NORM_CODES = {None: 0, "layer": 1, "rms": 2}
ACTIVATION_CODES = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3, "tanh": 4}


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` as rows of adjacent features, copied only if need be: what to hold, and the row stride."""
    width = x.size(-1)
    if x.is_neg():
        x = x.resolve_neg()
    if x.is_contiguous():
        return x, width
    rows = x.reshape(-1, width)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def readable(t: Tensor) -> Tensor:
    """``t`` as kernels read its memory: contiguous, and without a lazy negation, which the memory lacks."""
    return (t.resolve_neg() if t.is_neg() else t).contiguous()


def _ready(by_library: bool) -> Callable[[Tensor], Tensor]:
    """How operands are laid out: the library's bits may depend on where they lie, those of ours do not."""
    return (lambda t: aligned(readable(t))) if by_library else readable


def check_memory(call: Call, dy: Tensor | None = None) -> None:
    """Raise TypeError unless every tensor is what the kernels, which get addresses, take it for."""
    x, w1 = call.x, call.w1
    hidden, width = w1.shape if w1.dim() == 2 else (0, 0)
    features = x.size(-1) if x.dim() else 0
    shapes = ((hidden, width), (hidden,), (width, hidden), (width,), (features,), (features,))
    least = 2 if call.mixes else 1
    fits = hidden > 0 and features > 0 and x.dim() >= least and x.size(-least) == width
    fits = fits and (dy is None or dy.shape == x.shape)
    for t, shape in zip(call.tensors[1:], shapes, strict=True):
        fits = fits and (t is None or t.shape == shape)
    tensors = [t for t in (*call.tensors, dy) if t is not None]
    if not fits or any(t.dtype != torch.float32 or not t.is_cpu for t in tensors):
        got = ", ".join(
            f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}" for t in tensors
        )
        raise TypeError(
            f"residual_mlp must get x, its parameters and the gradient of its output as float32 on the CPU, "
            f"in shapes that fit together, got {got}"
        )


def _block(
    call: Call, by_library: bool, sums: Tensor | None
) -> tuple[tuple[float, ...], list[Tensor | None]]:
    """The block as both kernels take it, and what has to be held while they do."""
    x, w1, ready = call.x, call.w1, _ready(by_library)
    if by_library:
        x = ready(x)
    rows, stride = (ready(x), 0) if call.mixes else as_rows(x)
    held = [rows, *(None if t is None else ready(t) for t in call.tensors[1:])]
    block = (
        call.rows,
        w1.size(1),
        w1.size(0),
        rows.data_ptr(),
        stride,
        *[0 if t is None else t.data_ptr() for t in held[1:]],
        NORM_CODES[call.norm],
        ACTIVATION_CODES[call.activation],
        call.residual_scale,
        call.eps,
        x.size(-1) if call.mixes else 0,
        0 if sums is None or not sums.numel() else sums.data_ptr(),
    )
    return block, held


def forward(call: Call, by_library: bool, sums: Tensor | None = None) -> Tensor:
    """The output; the sums that the activation gets into ``sums`` unless that is empty."""
    y = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    block, _held = _block(call, by_library, sums)
    native.load().residual_mlp_forward(block, y.data_ptr(), torch.get_num_threads(), by_library)
    return y


def backward(
    dy: Tensor, call: Call, by_library: bool, wanted: Sequence[bool], sums: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """The gradients of the wanted tensors."""
    gradients = tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if want and t is not None else None
        for t, want in zip(call.tensors, wanted, strict=True)
    )
    dy = _ready(by_library)(dy)
    block, _held = _block(call, by_library, sums)
    addresses = [0 if g is None else g.data_ptr() for g in gradients]
    native.load().residual_mlp_backward(block, dy.data_ptr(), addresses, torch.get_num_threads(), by_library)
    return gradients
