"""The reference on one thread, since bits of the library's products depend on how many threads do them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rgfast.ops.residual_mlp.call import TENSORS, Call
from rgfast.ops.residual_mlp.reference import residual_mlp_reference
from rgfast.runtime.threads import on_one_thread

__all__ = ["residual_mlp_pinned"]


def residual_mlp_pinned(call: Call) -> Tensor:
    """The reference's output, its products and those of its backward pass on one thread of the CPU."""

    def block(*tensors: Any) -> Tensor:
        return residual_mlp_reference(*tensors, *call[TENSORS:])

    return on_one_thread(block, *call.tensors)
