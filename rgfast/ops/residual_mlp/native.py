"""The compiled residual block on the CPU: its operators, its gradient, and where which products pay.

The products are ours, or (``by_library``) those of the BLAS that PyTorch brings, a fixed tile at a time.

Two operators, ``rgfast::residual_mlp`` and ``rgfast::residual_mlp_backward``, are registered with
``torch.library`` whether the compiled module is there or not; a graph that is being traced gets these. Where
nothing is traced an ``autograd.Function`` calls the kernels directly, since on small blocks the dispatcher
costs as much as the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgfast import native
from rgfast.ops.residual_mlp import library
from rgfast.threads import aligned

__all__ = [
    "Arguments",
    "active_isa",
    "broken",
    "faster_by_library",
    "residual_mlp_native",
    "supports",
    "supports_by_library",
]

# The codes of csrc/kernels/residual_mlp.hpp.
NORM_CODES = {None: 0, "layer": 1, "rms": 2}
ACTIVATION_CODES = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3, "tanh": 4}

# Below this many outputs a product is a handful of dot products: the kernels' vectors stay nearly empty, and
# there is no larger output for a rounding error to be small against.
LEAST_WIDTH = 8

# Where the library's products were faster (README.md). Forward alone: above this width but for few rows. With
# gradients: above this one, and from a lesser one on below so many rows, but for few.
WIDEST = 2047
FEW_ROWS = 48
WIDEST_RECORDED = 511
WIDE_RECORDED, FEWEST_RECORDED_ROWS, LEAST_RECORDED_ROWS = 256, 17, 1024

# From this width on the backward pass reads the first product's sums instead of forming them again.
KEPT_FROM = 96


class Arguments(NamedTuple):
    """What the block is called with, checked; the tensors first, as autograd counts them."""

    x: Tensor
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm: str | None
    activation: str
    residual_scale: float
    eps: float
    across: str

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.w1, self.b1, self.w2, self.b2, self.norm_weight, self.norm_bias

    @property
    def mixes(self) -> bool:
        return self.across == "positions"

    @property
    def rows(self) -> int:
        """How many vectors the MLP is applied to."""
        return self.x.numel() // self.w1.size(1)

    def recorded(self) -> bool:
        """Whether autograd has to know of this call."""
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self.tensors)


TENSORS = 7

# Settled on import: a traced graph reads a constant, where it could not follow the attempt to load.
_BROKEN = native.unavailable_reason()
_NO_LIBRARY = library.unavailable_reason()


def broken() -> str | None:
    """Why the compiled module cannot run anything in this process, or None."""
    return _BROKEN


def active_isa() -> str | None:
    """The instruction set that runs."""
    return native.active_isa()


def _cannot(arguments: Arguments) -> str | None:
    """What no compiled block does."""
    x = arguments.x
    if x.device.type != "cpu":
        return f"it runs on the cpu, not on {x.device.type}"
    if x.dtype == torch.float64:
        return "it computes in fp32, and x is float64"
    return None


def _too_narrow(arguments: Arguments) -> str | None:
    width, hidden = arguments.w1.shape[1], arguments.w1.shape[0]
    if min(width, hidden) < LEAST_WIDTH:
        return f"D={width}, H={hidden} is too narrow for its vectors"
    return None


def faster_by_library(width: int, rows: int, recorded: bool) -> str | None:
    """Where the library's products are there and faster, in words; None elsewhere."""
    if _NO_LIBRARY is not None:
        return None
    if recorded:
        if width > WIDEST_RECORDED:
            return f"with gradients the library's products are faster at D={width}"
        if width >= WIDE_RECORDED and FEWEST_RECORDED_ROWS <= rows < LEAST_RECORDED_ROWS:
            return f"with gradients the library's products are faster for {rows} rows at D={width}"
    elif width > WIDEST and rows > FEW_ROWS:
        return f"the library's products are faster for {rows} rows at D={width}"
    return None


def supports(arguments: Arguments, named: bool) -> str | None:
    """None, or why not. What it could run but the library runs faster it refuses unless asked by name."""
    reason = _cannot(arguments)
    if reason is not None or named:
        return reason
    reason = _too_narrow(arguments)
    if reason is not None or arguments.mixes:
        return reason
    return faster_by_library(arguments.w1.shape[1], arguments.rows, arguments.recorded())


def supports_by_library(arguments: Arguments, named: bool) -> str | None:
    """The same of the block with the library's products, which ``supports`` leaves it to where these pay."""
    reason = _cannot(arguments) or _NO_LIBRARY
    if reason is not None:
        return reason
    if arguments.mixes:
        return "it does not mix positions"
    return None if named else _too_narrow(arguments)


