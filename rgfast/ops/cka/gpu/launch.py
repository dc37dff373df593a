"""Launches of the kernels of CKA in Triton: sums of pairs of layers.

Every sum has an order that the rows of its position alone decide, so its bits are the same in any call.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

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
# it computes at a time, of which they are a multiple. Both decide the order of sums. Bytes of rows in two
# parts.
_SCRATCH, _AT_ONCE = 36 << 20, 132
_ROWS_BYTES = 184 << 20


def tile_for(device: torch.device, *, near: bool) -> Tile:
    """How Gram tiles are cut there: of neighbors, or of all pairs."""
    return (NEAR if near else GRAMS)[group_at(device)]


def _padded(n: int, side: int) -> int:
    return -(-n // side) * side


def fit(widths: Sequence[int], n: int, tile: Tile) -> int:
    """Layers at a position whose rows are there at a time; a narrow one is as wide as the widest."""
    return _ROWS_BYTES // (4 * _padded(n, tile.side) * _padded(max(widths), COLUMNS))


def _bytes(widths: Sequence[int], n: int, tile: Tile, *, near: bool) -> int:
    """Of the rows of layers at a position, and of what their Gram tiles are summed up to."""
    layers, strips = len(widths), _padded(n, tile.side) // tile.side
    rows = 4 * layers * _padded(n, tile.side) * _padded(max(widths), COLUMNS)
    tiles = strips * (strips + 1) // 2
    if near:
        return rows + 8 * tiles * layers * 2
    return rows + 8 * chunk(layers, tiles, tile.side)[1] * (tile.side**2 // SPAN) * layers**2


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


def sums(flat: Sequence[Tensor], start: int, positions: int, wanted: Wanted) -> tuple[Sums, Tensor]:
    """Sums of ``flat[l][P, n, d_l]`` at some positions, and whether fp32 has digits for all of the layers."""
    device, n, layers = flat[0].device, flat[0].shape[1], len(flat)
    tile = tile_for(device, near=wanted.near)
    most = fit([x.shape[2] for x in flat], n, tile)
    parts = at_once(layers, most, near=wanted.near)
    step = max(1, _ROWS_BYTES // _bytes([flat[k].shape[2] for k in parts[0]], n, tile, near=wanted.near))
    step = -(-positions // -(-positions // step))  # steps of about the same size
    with on(device):
        found = [
            _Together([flat[k] for k in part], start, positions, step, near=wanted.near).sums()
            for part in parts
        ]
    off, same, traces, fine = found[0] if len(found) == 1 else _put(parts, found, layers)
    return Sums(mirrored(off), mirrored(same), traces, n), fine.all()


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
    return off, same, traces, torch.cat([each[3] for each in found], 1)


class _Together:
    """Sums of some layers, which are there together, a few positions at a time."""

    def __init__(self, flat: Sequence[Tensor], start: int, positions: int, step: int, *, near: bool) -> None:
        self.device, (_, self.n, _), self.layers = flat[0].device, flat[0].shape, len(flat)
        self.start, self.positions, self.step, self.near = start, positions, step, near
        self.type = _triton_type(flat[0].dtype)
        self.tile = tile_for(self.device, near=near)
        self.padded = _padded(self.n, self.tile.side)
        self.blocks = -(-max(x.shape[2] for x in flat) // COLUMNS)
        words = [word for x in flat for word in (x.data_ptr(), *x.stride(), x.shape[2])]
        strips = range(self.padded // self.tile.side)
        pairs = [strip for across in strips for down in strips[: across + 1] for strip in (down, across)]
        both = numbers(words + pairs, self.device)
        self.table, self.tiles, self.many = both, both[len(words) :], len(pairs) // 2
        rows = self.layers, step, self.padded, self.blocks * COLUMNS
        self.high, self.low = (self.empty(*rows, dtype=torch.float16) for _ in range(2))
        each = step, self.layers, self.blocks
        self.squares = self.empty(*each, self.padded, dtype=torch.float32)
        self.factors, self.weights = (self.empty(*each, dtype=torch.float32) for _ in range(2))
        self.scales = self.empty(step, self.layers, dtype=torch.float32)
        self.lengths = self.empty(step, self.layers, self.padded)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def sums(self) -> _Found:
        """Σ_{i≠j} K_ij M_ij and Σ K_ii M_ii in upper triangles, traces, and what fp32 has digits for."""
        from rgfast.ops.cka.gpu import kernels

        each = self.positions, self.layers
        traces, fine = self.empty(*each), self.empty(*each, dtype=torch.int8)
        same = torch.full((*each, self.layers), torch.nan, dtype=torch.float64, device=self.device)
        half = self.empty(*each, 2 if self.near else self.layers)
        for start in range(0, self.positions, self.step):
            here = min(self.step, self.positions - start)
            sizes = self.padded, self.layers
            kernels.prepare[(here * self.blocks, self.layers)](
                self.table, self.high, self.low, self.squares, self.factors,
                self.start + start, here, self.n, *sizes, self.blocks,
                DTYPE=self.type, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8, **OPTIONS,
            )  # fmt: skip
            kernels.norms[(here, self.layers)](
                self.squares, self.factors, self.weights, self.lengths, self.scales,
                traces[start:], fine[start:], *sizes, self.blocks, ROWS=LONG, **OPTIONS,
            )  # fmt: skip
            kernels.pairs[(here, self.layers)](
                self.lengths, self.scales, same[start:], *sizes,
                NEAR=self.near, GROUP=TOGETHER, ROWS=LONG, **OPTIONS,
            )  # fmt: skip
            (self._neighbors if self.near else self._all)(here, half[start : start + here])
        if self.near:
            off = torch.full_like(same, torch.nan)
            off.diagonal(0, 1, 2).copy_(half[..., 0])
            off.diagonal(1, 1, 2).copy_(half[:, :-1, 1])
            half = off
        return 2.0 * half, same, traces, fine

    def _neighbors(self, here: int, to: Tensor) -> None:
        """Σ_{i<j} of squares of every layer's kernel and of its products with the next ``[P, L, 2]``."""
        from rgfast.ops.cka.gpu import kernels

        apart = self.empty(self.many, here, self.layers, 2)
        run = _run(self.many * here, self.layers, card(self.device)[1])
        kernels.near[(self.many * here, -(-self.layers // run))](
            self.high, self.low, self.weights, self.tiles, apart,
            here, self.padded, self.layers, self.blocks, self.many, run,
            SIDE=self.tile.side, COLUMNS=COLUMNS, STAGES=self.tile.stages, num_warps=self.tile.warps,
            **OPTIONS,
        )  # fmt: skip
        _gather(apart, to)

    def _all(self, here: int, to: Tensor) -> None:
        """Σ_{i<j} K_ij M_ij of all layers ``[P, L, L]``, those above the diagonal."""
        from rgfast.ops.cka.gpu import kernels

        layers, side = self.layers, self.tile.side
        most, some = chunk(layers, self.many, side)
        spans, groups = side**2 // SPAN, count(layers, layers, same=True, side=GROUP)
        kept = [self.empty(min(most, here) * some, layers, side**2, dtype=torch.float16) for _ in range(2)]
        apart = self.empty(some * spans, here, layers, layers)
        for start in range(0, here, most):
            now = min(most, here - start)
            for first in range(0, self.many, some):
                tiles = min(some, self.many - first)
                kernels.grams[(now * tiles, layers)](
                    self.high, self.low, self.weights, self.tiles, *kept,
                    start, here, self.padded, self.blocks, first, tiles,
                    SIDE=side, COLUMNS=COLUMNS, STAGES=self.tile.stages, num_warps=self.tile.warps, **OPTIONS,
                )  # fmt: skip
                kernels.inner[(now * tiles * spans, groups)](
                    *kept, apart, start, here, layers, tiles, int(first > 0),
                    GROUP=GROUP, ONE=groups == 1, SPAN=SPAN, SPANS=spans, STEP=STEP, STAGES=STAGES, **OPTIONS,
                )  # fmt: skip
        _gather(apart, to)


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _gather(apart: Tensor, to: Tensor) -> None:
    """The sum of ``apart[parts, ...]`` over its parts."""
    from rgfast.ops.cka.gpu import kernels

    grid = (-(-to.numel() // ENTRIES),)
    kernels.gather[grid](apart, to, len(apart), to.numel(), PARTS=PARTS, ENTRIES=ENTRIES, **OPTIONS)


def _run(tiles: int, layers: int, multiprocessors: int) -> int:
    """Layers that a program goes through: it multiplies one more, and programs take turns."""

    def turns(runs: int) -> int:
        return -(-tiles * runs // multiprocessors) * (-(-layers // runs) + 1)

    return -(-layers // min(range(1, layers + 1), key=turns))
