"""The measures as operators of `torch.library`, and what autograd sees of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rgfast.dispatch import schema
from rgfast.ops.spectrum.call import Measure
from rgfast.ops.spectrum.compute import eigenvalues, value
from rgfast.ops.spectrum.gradients import eigenvalue_gradient, gradient

__all__ = ["differentiable", "differentiable_eigenvalues", "wants_gradient"]


def wants_gradient(x: Any) -> bool:
    """Whether the call is to be seen by autograd or by the compiler."""
    if torch.compiler.is_compiling():
        return True
    return isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()


def differentiable(call: Measure) -> Tensor:
    """`compute.value` with a gradient."""
    result: Tensor = _Measure.apply(*call)  # type: ignore[no-untyped-call]
    return result


def differentiable_eigenvalues(a: Tensor, impl: str) -> Tensor:
    """`compute.eigenvalues` with a gradient."""
    result: Tensor = _Eigenvalues.apply(a, impl)  # type: ignore[no-untyped-call]
    return result


class _Measure(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Tensor:
        call = Measure(*flat)
        ctx.save_for_backward(call.x)
        ctx.what = (call.measure, call.centering)
        result: Tensor = torch.ops.rgfast.spectrum_measure(*call)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        rest = (None,) * (len(Measure._fields) - 1)
        return torch.ops.rgfast.spectrum_gradient(x, grad, *ctx.what), *rest


class _Eigenvalues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, impl: str) -> Tensor:
        ctx.save_for_backward(a)
        result: Tensor = torch.ops.rgfast.eigvalsh(a, impl)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (a,) = ctx.saved_tensors
        return torch.ops.rgfast.eigvalsh_gradient(a, grad), None


def _fake_measure(*flat: Any) -> Tensor:
    x, measure = flat[:2]
    last = (min(x.shape[-2], x.shape[-1]),) if measure == "singular_values" else ()
    return torch.empty((*x.shape[:-2], *last), dtype=torch.float64, device=x.device)


def _fake_gradient(x: Tensor, grad: Tensor, measure: str, centering: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_eigenvalues(a: Tensor, impl: str) -> Tensor:
    return torch.empty(a.shape[:-1], dtype=a.dtype, device=a.device)


def _fake_eigenvalue_gradient(a: Tensor, grad: Tensor) -> Tensor:
    return torch.empty(a.shape, dtype=a.dtype, device=a.device)


def _register() -> torch.library.Library:
    library = torch.library.Library("rgfast", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, signature, function, fake in (
        ("spectrum_measure", schema(Measure), lambda *flat: value(Measure(*flat)), _fake_measure),
        (
            "spectrum_gradient",
            "(Tensor x, Tensor grad, str measure, str centering) -> Tensor",
            gradient,
            _fake_gradient,
        ),
        ("eigvalsh", "(Tensor a, str impl) -> Tensor", eigenvalues, _fake_eigenvalues),
        (
            "eigvalsh_gradient",
            "(Tensor a, Tensor grad) -> Tensor",
            eigenvalue_gradient,
            _fake_eigenvalue_gradient,
        ),
    ):
        library.define(name + signature)  # type: ignore[no-untyped-call]
        library.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"rgfast::{name}", fake, lib=library)
    return library


_LIBRARY = _register()  # the operators live as long as it does