def residual_mlp_native(
    differentiable: Callable[..., Tensor], by_library: bool, arguments: Arguments, named: bool = False
) -> Tensor:
    """The block in fp32; narrower types are widened here, so that autograd narrows their gradients.

    ``differentiable`` computes the same from PyTorch's own operations: the gradient is taken from it where
    the gradient itself is to be differentiated.
    """
    x = arguments.x
    dtype = x.dtype
    for tensor in arguments.tensors:
        if tensor is not None and tensor.dtype != torch.float32:
            wide = (None if t is None else t.float() for t in arguments.tensors)
            arguments = Arguments(*wide, *arguments[TENSORS:])  # type: ignore[arg-type]
            break
    y: Tensor
    if torch.compiler.is_compiling() or (type(x) is not Tensor and type(x) is not torch.nn.Parameter):
        y = torch.ops.rgfast.residual_mlp(*arguments, by_library)
    elif arguments.recorded():
        y, _ = _Block.apply(*arguments, by_library, differentiable)  # type: ignore[no-untyped-call]
    else:
        y = _run_forward(arguments, by_library)
    return y if y.dtype == dtype else y.to(dtype)


class _Block(torch.autograd.Function):
    """The output, and what the backward pass need not form again (empty where forming it costs less)."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        arguments, by_library = Arguments(*args[:-2]), args[-2]
        width, hidden = arguments.w1.size(1), arguments.w1.size(0)
        keeps = by_library or (width >= KEPT_FROM and arguments.rows > FEW_ROWS)
        sums = arguments.x.new_empty(arguments.rows if keeps else 0, hidden)
        return _run_forward(arguments, by_library, sums), sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS], output[1])
        ctx.options = inputs[TENSORS:-2]
        ctx.by_library, ctx.differentiable = inputs[-2:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 14
        wanted = ctx.needs_input_grad[:TENSORS]
        *saved, sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = _differentiable_gradients(ctx, saved, dy, wanted)
        else:
            arguments = Arguments(*saved, *ctx.options)
            _check_memory(arguments, dy)  # parameters may have become others since, as by module.half()
            gradients = _run_backward(dy, arguments, ctx.by_library, wanted, sums)
        return (*gradients, *(None,) * 7)


def _differentiable_gradients(
    ctx: Any, saved: list[Tensor | None], dy: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    def of_wanted(*values: Tensor) -> Tensor:
        rest = iter(values)
        filled = [next(rest) if want else t for t, want in zip(saved, wanted, strict=True)]
        y: Tensor = ctx.differentiable(*filled, *ctx.options)
        return y

    chosen = [t for t, want in zip(saved, wanted, strict=True) if want]
    pull = torch.func.vjp(of_wanted, *chosen)[1]
    found = iter(pull(dy))
    return tuple(next(found) if want else None for want in wanted)


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` as rows of adjacent features, copied only if need be: what to hold, and the row stride."""
    width = x.size(-1)
    if x.is_contiguous():
        return x, width
    rows = x.reshape(-1, width)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def _check_memory(arguments: Arguments, dy: Tensor | None = None) -> None:
    """Raise TypeError unless every tensor is what the kernels, which get addresses, take it for."""
    x, w1 = arguments.x, arguments.w1
    hidden, width = w1.shape if w1.dim() == 2 else (0, 0)
    features = x.size(-1) if x.dim() else 0
    shapes = ((hidden, width), (hidden,), (width, hidden), (width,), (features,), (features,))
    least = 2 if arguments.mixes else 1
    fits = hidden > 0 and features > 0 and x.dim() >= least and x.size(-least) == width
    fits = fits and (dy is None or dy.shape == x.shape)
    for t, shape in zip(arguments.tensors[1:], shapes, strict=True):
        fits = fits and (t is None or t.shape == shape)
    tensors = [t for t in (*arguments.tensors, dy) if t is not None]
    if not fits or any(t.dtype != torch.float32 or not t.is_cpu for t in tensors):
        got = ", ".join(
            f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}" for t in tensors
        )
        raise TypeError(
            f"residual_mlp must get x, its parameters and the gradient of its output as float32 on the CPU, "
            f"in shapes that fit together, got {got}"
        )


class _Call(NamedTuple):
    """The arguments that both kernels begin with, and what has to be held while these are in use."""

    leading: tuple[Any, ...]
    held: list[Tensor | None]


