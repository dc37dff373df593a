"""The reference on one thread, since bits of the library's products depend on how many threads do them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rgfast.ops.residual_mlp.native import LEAST_WIDTH, TENSORS, Arguments
from rgfast.ops.residual_mlp.reference import residual_mlp_reference
from rgfast.runtime.threads import on_one_thread

__all__ = ["residual_mlp_pinned"]


def residual_mlp_pinned(arguments: Arguments, named: bool = False) -> Tensor:
    """The reference's output, its products and those of its backward pass on one thread of the CPU.

    Unless asked for by name, a block of few features or hidden units goes through fp64: its gradients are
    sums over every row with no larger numbers beside them, whose rounding errors differ by more than the
    budget allows between one order of adding and another.
    """
    given = arguments.x.dtype
    narrow = min(arguments.w1.shape) < LEAST_WIDTH and given != torch.float64
    widened = narrow and not named and arguments.x.device.type == "cpu"

    def block(*tensors: Any) -> Tensor:
        if widened:
            tensors = tuple(None if t is None else t.double() for t in tensors)
        return residual_mlp_reference(*tensors, *arguments[TENSORS:]).to(given)

    return on_one_thread(block, *arguments.tensors)
