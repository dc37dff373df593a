"""The residual block against eager PyTorch, torch.compile and its two bare products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rgfast
from rgfast.bench.timing import Absent, Call, Checked, Contest, Size

__all__ = [
    "Leaves",
    "bare",
    "check",
    "check_gradients",
    "compiled",
    "contests",
    "eager",
    "gate",
    "leaves",
    "ours",
    "step",
]

UNIT = 2.0**-24

Leaves = tuple[Tensor, ...]
Block = Callable[..., Tensor]

_WIDTHS: dict[Size, tuple[int, ...]] = {
    "tiny": (16,),
    "quick": (64, 256, 1024),
    "full": (16, 64, 128, 256, 512, 1024, 2048, 4096),
}
_ELEMENTS: dict[Size, int] = {"tiny": 1 << 10, "quick": 1 << 19, "full": 1 << 21}
_CHECKED = 2048  # rows held to the truth: more than any choice of an implementation turns on


def gate(device: str) -> Iterator[Checked]:
    """A block forward and backward, and a stack of three, against eager PyTorch in fp64."""
    tensors = leaves(100, 33, device)
    yield check(tensors)
    yield check_gradients(tensors)
    x, *weights = tensors
    state, single = x.double(), x
    for _ in range(3):
        state, single = eager(state, *(t.double() for t in weights)), eager(single, *weights)
    w1, b1, w2, b2, weight, bias = ([t] * 3 for t in weights)
    with torch.no_grad():
        found = rgfast.residual_stack(x, w1, b1, w2, b2, norm_weight=weight, norm_bias=bias)
    yield Checked("residual_stack", _off([found], [state]), _allowed([single], [state]))


def contests(device: str, size: Size) -> Iterator[Contest]:
    """Forward and forward + backward by width, H = 4 D, rows * D about 2^21 (2^19 if quick)."""
    rivals: dict[str, Callable[[Leaves], Call]] = {
        "eager": partial(_without_gradients, eager),
        "its two products alone": bare,
    }
    if size == "full":  # compiling takes longer than all quick cases
        rivals["torch.compile"] = compiled
    for d in _WIDTHS[size]:
        rows = max(1, _ELEMENTS[size] // d)
        data = partial(leaves, rows, d, device)
        yield Contest(
            f"forward, {rows} x {d}",
            data,
            lambda tensors, impl: _without_gradients(partial(ours, impl=impl), tensors),
            check,
            rivals,
            "residual_mlp",
            size=d,
        )
        yield Contest(
            f"forward and backward, {rows} x {d}",
            data,
            lambda tensors, impl: step(partial(ours, impl=impl), tensors),
            check_gradients,
            {"eager": partial(step, eager)},
            "residual_mlp",
            size=d,
        )


def eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The block as one writes it first: LayerNorm, exact GELU."""
    normed = F.layer_norm(x, (x.shape[-1],), weight, bias)
    return x + F.linear(F.gelu(F.linear(normed, w1, b1)), w2, b2)


def ours(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    impl: Any = "auto",
) -> Tensor:
    """Our block with the same arguments."""
    return rgfast.residual_mlp(x, w1, b1, w2, b2, norm_weight=weight, norm_bias=bias, impl=impl)


def compiled(tensors: Leaves) -> Call:
    """``eager``, compiled for ``tensors``. Raises Absent with what failed."""
    run = _without_gradients(torch.compile(eager), tensors)
    try:
        run()
    except Exception as error:  # a missing compiler has as many types as there are backends
        raise Absent(f"does not work here ({type(error).__name__})") from error
    return run


def bare(tensors: Leaves) -> Call:
    """The two products alone, into memory that is there."""
    x, w1, _, w2, *_ = tensors
    h, y = x.new_empty(len(x), w1.shape[0]), torch.empty_like(x)

    def run() -> None:
        torch.mm(x, w1.t(), out=h)
        torch.mm(h, w2.t(), out=y)

    return run


def step(block: Block, tensors: Leaves) -> Call:
    """Forward and backward of a block, to all of its arguments."""
    trained = tuple(t.clone().requires_grad_() for t in tensors)
    return lambda: torch.autograd.grad(block(*trained), trained, tensors[0])


def leaves(rows: int, d: int, device: str = "cpu") -> Leaves:
    """x ``[rows, d]`` and the weights of a block with H = 4 d."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    h = 4 * d
    drawn = (
        draw(rows, d),
        draw(h, d) / d**0.5,
        0.1 * draw(h),
        draw(d, h) / h**0.5,
        0.1 * draw(d),
        1 + 0.1 * draw(d),
        0.1 * draw(d),
    )
    return tuple(t.to(device) for t in drawn)


def check(tensors: Leaves, impl: str = "auto") -> Checked:
    """The error of the block on its first rows; allowed is twice eager's own and rounding."""
    some = (tensors[0][:_CHECKED], *tensors[1:])
    with torch.no_grad():
        truth = eager(*(t.double() for t in some))
        off = _off([ours(*some, impl=impl)], [truth])
        return Checked(f"residual_mlp at D={some[0].shape[1]}", off, _allowed([eager(*some)], [truth]))


def check_gradients(tensors: Leaves, impl: str = "auto") -> Checked:
    """The error of all gradients of a loss, on the first rows."""
    some = (tensors[0][:_CHECKED], *tensors[1:])
    truth = _gradients(eager, [t.double() for t in some])
    allowed = _allowed(_gradients(eager, list(some)), truth)
    off = _off(_gradients(partial(ours, impl=impl), list(some)), truth)
    return Checked(f"residual_mlp, gradients at D={some[0].shape[1]}", off, allowed)


def _without_gradients(block: Block, tensors: Leaves) -> Call:
    def run() -> Tensor:
        with torch.no_grad():
            return block(*tensors)

    return run


def _gradients(block: Block, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    trained = [t.clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(block(*trained).square().sum(), trained)


def _off(found: list[Tensor] | tuple[Tensor, ...], truth: list[Tensor] | tuple[Tensor, ...]) -> float:
    """The largest relative error of a tensor, in the Frobenius norm."""
    pairs = zip(found, truth, strict=True)
    return max(float((a.double() - b.double()).norm() / b.norm()) for a, b in pairs)


def _allowed(single: list[Tensor] | tuple[Tensor, ...], truth: list[Tensor] | tuple[Tensor, ...]) -> float:
    return 2 * _off(single, truth) + 4 * UNIT
