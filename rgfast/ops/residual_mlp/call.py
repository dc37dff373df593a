"""The validated calls of this room's ops: what an implementation gets."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rgfast.dispatch import is_plain
from rgfast.runtime.tracing import constant_when_traced

__all__ = ["LEAST_WIDTH", "SECONDS_PER_CALL", "TENSORS", "Call", "Consumer", "Products", "StackCall"]

Consumer = Callable[[int, Tensor], object]
# The type that products on a GPU have the accuracy of.
Products = Literal["bf16", "fp16", "tf32", "fp32"]

TENSORS = 7
# Below this many outputs a product is a handful of dot products: the kernels' vectors stay nearly empty, and
# there is no larger output for a rounding error to be small against.
LEAST_WIDTH = 8
# What a block costs that has next to nothing to compute, whichever compiled implementation does it.
SECONDS_PER_CALL = 1.5e-5
_HALVES: dict[torch.dtype, Products] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@constant_when_traced
def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 this is what older switches set, too; reading those may then be an error.
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


class Call(NamedTuple):
    """One residual block; the tensors first, as autograd counts them."""

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
    def device(self) -> torch.device:
        return self.x.device

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

    def flops(self) -> int:
        """Of both products, forward and, if recorded, backward."""
        # Rows may be none, which must not make every implementation equally fast.
        return (12 if self.recorded() else 4) * max(self.rows, 1) * self.w1.numel()

    def too_narrow(self) -> str | None:
        """Why sums of so few terms in fp32 do not keep the error budget, or None."""
        hidden, width = self.w1.shape
        if min(width, hidden) < LEAST_WIDTH:
            return f"D={width}, H={hidden} is too narrow for its vectors"
        return None

    def products(self) -> Products:
        """The products on a GPU: autocast's, those of its own half type, or TF32 or fp32 as torch is set.

        Where types are mixed outside autocast, they are widened to fp32.
        """
        kind = self.x.device.type
        if torch.is_autocast_enabled(kind):
            return _HALVES[torch.get_autocast_dtype(kind)]
        dtype = self.x.dtype
        if dtype in _HALVES and self.w1.dtype == dtype and self.w2.dtype == dtype:
            return _HALVES[dtype]
        return "tf32" if _tf32_allowed() else "fp32"

    def to(self, dtype: torch.dtype) -> Call:
        """The same with every tensor in ``dtype``."""
        # A slice of fields of several types is of their union.
        return Call(*(None if t is None else t.to(dtype) for t in self.tensors), *self[TENSORS:])  # type: ignore[arg-type]

    def shape_class(self) -> Hashable | None:
        x, w1 = self.x, self.w1
        if not is_plain(x):
            return None
        products = self.products() if x.device.type == "cuda" else None
        return x.device, x.dtype, x.numel(), w1.shape, self.across, self.recorded(), products


class StackCall(NamedTuple):
    """Blocks one after the other, without gaps: the ``x`` of all is that of the first."""

    layers: tuple[Call, ...]
    consumer: Consumer | None = None
    tile: int = 1

    @property
    def device(self) -> torch.device:
        return self.layers[0].x.device

    def recorded(self) -> bool:
        return torch.is_grad_enabled() and any(layer.recorded() for layer in self.layers)

    def products(self) -> Products | None:
        """The products on a GPU, None if those of the layers differ."""
        found = {layer.products() for layer in self.layers}
        return found.pop() if len(found) == 1 else None

    def shape_class(self) -> Hashable | None:
        x = self.layers[0].x
        if not is_plain(x):
            return None
        hidden = tuple(layer.w1.shape[0] for layer in self.layers)
        products = self.products() if x.device.type == "cuda" else None
        return x.device, x.dtype, x.numel(), x.shape[-1], hidden, self.recorded(), products
