"""The compiled residual block on the CPU: its operators, its gradient, and where it pays.

Two operators, ``rgfast::residual_mlp`` and ``rgfast::residual_mlp_backward``, are registered with
``torch.library`` whether the compiled module is there or not; a graph that is being traced gets these. Where
nothing is traced an ``autograd.Function`` calls the kernels directly, since on small blocks the dispatcher
costs as much as the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rgfast import native

__all__ = ["active_isa", "broken", "residual_mlp_native", "supports"]

# The codes of csrc/kernels/residual_mlp.hpp.
NORM_CODES = {None: 0, "layer": 1, "rms": 2}
ACTIVATION_CODES = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3, "tanh": 4}

# Below this many outputs a product is a handful of dot products: the kernels' vectors stay nearly empty, and
# there is no larger output for a rounding error to be small against.
LEAST_WIDTH = 8

# Where the library was faster (README.md): forward alone, and forward with its gradient.
WIDEST = 1024
WIDEST_RECORDED = 511
FEW_ROWS = 48
FEW_RECORDED_ROWS = 1024
NARROW = 127


# Settled on import: a traced graph reads a constant, where it could not follow the attempt to load.
_BROKEN = native.unavailable_reason()


def broken() -> str | None:
    """Why the compiled module cannot run anything in this process, or None."""
    return _BROKEN


def active_isa() -> str | None:
    """The instruction set that runs."""
    return native.active_isa()


def supports(
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
    named: bool,
) -> str | None:
    """None, or why not. What it could run but the library runs faster it refuses unless asked by name."""
    if x.device.type != "cpu":
        return f"it runs on the cpu, not on {x.device.type}"
    if x.dtype == torch.float64:
        return "it computes in fp32, and x is float64"
    width, hidden = w1.shape[1], w1.shape[0]
    if named:
        return None
    if min(width, hidden) < LEAST_WIDTH:
        return f"D={width}, H={hidden} is too narrow for its vectors"
    rows = x.numel() // width
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, w1, b1, w2, b2, norm_weight, norm_bias)
    ):
        if width > WIDEST_RECORDED:
            return f"with gradients the library's products are faster at D={width}"
        if width > NARROW and rows < FEW_RECORDED_ROWS:
            return f"with gradients the library's products are faster for {rows} rows at D={width}"
    elif width > WIDEST and rows > FEW_ROWS:
        return f"the library's products are faster for {rows} rows at D={width}"
    return None


def residual_mlp_native(
    differentiable: Callable[..., Tensor],
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
    named: bool,
) -> Tensor:
    """The block in fp32; narrower types are widened here, so that autograd narrows their gradients.

    ``differentiable`` computes the same from PyTorch's own operations: the gradient is taken from it where
    the gradient itself is to be differentiated.
    """
    dtype = x.dtype
    tensors = (x, w1, b1, w2, b2, norm_weight, norm_bias)
    for tensor in tensors:
        if tensor is not None and tensor.dtype != torch.float32:
            tensors = tuple(None if t is None else t.float() for t in tensors)  # type: ignore[assignment]
            break
    options = (norm, activation, residual_scale, eps)
    y: Tensor
    if torch.compiler.is_compiling() or (type(x) is not Tensor and type(x) is not torch.nn.Parameter):
        y = torch.ops.rgfast.residual_mlp(*tensors, *options)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y = _Block.apply(*tensors, *options, differentiable)  # type: ignore[no-untyped-call]
    else:
        y = _run_forward(*tensors, *options)
    return y if y.dtype == dtype else y.to(dtype)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _run_forward(*args[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.options = inputs[7:-1]
        ctx.differentiable = inputs[-1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:7]
        if torch.is_grad_enabled():
            gradients = _differentiable_gradients(ctx, dy, wanted)
        else:
            gradients = _run_backward(dy, *ctx.saved_tensors, *ctx.options, wanted=wanted)
        return (*gradients, None, None, None, None, None)


def _differentiable_gradients(ctx: Any, dy: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors

    def of_wanted(*values: Tensor) -> Tensor:
        rest = iter(values)
        filled = [next(rest) if want else t for t, want in zip(saved, wanted, strict=True)]
        y: Tensor = ctx.differentiable(*filled, *ctx.options)
        return y

    chosen = [t for t, want in zip(saved, wanted, strict=True) if want]
    pull = torch.func.vjp(of_wanted, *chosen)[1]
    found = iter(pull(dy))
    return tuple(next(found) if want else None for want in wanted)


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    """``x`` as rows of adjacent features, copied only if need be: what to hold, rows, row stride."""
    width = x.size(-1)
    if x.is_contiguous():
        return x, x.numel() // width, width
    rows = x.reshape(-1, width)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.size(0), rows.stride(0)


def _run_forward(
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
) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    held, rows, stride = _rows(x)
    parameters = [None if t is None else t.contiguous() for t in (w1, b1, w2, b2, norm_weight, norm_bias)]
    native.load().residual_mlp_forward(
        rows,
        w1.size(1),
        w1.size(0),
        held.data_ptr(),
        stride,
        *[0 if t is None else t.data_ptr() for t in parameters],
        NORM_CODES[norm],
        ACTIVATION_CODES[activation],
        residual_scale,
        eps,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def _run_backward(
    dy: Tensor,
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
    *,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    inputs = (x, w1, b1, w2, b2, norm_weight, norm_bias)
    gradients = tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if want and t is not None else None
        for t, want in zip(inputs, wanted, strict=True)
    )
    held, rows, stride = _rows(x)
    dy = dy.contiguous()
    parameters = [None if t is None else t.contiguous() for t in inputs[1:]]
    native.load().residual_mlp_backward(
        rows,
        w1.size(1),
        w1.size(0),
        held.data_ptr(),
        stride,
        *[0 if t is None else t.data_ptr() for t in parameters],
        NORM_CODES[norm],
        ACTIVATION_CODES[activation],
        residual_scale,
        eps,
        dy.data_ptr(),
        *[0 if g is None else g.data_ptr() for g in gradients],
        torch.get_num_threads(),
    )
    return gradients


_TENSORS = "Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? norm_weight, Tensor? norm_bias"
_OPTIONS = "str? norm, str activation, float residual_scale, float eps"

torch.library.define("rgfast::residual_mlp", f"({_TENSORS}, {_OPTIONS}) -> Tensor")
torch.library.define(
    "rgfast::residual_mlp_backward",
    f"(Tensor dy, {_TENSORS}, {_OPTIONS}, bool[] wanted) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("rgfast::residual_mlp", "CPU")
def _op_forward(*args: Any) -> Tensor:
    return _run_forward(*args)


@torch.library.register_fake("rgfast::residual_mlp")  # type: ignore[untyped-decorator]
def _fake_forward(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.impl("rgfast::residual_mlp_backward", "CPU")
def _op_backward(*args: Any) -> tuple[Tensor, ...]:
    return tuple(args[0].new_empty(0) if g is None else g for g in _run_backward(*args[:-1], wanted=args[-1]))


@torch.library.register_fake("rgfast::residual_mlp_backward")  # type: ignore[untyped-decorator]
def _fake_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, wanted = args[:7], args[-1]
    return tuple(
        dy.new_empty(t.shape if want and t is not None else (0,))
        for t, want in zip(inputs, wanted, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _op_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:7]
    gradients = torch.ops.rgfast.residual_mlp_backward(dy, *ctx.saved_tensors, *ctx.options, list(wanted))
    kept = tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))
    return (*kept, None, None, None, None)


torch.library.register_autograd("rgfast::residual_mlp", _op_gradients, setup_context=_save)
