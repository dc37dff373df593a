"""What rows say linearly about targets: errors on each group of sequences of a map from all the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rgfast.probing.targets import pseudo_inverse
from rgfast.runtime.threads import aligned, one_thread

__all__ = ["errors_on_groups"]

# What the second moments of all groups of some positions may take.
_MOMENTS_BYTES = 64 << 20


def errors_on_groups(
    layers: Sequence[Tensor] | Tensor, targets: Sequence[Tensor], group: Tensor, groups: int
) -> Tensor:
    """Squared errors ``[2, groups, targets, layers, P]`` of the least squares map, and of the training mean.

    ``layers[l][P, n, d_l]`` and ``targets[k][P, n, m_k]`` are finite, row i is in ``group[i]``. A map is
    that of :func:`rgfast.probing.targets.linear_r2`, from moments of the side that has fewer of training rows
    and features. An empty group has no errors; those after fewer than two training rows are NaN.
    """
    positions, n = layers[0].shape[:2]
    found = torch.zeros(
        2, groups, len(targets), len(layers), positions, dtype=torch.float64, device=layers[0].device
    )
    if not n:
        return found
    parts = [(group == g).nonzero()[:, 0] for g in range(groups)]
    rests = [(group != g).nonzero()[:, 0] for g in range(groups)]
    ends = [*itertools.accumulate(y.shape[2] for y in targets)]
    # Bits of eigh and of products depend on the number of threads, and may on how operands lie: all are new.
    with one_thread():
        y = _centred(torch.cat(list(targets), 2))
        for layer, rows in enumerate(layers):
            for at in _few(positions, groups, rows.shape[2]):
                x = _centred(rows[at])
                weights = _weights(x, y[at], parts, rests)
                for g, (part, rest, weight) in enumerate(zip(parts, rests, weights, strict=True)):
                    errors = _errors(x, y[at], part, rest, weight)
                    for k, (target, end) in enumerate(zip(targets, ends, strict=True)):
                        own = errors[..., end - target.shape[2] : end]
                        found[:, g, k, layer, at] = own.sum(2)
    return found


def _few(positions: int, groups: int, width: int) -> Iterator[slice]:
    """The positions that are taken at a time."""
    step = max(1, _MOMENTS_BYTES // (8 * groups * width**2))
    for start in range(0, positions, step):
        yield slice(start, start + step)


def _centred(x: Tensor) -> Tensor:
    wide = aligned(x.to(torch.float64))
    return wide - wide.mean(1, keepdim=True)


def _weights(
    x: Tensor, y: Tensor, parts: Sequence[Tensor], rests: Sequence[Tensor]
) -> Iterator[Tensor | None]:
    """The maps ``[P, d, m]`` from all rows but those of a part, for every part; None if two rows are lacking.

    ``x[P, n, d]`` and ``y[P, n, m]`` are centred over all n.
    """
    if max(map(len, rests)) < x.shape[2]:
        for rest in rests:
            yield None if len(rest) < 2 else _of_few(x[:, rest], y[:, rest])
        return
    moments = [(x[:, part].mT @ x[:, part], x[:, part].mT @ y[:, part]) for part in parts]
    whole = [sum(some[1:], some[0]) for some in zip(*moments, strict=True)]
    for (scatter, cross), rest in zip(moments, rests, strict=True):
        if len(rest) < 2:
            yield None
            continue
        # About the mean of the rest, which is near that of all.
        mean, mean_y = x[:, rest].mean(1, keepdim=True), y[:, rest].mean(1, keepdim=True)
        scatter = whole[0] - scatter - len(rest) * (mean.mT @ mean)
        cross = whole[1] - cross - len(rest) * (mean.mT @ mean_y)
        yield pseudo_inverse(scatter) @ cross


def _of_few(x: Tensor, y: Tensor) -> Tensor:
    """The map from fewer rows than features, by their inner products."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    kernel = x @ x.mT
    # Centred rows have one null direction, the constant one, and centred targets none of it: with a value of
    # its own there, a kernel is mostly regular.
    kernel += (kernel.diagonal(dim1=1, dim2=2).sum(1) / x.shape[1] ** 2)[:, None, None]
    return x.mT @ (pseudo_inverse(kernel) @ y)


def _errors(x: Tensor, y: Tensor, part: Tensor, rest: Tensor, weight: Tensor | None) -> Tensor:
    """Squared errors of the map and of the training mean on some rows ``[2, P, m]``."""
    if not len(part):
        return y.new_zeros(2, len(y), y.shape[2])
    if weight is None:
        return y.new_full((2, len(y), y.shape[2]), torch.nan)
    off = y[:, part] - y[:, rest].mean(1, keepdim=True)
    missed = off - (x[:, part] - x[:, rest].mean(1, keepdim=True)) @ weight
    return torch.stack([missed.square().sum(1), off.square().sum(1)])
