"""Blocks to check the Triton kernels with, and what fp64 and fp32 make of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rgfast.ops.residual_mlp.call import Call
from rgfast.ops.residual_mlp.gpu import contract
from rgfast.ops.residual_mlp.reference import residual_mlp_reference

UNIT = 2.0**-24
NAMES = ("y", "x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias")
OPTIONS = ("layer", "gelu", 0.7, 1e-5, "features")
Tensors = list[Tensor | None]

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
if DEVICE == "cpu":  # which stands for a GPU
    torch.library.impl("rgfast::residual_mlp_gpu", "CPU", contract.op_forward)
    torch.library.impl("rgfast::residual_mlp_gpu_backward", "CPU", contract.op_backward)


def drawn(
    rows: int, d: int, h: int, *, norm: str | None = "layer", biases: bool = True, seed: int = 0
) -> Tensors:
    """x, w1, b1, w2, b2, norm_weight, norm_bias."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    affine = biases and norm is not None
    return [
        draw(rows, d) + 0.3,
        draw(h, d) / d**0.5,
        draw(h) * 0.3 if biases else None,
        draw(d, h) / h**0.5,
        draw(d) * 0.3 if biases else None,
        1 + 0.2 * draw(d) if affine else None,
        0.2 * draw(d) if affine else None,
    ]


def evaluated(block: Callable[..., Tensor], tensors: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of ``block`` in ``dtype``."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    y = block(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    present = [(name, t) for name, t in zip(NAMES[1:], leaves, strict=True) if t is not None]
    gradients = torch.autograd.grad(y, [t for _, t in present], dy)
    return {"y": y.detach()} | {name: g for (name, _), g in zip(present, gradients, strict=True)}


def ours(products: str, options: Any = OPTIONS) -> Callable[..., Tensor]:
    return lambda *tensors: contract.run(Call(*tensors, *options), products)


def theirs(options: Any = OPTIONS) -> Callable[..., Tensor]:
    return lambda *tensors: residual_mlp_reference(*tensors, *options)


def over_fp32(tensors: Tensors, options: Any = OPTIONS, run: Any = contract.run) -> dict[str, float]:
    """Errors of the fp32 form by what is allowed: twice eager fp32's own and 4u of the truth."""
    truth = evaluated(theirs(options), tensors, torch.float64)
    single = evaluated(theirs(options), tensors, torch.float32)
    got = evaluated(lambda *t: run(Call(*t, *options), "fp32"), tensors, torch.float32)
    found = {}
    for name, want in truth.items():
        assert torch.isfinite(got[name]).all(), name
        own = (single[name].double() - want).norm()
        allowed = 2 * own + 4 * UNIT * want.norm()
        error = (got[name].double() - want).norm()
        found[name] = float(error / allowed) if allowed > 0 else float(error)
    return found


def layers_of(depth: int, rows: int, d: int, h: int, options: Any = OPTIONS, **kind: Any) -> list[Call]:
    """Blocks of a stack, every other one without biases."""
    tensors = [drawn(rows, d, h, norm=options[0], seed=seed, **kind) for seed in range(depth)]
    for each in tensors[1::2]:
        each[2] = each[4] = each[5] = each[6] = None
    return [Call(tensors[0][0], *each[1:], *options) for each in tensors]  # type: ignore[arg-type]  # never None


def stream(layers: list[Call], dtype: torch.dtype) -> list[Tensor]:
    """The output of every block by the reference in ``dtype``."""
    found = [layers[0].x.to(dtype)]
    for call in layers:
        found.append(residual_mlp_reference(*call.to(dtype)._replace(x=found[-1])))
    return found[1:]


def eager(*given: Any) -> Tensor:
    """The block as one writes it in PyTorch, in the type of its tensors."""
    x, w1, b1, w2, b2, weight, bias = given
    normed = F.layer_norm(x, x.shape[-1:], weight, bias)
    return x + 0.7 * F.linear(F.gelu(F.linear(normed, w1, b1)), w2, b2)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, bool]:
    return {name: torch.equal(first[name], second[name]) for name in first}


def close_second_derivatives(block: Callable[..., Tensor], tensors: Tensors) -> bool:
    def penalised(block: Callable[..., Tensor]) -> Tensor:
        x = tensors[0].clone().requires_grad_()  # type: ignore[union-attr]  # never None
        (slope,) = torch.autograd.grad(block(x, *tensors[1:]).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), x)
        return second

    second, want = penalised(block), penalised(theirs())
    return bool((second - want).norm() < 1e-4 * want.norm())
