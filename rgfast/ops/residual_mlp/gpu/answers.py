"""Small problems with known answers, on which each kernel is tried before a result of it is used.

One for every tile of the table, of the kind of block that is the most frequent, so that what is compiled for
it is what most callers need. The answer is the reference's, in fp64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rgfast.ops.residual_mlp.call import TENSORS, Call, StackCall
from rgfast.ops.residual_mlp.gpu import needs, wide
from rgfast.ops.residual_mlp.gpu.launch import backward, forward, ready, through
from rgfast.ops.residual_mlp.gpu.table import FORWARD, STACK, WIDEST, Form, form_of, tile_width
from rgfast.ops.residual_mlp.reference import residual_mlp_reference
from rgfast.runtime.known_answers import KnownAnswer

__all__ = [
    "ANSWERS",
    "PRECISIONS",
    "kernel_of_stack",
    "kernels_of",
    "try_forward",
    "try_gradient",
    "try_stack",
    "try_wide",
    "try_wide_gradient",
]

_ROWS = 70
_OPTIONS = ("layer", "gelu", 1.0, 1e-5, "features")
_WIDE = "residual_mlp_wide"


class Precision(NamedTuple):
    """How a form is tried; ``allowed`` is the largest error of a number over their root mean square."""

    products: str
    dtype: torch.dtype
    allowed: float


PRECISIONS: dict[Form, Precision] = {
    "plain": Precision("bf16", torch.bfloat16, 0.1),
    "single": Precision("tf32", torch.float32, 0.02),
    "split": Precision("fp32", torch.float32, 2e-5),
}


def kernels_of(call: Call, products: str) -> tuple[str, ...]:
    """The names of the kernels that a call runs, under which their answers are registered."""
    width = call.w1.size(1)
    name = _WIDE if width > WIDEST else f"residual_mlp_{form_of(products)}_{tile_width(width)}"
    return (name, f"{name}_gradient") if call.recorded() else (name,)


def kernel_of_stack(call: StackCall) -> str:
    """The name of the kernel that takes rows through a stack."""
    first = call.layers[0]
    kernel = "residual_stack" if len(call.layers) > 1 else "residual_mlp"
    return f"{kernel}_{form_of(first.products())}_{tile_width(first.w1.size(1))}"


def _spread(*shape: int) -> Tensor:
    """Numbers between -1 and 1 without a pattern, the same everywhere."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count, dtype=torch.float64, device="cpu") * 7919 % 1009 - 504) / 504).view(shape)


def _problem(d: int, h: int, dtype: torch.dtype) -> Call:
    """A block of moderate numbers, on the CPU."""
    tensors = (
        _spread(_ROWS, d), 2 * _spread(h, d) / d**0.5, _spread(h) / 2, 2 * _spread(d, h) / h**0.5,
        _spread(d) / 2, 1 + _spread(d) / 4, _spread(d) / 4,
    )  # fmt: skip
    return Call(*tensors, *_OPTIONS).to(dtype)


def _errors(found: Sequence[Tensor | None], truth: Sequence[Tensor]) -> Tensor:
    """The largest error of each over its root mean square, NaN if anything is."""
    off = [
        (t.detach().cpu().double() - want).abs().max() / want.square().mean().sqrt()
        for t, want in zip(found, truth, strict=True)
        if t is not None
    ]
    return torch.stack(off)


def _there(call: Call, device: torch.device) -> Call:
    return Call(*(None if t is None else t.to(device) for t in call.tensors), *call[TENSORS:])  # type: ignore[arg-type]


def try_forward(width: int, how: Precision, device: torch.device) -> Tensor:
    """The error of a block's output."""
    call = _problem(width, 4 * width, how.dtype)
    return _errors(
        [forward([_there(call, device)], how.products)], [residual_mlp_reference(*call.to(torch.float64))]
    )


def try_stack(width: int, how: Precision, device: torch.device) -> Tensor:
    """The errors of both layers' outputs, where the second block is the first one."""
    call = _problem(width, 4 * width, how.dtype)
    there = _there(call, device)
    states = torch.full((2, _ROWS, width), torch.nan, dtype=how.dtype, device=device)
    through(ready([there, there], how.products), there.x, states, every_layer=True)
    wide_call = call.to(torch.float64)
    first = residual_mlp_reference(*wide_call)
    return _errors(list(states), [first, residual_mlp_reference(*wide_call._replace(x=first))])


def try_gradient(width: int, how: Precision, device: torch.device) -> Tensor:
    """The errors of its gradients."""
    with torch.inference_mode(False), torch.enable_grad():
        call = _problem(width, 4 * width, how.dtype)
        leaves = call.to(torch.float64)
        inputs = [t.requires_grad_() for t in leaves.tensors if t is not None]
        y = residual_mlp_reference(*leaves)
        dy = _spread(*reversed(y.shape)).t().to(how.dtype)
        truth = torch.autograd.grad(y, inputs, dy.double())
    return _errors(backward(dy.to(device), _there(call, device), how.products, (True,) * TENSORS), truth)


def _wide_problem() -> Call:
    return _problem(WIDEST + 64, 640, torch.float32)


def try_wide(device: torch.device) -> Tensor:
    """The error of a block that is not fused."""
    call = _wide_problem()
    return _errors(
        [wide.run(_there(call, device), "fp32")], [residual_mlp_reference(*call.to(torch.float64))]
    )


def try_wide_gradient(device: torch.device) -> Tensor:
    """The errors of its gradients."""
    call = _wide_problem()
    with torch.inference_mode(False), torch.enable_grad():
        truth = _gradients(call.to(torch.float64), lambda at: residual_mlp_reference(*at))
        found = _gradients(_there(call, device), lambda at: wide.run(at, "fp32"))
    return _errors(found, truth)


def _gradients(call: Call, run: Callable[[Call], Tensor]) -> tuple[Tensor, ...]:
    leaves = [None if t is None else t.clone().requires_grad_() for t in call.tensors]
    y = run(Call(*leaves, *call[TENSORS:]))  # type: ignore[arg-type]  # as in _there
    dy = _spread(*reversed(y.shape)).t().to(y)
    return torch.autograd.grad(y, [t for t in leaves if t is not None], dy)


def _refusal(device: torch.device) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_available():
        return needs.missing() or "torch finds no GPU"
    return needs.missing() or needs.too_old(device)


def _answer(name: str, run: Callable[[torch.device], Tensor], count: int, allowed: float) -> KnownAnswer:
    return KnownAnswer((name,), run, (0.0,) * count, allowed, _refusal)


def _answers() -> list[KnownAnswer]:
    allowed = PRECISIONS["split"].allowed
    found = [
        _answer(_WIDE, try_wide, 1, allowed),
        _answer(f"{_WIDE}_gradient", try_wide_gradient, TENSORS, allowed),
    ]
    for form, how in PRECISIONS.items():
        for width in FORWARD["h100", form]:
            name = f"residual_mlp_{form}_{width}"
            found += [
                _answer(name, partial(try_forward, width, how), 1, how.allowed),
                _answer(f"{name}_gradient", partial(try_gradient, width, how), TENSORS, how.allowed),
            ]
        for width in STACK["h100", form]:
            name = f"residual_stack_{form}_{width}"
            found.append(_answer(name, partial(try_stack, width, how), 2, how.allowed))
    return found


ANSWERS = _answers()
