"""The measures as operators of `torch.library`, and what autograd sees of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from rgfast.dispatch import schema
from rgfast.ops.spectrum.call import Measure
from rgfast.ops.spectrum.compute import eigenvalues, value
from rgfast.ops.spectrum.gradients import eigenvalue_gradient, gradient
from rgfast.validation import check_readable

__all__ = ["differentiable", "differentiable_eigenvalues", "wants_gradient"]


def wants_gradient(x: Any) -> bool:
    """Whether the call is to be seen by autograd or by the compiler."""
    if torch.compiler.is_compiling():
        return True
    return isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()


def differentiable(call: Measure) -> Tensor:
    """`compute.value` with a gradient."""
    check_readable(call.x, "x")
    result: Tensor = _Measure.apply(*call)  # type: ignore[no-untyped-call]
    return result


def differentiable_eigenvalues(a: Tensor, impl: str) -> Tensor:
    """`compute.eigenvalues` with a gradient."""
    check_readable(a, "a")
    result: Tensor = _Eigenvalues.apply(a, impl)  # type: ignore[no-untyped-call]
    return result


def _once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A backward pass whose gradient refuses to be differentiated.

    Torch's own ``once_differentiable`` lets it through as a constant where the gradient that comes in is one,
    as that of a plain sum is, though it depends on what was saved.
    """

    @wraps(backward)
    def refusing(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            found, *rest = backward(ctx, grad)
        if torch.is_grad_enabled():
            found = _Twice.apply(found, grad, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return found, *rest

    return refusing


class _Twice(torch.autograd.Function):
    """A gradient that depends on ``origins``, by a slope that nobody knows."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, *origins: Tensor) -> Tensor:
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise RuntimeError(
            "trying to differentiate twice a function that is differentiable once: the gradients of spectra "
            "and rank measures are formulas that have none themselves"
        )


class _Measure(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Tensor:
        call = Measure(*flat)
        ctx.save_for_backward(call.x)
        ctx.what = (call.measure, call.centering)
        result: Tensor = torch.ops.rgfast.spectrum_measure(*call)
        return result

    @staticmethod
    @_once
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
    @_once
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
