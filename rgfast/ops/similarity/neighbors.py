"""Nearest neighbors of samples, prepared so that another order of the samples costs a look-up.

Neighbors belong to samples, and a permutation only renames them, but for ties: those go to the lower index,
which is another one in another order. Ties are the rule where tokens repeat or a layer is constant, and if
they went by the first order both sides would break them alike in the value and not in its null. So for rows
whose last neighbors are tied the candidates are kept, once per distinct row, and chosen anew in every order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rgfast.ops.similarity.rows import directions, in_unit, nearness

__all__ = ["Neighbors", "blocks", "distances_from", "neighbors", "overlaps"]

# Distances of a block of rows, and flags of neighbors of another.
_DISTANCE_BYTES, _FLAG_BYTES = 16 << 20, 4 << 20
_ROUNDOFF = 2.0**-53


@dataclass(frozen=True)
class Neighbors:
    """The k neighbors of n samples.

    ``near[n, k]`` are samples; n stands for the last ones of a row where these are to be chosen. The r-th
    such row is ``rows[r]``, it lacks ``short[r]``, and they come from ``tied[which[r]]``, samples padded by
    n.
    """

    near: Tensor
    rows: Tensor
    short: Tensor
    which: Tensor
    tied: Tensor

    def ordered(self, order: Tensor) -> Tensor:
        """Neighbors ``[n, k]`` as places in ``order[n]`` of the samples, for the sample at every place."""
        n, k = self.near.shape
        place = torch.full((n + 1,), n, dtype=torch.int64, device=order.device)
        place[order] = torch.arange(n, dtype=torch.int64, device=order.device)
        found = place[self.near]
        if len(self.rows):
            most = int(self.short.max()) + 1
            step = max(1, _DISTANCE_BYTES // (8 * self.tied.shape[1]))
            lowest = torch.cat(
                [
                    place.index_select(0, part.flatten()).view(part.shape).topk(most, largest=False).values
                    for part in torch.split(self.tied, step)
                ]
            )
            candidates = lowest[self.which]
            own = candidates == place[self.rows][:, None]
            candidates = candidates.masked_fill(own, n).sort(1).values
            slot = torch.arange(k, dtype=torch.int64, device=order.device) - (k - self.short[:, None])
            chosen = candidates.gather(1, slot.clamp_min(0))
            found[self.rows] = torch.where(slot >= 0, chosen, found[self.rows])
        return found[order]


def neighbors(x: Tensor, k: int, metric: str) -> Neighbors:
    """The neighbors of rows ``x[n, d]`` (fp64), k < n.

    Equal rows are made one first, so that whatever a product rounds to, copies are at one distance from all
    others.
    """
    n, device = len(x), x.device
    points = directions(x) if metric == "cosine" else in_unit(x)
    points, group = torch.unique(points, dim=0, return_inverse=True)
    lists, nearer, ties = [], [], []
    for start, count in blocks(len(points), n):
        away = distances_from(points, start, count, metric, k).index_select(1, group)
        # With itself, which nothing is nearer to, every row has k + 1.
        values, index = away.topk(k + 1, dim=1, largest=False)
        last = values[:, -1:]
        strictly, equal = (away < last).sum(1), away == last
        tied = strictly + equal.sum(1) > k + 1
        lists.append(index)
        nearer.append(torch.where(tied, strictly, k + 1))
        ties += [equal[row].nonzero()[:, 0].to(torch.int32) for row in tied.nonzero()[:, 0]]
    strict = torch.cat(nearer)
    columns = torch.arange(k + 1, dtype=torch.int64, device=device)
    samples = torch.cat(lists).masked_fill(columns >= strict[:, None], n)[group]
    own = samples == torch.arange(n, dtype=torch.int64, device=device)[:, None]
    own[~own.any(1), k] = True  # itself among the tied
    near = samples[~own].view(n, k)
    short = (near == n).sum(1)
    rows = short.nonzero()[:, 0]
    tied_points = (strict <= k).long()
    return Neighbors(
        near,
        rows,
        short[rows],
        (tied_points.cumsum(0) - 1)[group[rows]],
        torch.nn.utils.rnn.pad_sequence(ties, batch_first=True, padding_value=n)
        if ties
        else torch.empty(0, 0, dtype=torch.int32, device=device),
    )


def blocks(points: int, columns: int) -> Iterator[tuple[int, int]]:
    """First and number of the points that are compared with ``columns`` others at a time."""
    step = max(1, _DISTANCE_BYTES // (8 * columns))
    for start in range(0, points, step):
        yield start, min(step, points - start)


def distances_from(points: Tensor, start: int, count: int, metric: str, k: int) -> Tensor:
    """How far distinct ``points[start : start + count]`` are from all ``[count, U]``; least from themselves.

    Squared distances in Euclid's metric, those to the k nearest to full precision.
    """
    block = points[start : start + count]
    if metric == "euclidean":
        return _squares_from(points, start, block, k)
    away = -nearness(block @ points.mT, points.square().sum(1))
    some = (block != 0).any(1)
    away.diagonal(start)[some] = -torch.inf  # a row of zeros has cosine 0 with itself, too
    return away


def _squares_from(points: Tensor, start: int, block: Tensor, k: int) -> Tensor:
    """By a product, whose rounding is known; all that may be among the k nearest then by differences."""
    mean = points.mean(0)
    z, w = points - mean, block - mean
    norms = z.square().sum(1)
    away = torch.addmm(norms + w.square().sum(1)[:, None], w, z.mT, alpha=-2.0)
    away.diagonal(start).zero_()
    off = 8 * (points.shape[1] + 16) * _ROUNDOFF * norms.max()
    last = away.topk(min(k + 1, len(points)), dim=1, largest=False).values[:, -1:]
    row, other = (away <= last + 2 * off).nonzero(as_tuple=True)
    if 4 * len(row) > away.numel():
        return torch.cdist(block, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    step = max(1, _DISTANCE_BYTES // (8 * points.shape[1]))
    for r, o in zip(torch.split(row, step), torch.split(other, step), strict=True):
        away[r, o] = (block[r] - points[o]).square().sum(1)
    return away


def overlaps(first: Tensor, layers: int, second: Neighbors, orders: Tensor) -> Tensor:
    """Shares ``[orders, layers]`` of neighbors ``first[n, layers * k]`` that ``second`` has in each order."""
    n, k = second.near.shape
    step = max(1, _FLAG_BYTES // n)
    flags = torch.zeros(min(step, n), n, dtype=torch.uint8, device=first.device)
    counts = torch.zeros(len(orders), layers, dtype=torch.int64, device=first.device)
    for count, order in zip(counts, orders, strict=True):
        near = second.ordered(order)
        for start in range(0, n, step):
            here = near[start : start + step]
            marked = flags[: len(here)].scatter_(1, here, 1)
            common = marked.gather(1, first[start : start + step]).view(len(here), layers, k)
            count += common.sum((0, 2))
            marked.scatter_(1, here, 0)
    return counts.to(torch.float64) / (n * k)
