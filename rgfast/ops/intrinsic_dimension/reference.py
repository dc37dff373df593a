"""TwoNN (Facco, d'Errico, Rodriguez and Laio 2017) by its definition in plain fp64 PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from rgfast.ops.intrinsic_dimension.call import Call
from rgfast.ops.similarity.rows import in_unit, widened

__all__ = ["run", "two_nn"]


def run(call: Call) -> tuple[Tensor, Tensor]:
    """The dimension ``[...]`` and the number of distinct rows ``[...]``."""
    lead = call.x.shape[:-2]
    flat = call.x.reshape(-1, *call.x.shape[-2:])
    found = [two_nn(widened(x)) for x in flat]
    values = torch.tensor([d for d, _ in found], dtype=torch.float64, device=call.device)
    samples = torch.tensor([n for _, n in found], dtype=torch.int64, device=call.device)
    return values.reshape(lead), samples.reshape(lead)


def two_nn(x: Tensor) -> tuple[float, int]:
    """(n − 1)/Σ ln(r₂/r₁) of the n distinct rows of ``x[n, d]``, and n; NaN for fewer than 3."""
    x = torch.unique(in_unit(x), dim=0)
    if len(x) < 3:
        return float("nan"), len(x)
    logs = torch.zeros((), dtype=torch.float64, device=x.device)
    for row in x:
        _, first, second = (x - row).norm(dim=1).topk(3, largest=False).values
        logs += (second / first).log()
    return float((len(x) - 1) / logs), len(x)
