"""Adding the sums of two streams: exact for different shifts and units."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rgfast.runtime.threads import one_thread
from rgfast.runtime.waiting import waits_for
from rgfast.streaming.algebra import common_exponent, joint_mean, recentred, rescaled
from rgfast.streaming.sizes import alike
from rgfast.streaming.sums import Sums

__all__ = ["add_sums"]


@one_thread()
def add_sums(sums: Sums, other: Sums) -> None:
    """Add all of ``other``, of the same layers, pairs and positions, to ``sums``. Both are settled."""
    together = waits_for(sums.begun.device)  # a launch takes longer than what it does for a layer or pair
    targets = _joint_means(sums, other) if together else _joint_means_apart(sums, other)
    move_a, move_b, rescale = [], [], []
    for layer, target in enumerate(targets):
        sums.exponents[layer], down_a, down_b = common_exponent(sums.exponents[layer], other.exponents[layer])
        unit = math.ldexp(1.0, -sums.exponent(layer))
        move_a.append((sums.shift[layer] - target) * unit)
        move_b.append((other.shift[layer] - target) * unit)
        rescale.append((down_a, down_b))
        sums.shift[layer] = target
    keys = list(sums.moment)
    for some in alike(keys, sums.widths, sums.positions) if together else [[key] for key in keys]:
        found: list[Tensor] = []
        for side, (part, moves) in enumerate(((sums, move_a), (other, move_b))):
            moments = [rescaled(part.moment[i, j], rescale[i][side], rescale[j][side]) for i, j in some]
            left, right = ([moves[key[at]] for key in some] for at in (0, 1))
            found.append(recentred(_cat(moments), _cat(left), _cat(right)))
        total = found[0].add_(found[1]).contiguous()
        sums.moment |= zip(some, torch.split(total, sums.positions), strict=True)
    sums.begun, sums.summed = sums.begun | other.begun, sums.summed or other.summed
    if sums.factors is not None:
        assert other.factors is not None
        sums.factors.merge(other.factors, (move_a, move_b), rescale)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _joint_means_apart(sums: Sums, other: Sums) -> list[Tensor]:
    """The mean of both ``[P, d_l]`` of every layer."""
    mine, theirs = sums.count(), other.count()
    layers = range(len(sums.widths))
    return [joint_mean(sums.mean(layer), mine, other.mean(layer), theirs) for layer in layers]


def _joint_means(sums: Sums, other: Sums) -> list[Tensor]:
    """The same, all layers of one width at once."""
    found: dict[int, Tensor] = {}
    for width in dict.fromkeys(sums.widths):
        layers = [layer for layer, one in enumerate(sums.widths) if one == width]
        (mean_a, n_a), (mean_b, n_b) = (
            (part.means(layers).flatten(0, 1), part.count().repeat(len(layers))) for part in (sums, other)
        )
        joint = joint_mean(mean_a, n_a, mean_b, n_b)
        found |= zip(layers, torch.split(joint, sums.positions), strict=True)
    return [found[layer] for layer in range(len(sums.widths))]
