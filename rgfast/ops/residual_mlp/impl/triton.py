"""The block on an NVIDIA GPU: fused in Triton up to 256 features, the library's products beyond."""

from __future__ import annotations

import torch
from torch import Tensor

from rgfast.dispatch import Impl
from rgfast.ops.residual_mlp.call import Call
from rgfast.ops.residual_mlp.gpu import contract, needs, wide
from rgfast.ops.residual_mlp.gpu.table import WIDEST, padded

__all__ = ["BLOCK"]

# Architectures that the fused block was measured on with this code: none yet.
MEASURED: frozenset[tuple[int, int]] = frozenset()

# Products a second on an H100, both passes, by the width of a tile: the prototypes' (README).
_FLOPS = {
    "bf16": {64: 170e12, 128: 250e12, 256: 340e12, 512: 400e12},
    "tf32": {64: 120e12, 128: 200e12, 256: 250e12, 512: 220e12},
    "fp32": {64: 80e12, 128: 115e12, 256: 110e12, 512: 45e12},
}
# The backward pass, with its weight gradients, is so much slower per product.
_RECORDED = 0.5
_SECONDS_PER_CALL = 3e-5

# Settled on import: a traced graph reads a constant, where it could not follow the search for a compiler.
_MISSING = needs.missing()


def _can_run(call: Call) -> str | None:
    if call.x.dtype == torch.float64:
        return "it computes in fp32 and narrower types, and x is float64"
    if call.mixes:
        return "it does not mix positions"
    return needs.too_old(call.device)


def _by_name_only(call: Call) -> str | None:
    reason = call.too_narrow()
    if reason is not None:
        return reason
    if needs.capability(call.device) not in MEASURED:
        return "no measured row stands for this architecture"
    return None


def _cost(call: Call) -> float:
    products = needs.products_of(call)
    rates = _FLOPS["bf16" if products == "fp16" else products]
    rate = rates[min(max(padded(call.w1.shape[1]), 64), 512)]
    return _SECONDS_PER_CALL + call.flops() / (rate * (_RECORDED if call.recorded() else 1.0))


def _run(call: Call) -> Tensor:
    products = needs.products_of(call)
    return wide.run(call, products) if call.w1.shape[1] > WIDEST else contract.run(call, products)


BLOCK = Impl("triton", _run, _can_run, _cost, ("cuda",), lambda: _MISSING, _by_name_only)