def _call(arguments: Arguments, by_library: bool) -> _Call:
    """The library's bits may depend on how its operands lie, those of our own products do not."""
    x, w1 = arguments.x, arguments.w1
    if by_library:
        x = aligned(x)
    if arguments.mixes:
        rows, stride = x.contiguous(), 0
    else:
        rows, stride = as_rows(x)
    ready = aligned if by_library else torch.Tensor.contiguous
    held = [rows, *(None if t is None else ready(t) for t in arguments.tensors[1:])]
    leading = (
        arguments.rows,
        w1.size(1),
        w1.size(0),
        rows.data_ptr(),
        stride,
        *[0 if t is None else t.data_ptr() for t in held[1:]],
        NORM_CODES[arguments.norm],
        ACTIVATION_CODES[arguments.activation],
        arguments.residual_scale,
        arguments.eps,
        x.size(-1) if arguments.mixes else 0,
    )
    return _Call(leading, held)


def _run_forward(arguments: Arguments, by_library: bool, sums: Tensor | None = None) -> Tensor:
    """The output; the sums that the activation gets into ``sums`` unless that is empty."""
    y = torch.empty_like(arguments.x, memory_format=torch.contiguous_format)
    call = _call(arguments, by_library)
    kept = 0 if sums is None or not sums.numel() else sums.data_ptr()
    native.load().residual_mlp_forward(*call.leading, kept, y.data_ptr(), torch.get_num_threads(), by_library)
    return y


def _run_backward(
    dy: Tensor,
    arguments: Arguments,
    by_library: bool,
    wanted: tuple[bool, ...],
    sums: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    gradients = tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if want and t is not None else None
        for t, want in zip(arguments.tensors, wanted, strict=True)
    )
    dy = aligned(dy) if by_library else dy.contiguous()
    call = _call(arguments, by_library)
    native.load().residual_mlp_backward(
        *call.leading,
        0 if sums is None or not sums.numel() else sums.data_ptr(),
        dy.data_ptr(),
        *[0 if g is None else g.data_ptr() for g in gradients],
        torch.get_num_threads(),
        by_library,
    )
    return gradients


_TENSORS = "Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? norm_weight, Tensor? norm_bias"
_OPTIONS = "str? norm, str activation, float residual_scale, float eps, str across"
_BY_LIBRARY = "bool by_library=False"

torch.library.define("rgfast::residual_mlp", f"({_TENSORS}, {_OPTIONS}, {_BY_LIBRARY}) -> Tensor")
torch.library.define(
    "rgfast::residual_mlp_backward",
    f"(Tensor dy, {_TENSORS}, {_OPTIONS}, bool[] wanted, {_BY_LIBRARY}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _arguments(given: tuple[Any, ...]) -> tuple[Arguments, tuple[Any, ...]]:
    """What an operator was called with, and the rest; the dispatcher leaves out a trailing default."""
    count = len(Arguments._fields)
    return Arguments(*given[:count]), given[count:]


@torch.library.impl("rgfast::residual_mlp", "CPU")
def _op_forward(*args: Any) -> Tensor:
    arguments, by_library = _arguments(args)
    _check_memory(arguments)
    return _run_forward(arguments, by_library == (True,))


@torch.library.register_fake("rgfast::residual_mlp")  # type: ignore[untyped-decorator]
def _fake_forward(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.impl("rgfast::residual_mlp_backward", "CPU")
def _op_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    arguments, (wanted, *by_library) = _arguments(args)
    _check_memory(arguments, dy)
    found = _run_backward(dy, arguments, by_library == [True], wanted)
    return tuple(dy.new_empty(0) if g is None else g for g in found)


@torch.library.register_fake("rgfast::residual_mlp_backward")  # type: ignore[untyped-decorator]
def _fake_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    arguments, (wanted, *_) = _arguments(args)
    return tuple(
        dy.new_empty(t.shape if want and t is not None else (0,))
        for t, want in zip(arguments.tensors, wanted, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:TENSORS])
    arguments, by_library = _arguments(inputs)
    ctx.options, ctx.by_library = arguments[TENSORS:], by_library == (True,)


def _op_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:TENSORS]
    gradients = torch.ops.rgfast.residual_mlp_backward(
        dy, *ctx.saved_tensors, *ctx.options, list(wanted), ctx.by_library
    )
    kept = tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))
    return (*kept, *(None,) * (len(ctx.needs_input_grad) - TENSORS))


torch.library.register_autograd("rgfast::residual_mlp", _op_gradients, setup_context=_save)
