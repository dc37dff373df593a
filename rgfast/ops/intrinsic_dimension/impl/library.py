"""Two nearest neighbors by torch's products, in blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from rgfast.dispatch import Impl
from rgfast.ops.device import by_itself
from rgfast.ops.intrinsic_dimension.call import Call
from rgfast.ops.similarity.neighbors import blocks, distances_from
from rgfast.ops.similarity.rows import in_unit, widened

__all__ = ["DIMENSION"]


def _run(call: Call) -> tuple[Tensor, Tensor]:
    lead, device = call.x.shape[:-2], call.device
    flat = call.x.reshape(-1, *call.x.shape[-2:])
    values = torch.full((len(flat),), torch.nan, dtype=torch.float64, device=device)
    samples = torch.zeros(len(flat), dtype=torch.int64, device=device)
    with torch.no_grad(), by_itself(device.type):
        for e, x in enumerate(flat):
            points = torch.unique(in_unit(widened(x)), dim=0)
            samples[e] = len(points)
            if len(points) < 3:
                continue
            logs = []
            for start, count in blocks(len(points), len(points)):
                squares = distances_from(points, start, count, "euclidean", 2)
                nearest = squares.topk(3, dim=1, largest=False).values
                logs.append((nearest[:, 2] / nearest[:, 1]).log().sum())
            values[e] = 2.0 * (len(points) - 1) / torch.stack(logs).sum()
    return values.reshape(lead), samples.reshape(lead)


def _cost(call: Call) -> float:
    return 1e-4 + call.multiplications() / 10e9


DIMENSION = Impl("library", _run, cost=_cost)
