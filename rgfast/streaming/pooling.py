"""The sums of the samples of all positions as one cloud, from those of every position."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rgfast.runtime.threads import one_thread
from rgfast.runtime.waiting import waits_for
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
    most, fullest = count.max(0, keepdim=True)
    one = Sums(
        widths=sums.widths,
        begun=most > 0,
        exponents=list(sums.exponents),
        shift=list(sums.shift),  # until they are known
        moment=dict(sums.moment),
        factors=TriangularFactors(factored, sums.widths, 1, device) if factored else None,
        summed=sums.summed,
        at_rest=True,
    )
    if waits_for(device):
        moves, positions = _joined_moves(sums, one, count, fullest), len(count)
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


def _joined_moves(sums: Sums, one: Sums, count: Tensor, fullest: Tensor) -> list[Tensor]:
    """As :func:`_moves`, all layers of one width at once; seen from the shift of the position ``fullest[1]``,
    which has some rows if any has."""
    moves: dict[int, Tensor] = {}
    total = count.sum().clamp_min(1.0)
    for width in dict.fromkeys(sums.widths):
        layers = [layer for layer, one_width in enumerate(sums.widths) if one_width == width]
        unit = sums.units(layers)
        shift, columns = torch.stack([sums.shift[layer] for layer in layers]), sums.columns(layers)
        base = shift.index_select(1, fullest)
        # Nothing is added where there are no rows, and nothing of a constant column.
        moved = torch.addcmul(columns if unit is None else columns * unit, shift - base, count[:, None])
        found = torch.addcdiv(base, moved.sum(1, keepdim=True), total)
        move = shift - found if unit is None else (shift - found) / unit
        for layer, to, by in zip(layers, found.unbind(), move.unbind(), strict=True):
            one.shift[layer], moves[layer] = to, by
    return [moves[layer] for layer in range(len(sums.widths))]
