"""Launches of the kernels of CKA in Triton: sums of pairs of layers.

Every sum has an order that the rows of its position alone decide, so its bits are the same in any call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgfast.ops.cka.gpu.table import (
    COLUMNS,
    ENTRIES,
    GRAMS,
    GROUP,
    LONG,
    NEAR,
    PARTS,
    ROWS,
    SPAN,
    STAGES,
    STEP,
    TOGETHER,
    Tile,
)
from rgfast.ops.cka.sums import Sums, Wanted, mirrored
from rgfast.ops.moments.tiles import card, count
from rgfast.ops.residual_mlp.gpu.launch import group_at, on
from rgfast.ops.residual_mlp.gpu.table import OPTIONS
from rgfast.runtime.waiting import numbers

__all__ = ["at_once", "chunk", "fit", "sums", "tile_for"]

# Bytes of Gram tiles at a time, most of which stay in the second-level cache of an H100, and how many tiles
# it computes at a time, of which they are a multiple. Both decide the order of sums, and are therefore the
# same everywhere. Bytes of rows in two parts.
_SCRATCH, _AT_ONCE = 36 << 20, 132
_ROWS_BYTES = 184 << 20


class _Rows(NamedTuple):
    """Centered rows of layers in two parts, and what goes with them."""

    high: Tensor
    low: Tensor
    weights: Tensor
    tiles: Tensor
    positions: int
    padded: int
    layers: int
    blocks: int
    many: int  # tiles of a layer at a position


def tile_for(device: torch.device, *, near: bool) -> Tile:
    """How Gram tiles are cut there: of neighbors, or of all pairs."""
    return (NEAR if near else GRAMS)[group_at(device)]


def _padded(n: int, side: int) -> int:
    return -(-n // side) * side


def fit(widths: Sequence[int], n: int, tile: Tile) -> int:
    """Layers at a position whose rows are there at a time; a narrow one is as wide as the widest."""
    return _ROWS_BYTES // (4 * _padded(n, tile.side) * _padded(max(widths), COLUMNS))


def at_once(layers: int, most: int, *, near: bool) -> list[list[int]]:
    """Layers that are computed together if no more than ``most`` can be: every pair that is wanted is in one.

    Of neighbors the last is the first of the next ones. Of all pairs each half goes with every other half.
    """
    if layers <= most:
        return [list(range(layers))]
    if near:
        return [list(range(k, min(k + most, layers))) for k in range(0, layers - 1, most - 1)]
    halves = [list(range(k, min(k + most // 2, layers))) for k in range(0, layers, most // 2)]
    return [one + two for one, two in combinations(halves, 2)]


def chunk(layers: int, tiles: int, side: int) -> tuple[int, int]:
    """Positions, and pairs of strips of samples, whose tiles of all layers are there at the same time."""
    fit = _SCRATCH // (layers * 4 * side * side)
    turns = fit * layers // _AT_ONCE
    if turns:
        fit = turns * _AT_ONCE // layers
    return max(1, fit // tiles), max(1, min(fit, tiles))


def sums(flat: Sequence[Tensor], wanted: Wanted) -> Iterator[tuple[Sums, Tensor]]:
    """Sums of ``flat[l][P, n, d_l]``, a few positions at a time, and whether fp32 has the digits."""
    device, (positions, n, _), layers = flat[0].device, flat[0].shape, len(flat)
    tile = tile_for(device, near=wanted.near)
    most = fit([x.shape[2] for x in flat], n, tile)
    step = max(1, most // layers)
    for start in range(0, positions, step):
        here = min(step, positions - start)
        parts = at_once(layers, most, near=wanted.near)
        with on(device):
            found = [_together([flat[k] for k in part], start, here, wanted, tile) for part in parts]
        off, same, traces, fine = found[0] if len(found) == 1 else _put(parts, found, layers)
        yield Sums(mirrored(off), mirrored(same), traces, n), fine


_Found = tuple[Tensor, Tensor, Tensor, Tensor]


def _put(parts: Sequence[Sequence[int]], found: Sequence[_Found], layers: int) -> _Found:
    """What was found for some layers at a time, for all of them; what none has is NaN."""
    off, same, traces, _ = found[0]
    positions = len(off)
    off, same = (x.new_full((positions, layers, layers), torch.nan) for x in (off, same))
    traces = traces.new_empty((positions, layers))
    for part, each in zip(parts, found, strict=True):
        at = numbers(part, off.device)
        traces[:, at] = each[2]
        for to, values in ((off, each[0]), (same, each[1])):
            there = to[:, at[:, None], at]
            to[:, at[:, None], at] = torch.where(values.isnan(), there, values)
    return off, same, traces, torch.stack([each[3] for each in found]).all()


def _together(flat: Sequence[Tensor], start: int, positions: int, wanted: Wanted, tile: Tile) -> _Found:
    """Σ_{i≠j} K_ij M_ij and Σ K_ii M_ii in their upper triangles, traces, and whether fp32 has the digits."""
    rows, same, traces, fine = _prepared(flat, start, positions, wanted, tile)
    if wanted.near:
        found = _neighbors(rows, tile)
        off = torch.full_like(same, torch.nan)
        off.diagonal(0, 1, 2).copy_(found[..., 0])
        off.diagonal(1, 1, 2).copy_(found[:, :-1, 1])
    else:
        off = _all(rows, tile)
    return 2.0 * off, same, traces, fine.all()


def _prepared(
    flat: Sequence[Tensor], start: int, positions: int, wanted: Wanted, tile: Tile
) -> tuple[_Rows, Tensor, Tensor, Tensor]:
    """Rows, sums of products of their squared lengths, the sums of these, and what is not too small."""
    from rgfast.ops.cka.gpu import kernels

    device, (_, n, _), layers = flat[0].device, flat[0].shape, len(flat)
    padded, blocks = _padded(n, tile.side), -(-max(x.shape[2] for x in flat) // COLUMNS)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    high, low = (empty(layers, positions, padded, blocks * COLUMNS, dtype=torch.float16) for _ in range(2))
    squares = empty(positions, layers, blocks, padded, dtype=torch.float32)
    factors, weights = (empty(positions, layers, blocks, dtype=torch.float32) for _ in range(2))
    table = numbers([word for x in flat for word in (x.data_ptr(), *x.stride(), x.shape[2])], device)
    kernels.prepare[(positions * blocks, layers)](
        table, high, low, squares, factors, start, positions, n, padded, layers, blocks,
        DTYPE=_triton_type(flat[0].dtype), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8, **OPTIONS,
    )  # fmt: skip
    lengths = empty(positions, layers, padded, dtype=torch.float64)
    scales, traces = (empty(positions, layers, dtype=t) for t in (torch.float32, torch.float64))
    fine = empty(positions, layers, dtype=torch.int8)
    kernels.norms[(positions, layers)](
        squares, factors, weights, lengths, scales, traces, fine, padded, layers, blocks, ROWS=LONG, **OPTIONS
    )
    same = torch.full((positions, layers, layers), torch.nan, dtype=torch.float64, device=device)
    kernels.pairs[(positions, layers)](
        lengths, scales, same, padded, layers, NEAR=wanted.near, GROUP=TOGETHER, ROWS=LONG, **OPTIONS
    )
    strips = padded // tile.side
    each = [strip for across in range(strips) for down in range(across + 1) for strip in (down, across)]
    tiles = numbers(each, device).to(torch.int32)
    many = count(n, n, same=True, side=tile.side)
    return _Rows(high, low, weights, tiles, positions, padded, layers, blocks, many), same, traces, fine


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _gathered(apart: Tensor, *shape: int) -> Tensor:
    """The sum of ``apart[parts, ...]`` over its parts."""
    from rgfast.ops.cka.gpu import kernels

    found = torch.empty(shape, dtype=torch.float64, device=apart.device)
    grid = (-(-found.numel() // ENTRIES),)
    kernels.gather[grid](apart, found, len(apart), found.numel(), PARTS=PARTS, ENTRIES=ENTRIES, **OPTIONS)
    return found


def _neighbors(rows: _Rows, tile: Tile) -> Tensor:
    """Σ_{i<j} of squares of every layer's kernel and of its products with the next ``[P, L, 2]``."""
    from rgfast.ops.cka.gpu import kernels

    high, low, weights, tiles, positions, padded, layers, blocks, many = rows
    apart = torch.empty((many, positions, layers, 2), dtype=torch.float64, device=high.device)
    run = _run(many * positions, layers, card(high.device)[1])
    kernels.near[(many * positions, -(-layers // run))](
        high, low, weights, tiles, apart, positions, padded, layers, blocks, many, run,
        SIDE=tile.side, COLUMNS=COLUMNS, STAGES=tile.stages, num_warps=tile.warps, **OPTIONS,
    )  # fmt: skip
    return _gathered(apart, positions, layers, 2)


def _run(tiles: int, layers: int, multiprocessors: int) -> int:
    """Layers that a program goes through: it multiplies one more, and programs take turns."""

    def turns(runs: int) -> int:
        return -(-tiles * runs // multiprocessors) * (-(-layers // runs) + 1)

    return -(-layers // min(range(1, layers + 1), key=turns))


def _all(rows: _Rows, tile: Tile) -> Tensor:
    """Σ_{i<j} K_ij M_ij of all layers ``[P, L, L]``, those above the diagonal."""
    from rgfast.ops.cka.gpu import kernels

    high, low, weights, tiles, positions, padded, layers, blocks, many = rows
    most, side = chunk(layers, many, tile.side)
    spans, groups = tile.side**2 // SPAN, count(layers, layers, same=True, side=GROUP)
    kept = [
        torch.empty(
            (min(most, positions) * side, layers, tile.side**2), dtype=torch.float16, device=high.device
        )
        for _ in range(2)
    ]
    apart = torch.empty((side * spans, positions, layers, layers), dtype=torch.float64, device=high.device)
    for start in range(0, positions, most):
        here = min(most, positions - start)
        for first in range(0, many, side):
            some = min(side, many - first)
            kernels.grams[(here * some, layers)](
                high, low, weights, tiles, *kept, start, positions, padded, blocks, first, some,
                SIDE=tile.side, COLUMNS=COLUMNS, STAGES=tile.stages, num_warps=tile.warps, **OPTIONS,
            )  # fmt: skip
            kernels.inner[(here * some * spans, groups)](
                *kept, apart, start, positions, layers, some, int(first > 0),
                GROUP=GROUP, SPAN=SPAN, SPANS=spans, STEP=STEP, STAGES=STAGES, **OPTIONS,
            )  # fmt: skip
    return _gathered(apart, positions, layers, layers)
