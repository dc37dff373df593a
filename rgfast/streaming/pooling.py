"""The sums of the samples of all positions as one cloud, from those of every position."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rgfast.runtime.threads import one_thread
from rgfast.runtime.waiting import sent, waits_for
from rgfast.streaming.algebra import recentred
from rgfast.streaming.factors import TriangularFactors
from rgfast.streaming.sizes import alike
from rgfast.streaming.sums import Sums

__all__ = ["pooled"]


@one_thread()
def pooled(sums: Sums, factored: Sequence[int]) -> Sums:
    """Those of the samples of all positions, at a single one, with triangular factors of the layers
    ``factored``. ``sums`` are settled."""
    device = sums.begun.device
    count = sums.count()
    one = Sums(
        widths=sums.widths,
        begun=(count > 0).any().reshape(1),
        exponents=list(sums.exponents),
        shift=list(sums.shift),  # until they are known
        moment=dict(sums.moment),
        factors=TriangularFactors(factored, sums.widths, 1, device) if factored else None,
        summed=sums.summed,
    )
    if waits_for(device):
        moves, positions = _joined_moves(sums, one, count), len(count)
        for keys in alike(sums.moment, sums.widths, positions):
            # A launch takes longer than what it does for a pair.
            left, right = ([moves[key[side]] for key in keys] for side in (0, 1))
            one.moment |= zip(keys, sums.pooled(keys, left, right), strict=True)
    else:
        moves = _moves(sums, one, count)
        for (i, j), moment in sums.moment.items():
            one.moment[i, j] = recentred(moment, moves[i], moves[j]).sum(0, keepdim=True).contiguous()
    if sums.factors is not None and one.factors is not None:
        sums.factors.pooled(moves, one.factors, count > 0)
    return one


def _moves(sums: Sums, one: Sums, count: Tensor) -> list[Tensor]:
    """Where the shifts of every position lie, seen from the ones of all, which are set; in the units."""
    count, moves = count[:, None], []
    for layer in range(len(sums.widths)):
        mean = sums.mean(layer)
        first = (count > 0).to(torch.uint8).argmax(0)
        # Differences from it vanish exactly for a constant column.
        base = torch.where(one.begun, mean.index_select(0, first)[0], 0.0)[None]
        weighed = torch.where(count > 0, (mean - base) * count, 0.0).sum(0) / count.sum().clamp_min(1.0)
        one.shift[layer] = base + weighed
        moves.append((sums.shift[layer] - one.shift[layer]) * math.ldexp(1.0, -sums.exponent(layer)))
    return moves


def _joined_moves(sums: Sums, one: Sums, count: Tensor) -> list[Tensor]:
    """As :func:`_moves`, all layers of one width at once."""
    moves: dict[int, Tensor] = {}
    some = (count > 0)[:, None]
    first, total = some[:, 0].to(torch.uint8).argmax(0, keepdim=True), count.sum().clamp_min(1.0)
    for width in dict.fromkeys(sums.widths):
        layers = [layer for layer, one_width in enumerate(sums.widths) if one_width == width]
        exponents = [float(sums.exponent(layer)) for layer in layers]
        unit = sent(torch.from_numpy(np.exp2(exponents)), count.device)[:, None, None]
        shift = torch.stack([sums.shift[layer] for layer in layers])
        mean = sums.means(layers)
        base = torch.where(one.begun, mean.index_select(1, first), 0.0)
        weighed = torch.where(some, (mean - base) * count[:, None], 0.0).sum(1, keepdim=True) / total
        found = base + weighed
        for layer, to, move in zip(layers, found.unbind(), ((shift - found) / unit).unbind(), strict=True):
            one.shift[layer], moves[layer] = to, move
    return [moves[layer] for layer in range(len(sums.widths))]
