"""The worked example of CONTRIBUTING, "Adding an implementation": it is `rgfast/ops/moments/impl/mkl.py`.

One batched product for all pairs of layers, which have to be equally wide. Its cost is made up.
"""

from __future__ import annotations

import math

import torch

from rgfast.dispatch import Impl
from rgfast.ops.moments.call import Products
from rgfast.runtime.threads import no_autocast, one_thread

__all__ = ["MOMENTS"]


def _can_run(call: Products) -> str | None:
    if not call.extra:
        return "it adds |y|^2 and 1 to every row"
    widths = {x.shape[2] for x in call.rows}
    return None if len(widths) == 1 else f"layers must be equally wide, got widths {sorted(widths)}"


def _run(call: Products) -> None:
    with one_thread(), no_autocast("cpu"):
        z = torch.stack([x.double() for x in call.rows])  # [L, P, b, d]
        z -= torch.stack(list(call.shifts))[:, :, None]
        z *= torch.tensor([math.ldexp(1.0, -e) for e in call.exponents], dtype=z.dtype)[:, None, None, None]
        z = torch.cat([z, z.square().sum(-1, keepdim=True), torch.ones_like(z[..., :1])], -1)
        if call.keep is not None:
            z.masked_fill_(~call.keep[..., None], 0.0)
        left, right = ([pair[side] for pair in call.sums] for side in (0, 1))
        for total, product in zip(call.sums.values(), z[left].mT @ z[right], strict=True):
            total += product


MOMENTS = Impl(
    "mkl",
    _run,
    can_run=_can_run,
    cost=lambda call: 5e-6 + call.multiplications() / 10e9,
    devices=("cpu",),
)
