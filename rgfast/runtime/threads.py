"""Library calls on one thread, on operands that lie the same, and in the precision they name.

On some processors MKL cuts sums by the number of threads, on some by addresses and strides of the operands as
well. New tensors of PyTorch begin at a multiple of 64 bytes, so what is computed from them on one thread
depends on values and shapes alone; only what a caller passes in has to be laid out again (`aligned`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["aligned", "all_on_one_thread", "no_autocast", "on_one_thread", "one_thread"]

# What a function of several results, some of which may not exist, returns.
Tensors = tuple[Tensor | None, ...]

_ALIGNMENT = 64  # bytes; what PyTorch gives a new tensor

_LOCK = threading.RLock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU operators on one thread inside the block, so that results do not depend on the count.

    The count is process-wide state of the libraries below torch, so Python threads take turns here.
    """
    with _LOCK:
        before = torch.get_num_threads()
        if before == 1:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def aligned(x: Tensor) -> Tensor:
    """``x``, copied unless it is contiguous and begins where a new tensor would; as it is off the CPU."""
    if x.device.type != "cpu" or (x.is_contiguous() and x.data_ptr() % _ALIGNMENT == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _casts(device_type: str) -> bool:
    """Whether autocast is on for a type of device; some, as meta, know none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


@contextmanager
def no_autocast(device_type: str) -> Iterator[None]:
    """Run the block in the precision it names, whatever ``torch.autocast`` surrounds it."""
    if not _casts(device_type):
        yield
        return
    with torch.autocast(device_type, enabled=False):
        yield


def on_one_thread(function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """``function(*args)`` of :func:`aligned` arguments on one thread of the CPU and outside autocast, and so
    its backward passes.

    On other devices only autocast is kept out. A graph that is being traced, and the transforms of
    ``torch.func``, see through: these run what they made of it when and how they like.
    """
    (found,) = all_on_one_thread(lambda *given: (function(*given),), *args)
    assert found is not None
    return found


def all_on_one_thread(function: Callable[..., Tensors], *args: Tensor | None) -> Tensors:
    """:func:`on_one_thread` for a function that returns several tensors."""
    tensors = [t for t in args if t is not None]
    kind = tensors[0].device.type
    if torch.compiler.is_compiling() or (kind != "cpu" and not _casts(kind)):
        return function(*args)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and not _transformed(tensors):
        found: Tensors = _Apart.apply(function, kind, *args)  # type: ignore[no-untyped-call]  # torch's own
        return found
    if not _transformed(tensors):
        args = _aligned(args)
    with _apart(kind):
        return function(*args)


def _aligned(args: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else aligned(t) for t in args)


@contextmanager
def _apart(kind: str) -> Iterator[None]:
    with no_autocast(kind):
        if kind == "cpu":
            with one_thread():
                yield
        else:
            yield


def _transformed(tensors: list[Tensor]) -> bool:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return forward_ad._current_level >= 0 or any(wrapped(t) for t in tensors)


class _Apart(torch.autograd.Function):
    """The graph of the function is made in the forward pass and kept for the backward one.

    A backward pass that is to be differentiated itself is a function of this kind again.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensors], kind: str, *args: Tensor | None) -> Tensors:
        leaves = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in args]
        with _apart(kind), torch.enable_grad():
            found = function(*_aligned(leaves))
        ctx.save_for_backward(*args)
        ctx.function, ctx.kind, ctx.leaves, ctx.inner = function, kind, leaves, found
        return tuple(None if y is None else y.detach() for y in found)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        wanted: tuple[bool, ...] = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            function, count = ctx.function, len(wanted)

            def gradients(*given: Tensor | None) -> Tensors:
                ys = function(*_aligned(given[:count]))
                return _pulled(ys, given[:count], wanted, given[count:], again=True)

            found = all_on_one_thread(gradients, *ctx.saved_tensors, *dys)
        else:
            with _apart(ctx.kind):
                found = _pulled(ctx.inner, ctx.leaves, wanted, _aligned(dys), again=False)
        rest = iter(found)
        return (None, None, *(next(rest) if want else None for want in wanted))


def _pulled(
    ys: Sequence[Tensor | None],
    args: Sequence[Tensor | None],
    wanted: Sequence[bool],
    dys: Sequence[Tensor | None],
    *,
    again: bool,
) -> Tensors:
    """Gradients of Σ ys · dys in the arguments that are wanted, None where nothing depends on one."""
    inputs = [t for t, want in zip(args, wanted, strict=True) if want and t is not None]
    pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if y is not None and y.requires_grad]
    if not pairs:
        return (None,) * len(inputs)
    outputs, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs, inputs, weights, retain_graph=True, create_graph=again, allow_unused=True
    )


def _after_fork() -> None:
    """A forked child lacks the threads of GNU OpenMP's teams, and every parallel loop would wait for them."""
    global _LOCK
    _LOCK = threading.RLock()  # a thread that the child lacks may have had it
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
