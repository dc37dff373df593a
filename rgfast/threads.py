"""Library calls whose bits depend on the thread count run at a fixed one, on operands that lie the same.

On some processors MKL cuts sums by the number of threads, on some by addresses and strides of the operands as
well. New tensors of PyTorch begin at a multiple of 64 bytes, so what is computed from them on one thread
depends on values and shapes alone; only what a caller passes in has to be laid out again (`aligned`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["aligned", "on_one_thread", "one_thread"]

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


def on_one_thread(function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """``function(*args)`` of :func:`aligned` arguments on one thread of the CPU, and so its backward pass.

    Nothing of that is done on other devices.

    A graph that is being traced, and the transforms of ``torch.func``, see through: these run what they made
    of it when and how they like.
    """
    tensors = [t for t in args if t is not None]
    if torch.compiler.is_compiling() or tensors[0].device.type != "cpu":
        return function(*args)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and not _transformed(tensors):
        y: Tensor = _OnOneThread.apply(function, *args)  # type: ignore[no-untyped-call]
        return y
    if not _transformed(tensors):
        args = _aligned(args)
    with one_thread():
        return function(*args)


def _aligned(args: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else aligned(t) for t in args)


def _transformed(tensors: list[Tensor]) -> bool:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return forward_ad._current_level >= 0 or any(wrapped(t) for t in tensors)


class _OnOneThread(torch.autograd.Function):
    """The graph of the function is made in the forward pass and kept for the backward one."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
        leaves = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in args]
        with one_thread(), torch.enable_grad():
            y = function(*_aligned(leaves))
        ctx.save_for_backward(*args)
        ctx.function, ctx.leaves, ctx.inner = function, leaves, y
        return y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        args, y = ctx.leaves, ctx.inner
        with one_thread(), torch.enable_grad():
            if again:
                args = ctx.saved_tensors
                y = ctx.function(*_aligned(args))
            wanted = [t for t, want in zip(args, ctx.needs_input_grad[1:], strict=True) if want]
            found = torch.autograd.grad(
                y, wanted, aligned(dy), retain_graph=True, create_graph=again, allow_unused=True
            )
        rest = iter(found)
        return (None, *(next(rest) if want else None for want in ctx.needs_input_grad[1:]))
