"""The measures by their definitions in plain fp64 PyTorch, recomputed for every permutation.

Every function takes x[n, d] and y[n, e], n samples in the same order. Mutual nearest neighbors: Huh et al.
2024 ("The Platonic Representation Hypothesis"). Orthogonal Procrustes: Schönemann 1966, Ding et al. 2021.
RSA: Kriegeskorte et al. 2008.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rgfast.ops.cka import reference as cka
from rgfast.ops.similarity.call import Call
from rgfast.ops.similarity.rows import centered, directions, in_unit, nearness, widened

__all__ = ["mutual_knn", "nearest", "procrustes", "ranks", "rsa", "run"]


def run(call: Call) -> Tensor:
    """The measure ``[1 + m, ..., L, L']`` of every pair of layers in each order of the second's samples."""
    measure, options = _MEASURES[call.measure], dict(call.options)
    lead = call.first[0].shape[:-2]
    first, second = ([x.reshape(-1, *x.shape[-2:]) for x in side] for side in (call.first, call.second))
    shape = (len(call.orders), len(first[0]), len(first), len(second))
    out = torch.empty(shape, dtype=torch.float64, device=call.device)
    for k, order in enumerate(call.orders.to(call.device)):
        for e in range(shape[1]):
            for i, x in enumerate(first):
                for j, y in enumerate(second):
                    out[k, e, i, j] = measure(widened(x[e]), widened(y[e][order]), **options)
    return out.reshape(len(call.orders), *lead, *shape[2:])


def mutual_knn(x: Tensor, y: Tensor, *, k: int, metric: str) -> Tensor:
    """The share of the k nearest neighbors that x and y have in common, averaged over samples."""
    common = nearest(x, k, metric)[:, :, None] == nearest(y, k, metric)[:, None]
    return common.sum().to(torch.float64) / (k * len(x))


def nearest(x: Tensor, k: int, metric: str) -> Tensor:
    """The k nearest neighbors ``[n, k]`` of every row but itself, ties by lower index."""
    x = directions(x) if metric == "cosine" else in_unit(x)
    squares = x.square().sum(1)
    out = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    for i, row in enumerate(x):
        if metric == "cosine":
            away = -nearness((x * row).sum(1), squares)
            # A row is nearest to its copies, which rounding alone might hide.
            away[(x == row).all(1) & (row != 0).any()] = -torch.inf
        else:
            away = (x - row).square().sum(1)
        order = away.sort(stable=True).indices
        out[i] = order[order != i][:k]
    return out


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """‖x_cᵀy_c‖_* / (‖x_c‖_F ‖y_c‖_F) of centered columns, NaN without variance."""
    x, y = centered(x), centered(y)
    norms = x.norm() * y.norm()
    nuclear = torch.linalg.svdvals(x.mT @ y).sum()
    return torch.where(norms > 0, (nuclear / norms).clamp_max(1.0), torch.nan)


def rsa(x: Tensor, y: Tensor) -> Tensor:
    """Spearman correlation of the Euclidean distances of x and y, NaN where all of one are equal."""
    a, b = (ranks(torch.pdist(in_unit(z))) for z in (x, y))
    a, b = a - a.mean(), b - b.mean()
    norms = (a.square().sum() * b.square().sum()).sqrt()
    return torch.where(norms > 0, (a * b).sum() / norms, torch.nan)


def ranks(values: Tensor) -> Tensor:
    """Ranks ``[N]`` from 1 on, the mean rank for equal values."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    mean: Tensor = counts.cumsum(0).to(torch.float64) - (counts - 1) / 2
    return mean[inverse]


_MEASURES: dict[str, Callable[..., Any]] = {
    "cka": cka.pair,
    "mutual_knn": mutual_knn,
    "procrustes": procrustes,
    "rsa": rsa,
}
