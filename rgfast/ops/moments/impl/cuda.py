"""The products by the package's own kernels on a GPU, csrc/cuda/moments.cu: a launch for all pairs of layers.

Every sum has a fixed order that the rows of its position alone decide, so its bits are the same in any call.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rgfast.dispatch import HandOff, Impl
from rgfast.ops.device import LAUNCH, STREAM, by_itself
from rgfast.ops.moments.call import Pairs, PairSums, Products
from rgfast.ops.moments.centering import (
    CENTERING,
    centered,
    centering_answer,
    centering_cost,
    centering_refusal,
)
from rgfast.ops.moments.pooling import POOLING, pooled, pooling_answer, pooling_cost, pooling_refusal
from rgfast.ops.moments.surveying import (
    SURVEYING,
    surveyed,
    surveying_answer,
    surveying_cost,
    surveying_refusal,
)
from rgfast.ops.moments.tiles import (
    CLOCK,
    DTYPES,
    EXACT,
    MOST_BLOCKS,
    MOST_SIDE,
    SHARED,
    THREADS,
    bits,
    card,
    clocks,
    count,
)
from rgfast.runtime import cuda, measured
from rgfast.runtime.known_answers import KnownAnswer, register, unproven
from rgfast.runtime.waiting import numbers

__all__ = ["CENTERED", "MOMENTS", "PAIRS", "POOLED", "SINGLE_ERROR", "SINGLE_LEAST", "SURVEY"]

# With precision="single" an entry errs by up to SINGLE_ERROR of the sum of |z_i||z_j|, and per row by
# SINGLE_LEAST of the product of the largest numbers that either can have (README, "Split products").
SINGLE_ERROR, SINGLE_LEAST = 2.0**-16, 2.0**-38

# Of moments.cu, which holds its side of these numbers against its sources.
_BLOCK_ROWS = 1024
_ROWS = 16  # of a block for norms
_SPREAD_BYTES, _CROSS_BYTES = 256 << 20, 512 << 20
# A multiprocessor's clocks for 16 rows of a tile of split products, computed as those in tiles.py.
_SPLIT = 600.0
_FAST_RATIO = 2  # of fp32 over fp64, up to which fp64 products are at least as fast as split ones


def _tiles(call: Products | Pairs, i: int, j: int) -> int:
    """Of a pair of layers, at a position."""
    high, wide = (call.rows[k].shape[2] + _extra(call) for k in (i, j))
    return count(high, wide, same=i == j)


def _extra(call: Products | Pairs) -> int:
    """How many columns stand behind the features."""
    return call.extra if isinstance(call, Products) else 2


def _splits(call: Products | Pairs) -> bool:
    """Whether its products are of split numbers: if that is allowed, and fp64 is slow on its GPU."""
    if not isinstance(call, Products) or call.precision != "single":
        return False
    architecture, _, ratio = card(call.device)
    return architecture not in EXACT and ratio > _FAST_RATIO


def _run(call: Products) -> None:
    """As `reference.add_products`."""
    units = [math.ldexp(1.0, -exponent) for exponent in call.exponents]
    pairs = [(i, j, total) for (i, j), total in call.sums.items()]
    _multiply(call, units, pairs, call.keep, add=not call.fresh, split=_splits(call))


def _run_pairs(call: Pairs) -> PairSums:
    """As `reference.pair_products`, most of which stands in the last columns of extended products."""
    positions, width, device = len(call.rows[0]), call.width, call.device
    moved = all(move is not None for move in call.moves)
    shape = (len(call.totals), positions)
    found = PairSums(
        *(torch.empty(shape, dtype=torch.float64, device=device) for _ in range(2)),
        *(torch.zeros(*shape, width, dtype=torch.float64, device=device) for _ in range(4)),
    )
    places = {key: k for k, key in enumerate(call.totals)}
    for part in _parts(call):
        crosses = [
            torch.empty(
                (positions, call.rows[i].shape[2] + 2, call.rows[j].shape[2] + 2),
                dtype=torch.float64,
                device=device,
            )
            for i, j in part
        ]
        pairs = [(i, j, cross) for (i, j), cross in zip(part, crosses, strict=True)]
        with by_itself(device.type):
            _multiply(call, [1.0] * len(call.rows), pairs, None, add=False, split=False)
            for (i, j), extended in zip(part, crosses, strict=True):
                k, d, e = places[i, j], call.rows[i].shape[2], call.rows[j].shape[2]
                cross = extended[:, :d, :e]
                call.totals[i, j].add_(cross.sum(0))
                found.norm[k] = cross.square().sum((1, 2))
                found.products[k] = extended[:, d, e]
                found.right_sums[k, :, :e] = extended[:, d, :e]
                found.left_sums[k, :, :d] = extended[:, :d, e]
                left, right = call.moves[i], call.moves[j]
                if moved and left is not None and right is not None:
                    found.moved_right[k, :, :e] = torch.bmm(left[:, None], cross)[:, 0]
                    found.moved_left[k, :, :d] = torch.bmm(cross, right[..., None])[..., 0]
    return found


def _parts(call: Pairs) -> Iterator[list[tuple[int, int]]]:
    """Pairs whose cross moments are there at the same time."""
    part: list[tuple[int, int]] = []
    held = 0
    for i, j in call.totals:
        more = 8 * len(call.rows[0]) * (call.rows[i].shape[2] + 2) * (call.rows[j].shape[2] + 2)
        if part and held + more > _CROSS_BYTES:
            yield part
            part, held = [], 0
        part.append((i, j))
        held += more
    if part:
        yield part


def _not_captured(call: Products | Pairs) -> None:
    if cuda.capturing(call.device):
        reason = "a CUDA graph would read the table of pairs where it was on the host, when it is replayed"
        raise HandOff(reason, lambda run: run(call))


def _multiply(
    call: Products | Pairs,
    units: Sequence[float],
    pairs: Sequence[tuple[int, int, Tensor]],
    keep: Tensor | None,
    *,
    add: bool,
    split: bool,
) -> None:
    """Sums of products of layers, added to what is there or put there."""
    _not_captured(call)
    positions, b = call.rows[0].shape[:2]
    if not positions or not pairs:
        return
    if not b:
        for _, _, total in pairs:
            if not add:
                total.zero_()
        return
    for dtype, name in DTYPES.items():
        mine = [pair for pair in pairs if call.rows[pair[0]].dtype == dtype]
        if mine:
            _launch(call, units, mine, keep, name, add=add, split=split)


def _launch(
    call: Products | Pairs,
    units: Sequence[float],
    pairs: Sequence[tuple[int, int, Tensor]],
    keep: Tensor | None,
    name: str,
    *,
    add: bool,
    split: bool,
) -> None:
    device, (positions, b) = call.device, call.rows[0].shape[:2]
    layers = sorted({layer for i, j, _ in pairs for layer in (i, j)})
    new = {layer: k for k, layer in enumerate(layers)}
    shifts = [call.shifts[layer].contiguous() for layer in layers]
    norms = torch.empty((len(layers), positions, b), dtype=torch.float64, device=device)
    tops = torch.empty((len(layers), positions), dtype=torch.float64, device=device)
    words = []
    for k, layer in enumerate(layers):
        x = call.rows[layer]
        words += [x.data_ptr(), *x.stride(), x.shape[2], shifts[k].data_ptr(), bits(units[layer])]
        words += [norms[k].data_ptr(), tops[k].data_ptr()]
    # The first tile and the first entry of every pair, and what they come to.
    *first_tiles, tiles = accumulate((_tiles(call, i, j) for i, j, _ in pairs), initial=0)
    *first_entries, entries = accumulate((total.numel() for *_, total in pairs), initial=0)
    if not tiles:
        return
    blocks = _spread(positions * tiles, -(-b // _BLOCK_ROWS), entries, device)
    apart = torch.empty((blocks, entries) if blocks > 1 else 0, dtype=torch.float64, device=device)
    for (i, j, total), tile, entry in zip(pairs, first_tiles, first_entries, strict=True):
        place = apart[0, entry:].data_ptr() if blocks > 1 else 0
        words += [new[i], new[j], tile, total.data_ptr(), place]
    table = numbers(words, device)
    masked = (0, 0, 0) if keep is None else (keep, keep.stride(0), keep.stride(1))
    extra, apart_by = _extra(call), entries if blocks > 1 else 0

    def launch(kernel: str, grid: tuple[int, int], shared: int, *arguments: Tensor | int) -> None:
        whole = (*grid, 1)
        cuda.launch(f"rgfast_moments_{kernel}", whole, THREADS, shared, table, *arguments, device=device)

    if extra or split:
        launch(f"norms_{name}", (-(-positions * b // _ROWS), len(layers)), 0, positions, b, *masked)
    if split:
        launch("tops", (positions, len(layers)), 8 * THREADS, b)
    kernel, grid = f"{'split' if split else 'exact'}_{name}", (positions * tiles, blocks)
    counts = len(layers), len(pairs), tiles, b
    launch(kernel, grid, SHARED, *counts, *masked, extra, int(add), apart_by)
    if blocks > 1:
        grid = -(-max(total.numel() for *_, total in pairs) // THREADS), len(pairs)
        launch("gather", grid, 0, len(layers), positions, extra, int(add), blocks, entries)


def _spread(blocks: int, row_blocks: int, entries: int, device: torch.device) -> int:
    """Into how many blocks of the grid the rows go, where tiles alone are too few for the multiprocessors."""
    if not 1 < row_blocks <= MOST_SIDE or 8 * entries * row_blocks > _SPREAD_BYTES:
        return 1
    return row_blocks if blocks < 2 * card(device)[1] else 1


def _refusal(call: Products | Pairs) -> str | None:
    totals = call.sums if isinstance(call, Products) else call.totals
    if any(x.device != call.device for x in (*call.rows, *call.shifts, *totals.values())):
        return "rows, shifts and sums must be on one device"
    for i, j in totals:
        if call.rows[i].dtype != call.rows[j].dtype:
            have = " and ".join(str(call.rows[k].dtype).removeprefix("torch.") for k in (i, j))
            return f"both layers of a pair must have the same dtype, and those of {(i, j)} have {have}"
    tiles = sum(_tiles(call, i, j) for i, j in totals)
    if len(call.rows[0]) * tiles > MOST_BLOCKS or max(len(call.rows), len(totals)) > MOST_SIDE:
        return f"a grid has {MOST_BLOCKS} blocks at most, and {MOST_SIDE} of layers or pairs"
    return cuda.device_refusal(call.device)


def _kernels(call: Products | Pairs) -> list[str]:
    split = _splits(call)
    names = sorted({DTYPES[x.dtype] for x in call.rows})
    kinds = [f"{kind}_{name}" for name in names for kind in ("norms", "split" if split else "exact")]
    return [f"rgfast_moments_{kind}" for kind in (*kinds, "gather", "tops")]


def _cost(call: Products | Pairs) -> float:
    """By launches, the pass for norms, and tiles in turns on the multiprocessors."""
    architecture, multiprocessors, ratio = card(call.device)
    totals = call.sums if isinstance(call, Products) else call.totals
    positions, b = call.rows[0].shape[:2]
    each = _SPLIT if _splits(call) else EXACT.get(architecture, 512.0 * ratio)  # 128 fp32 products a clock
    tiles = positions * sum(_tiles(call, i, j) for i, j in totals)
    passes = sum(x.numel() * x.element_size() for x in call.rows) / STREAM if _extra(call) else 0.0
    launches = 8 + (0 if isinstance(call, Products) else 14 * len(totals))
    return max(LAUNCH * launches, passes + clocks(tiles, b, multiprocessors, each) / CLOCK)


def _impl(run: Callable[[Any], Any]) -> Impl:
    return Impl(
        "cuda",
        run,
        _refusal,
        cost=_cost,
        devices=("cuda",),
        missing=cuda.missing,
        by_name_only=lambda call: measured.refusal("moments", "cuda", call.device),
        unproven=lambda call: unproven(call.device, *_kernels(call)),
    )


MOMENTS = _impl(_run)
PAIRS = _impl(_run_pairs)
CENTERED = dataclasses.replace(
    MOMENTS,
    run=centered,
    can_run=centering_refusal,
    cost=centering_cost,
    unproven=lambda call: unproven(call.device, CENTERING),
)
POOLED = dataclasses.replace(
    MOMENTS,
    run=pooled,
    can_run=pooling_refusal,
    cost=pooling_cost,
    unproven=lambda call: unproven(call.device, *POOLING),
)
SURVEY = dataclasses.replace(
    MOMENTS,
    run=surveyed,
    can_run=surveying_refusal,
    cost=surveying_cost,
    unproven=lambda call: unproven(call.device, *{SURVEYING[dtype] for dtype in call.dtypes}),
)


def _answer(dtype: torch.dtype, b: int, width: int, *, split: bool) -> Callable[[torch.device], Tensor]:
    """Two sums over all entries of a moment of small numbers, of which no digit is rounded.

    Of split products the entry |y|²|y|² is left out, which is.
    """

    def run(device: torch.device) -> Tensor:
        rows = torch.arange(b, dtype=torch.float64, device=device)[:, None]
        columns = torch.arange(width, dtype=torch.float64, device=device)
        x = ((7 * rows + 3 * columns) % 11 - 5)[None].to(dtype)
        shift = torch.ones((1, width), dtype=torch.float64, device=device)
        total = torch.zeros((1, width + 2, width + 2), dtype=torch.float64, device=device)
        pairs, keep = [(0, 0, total)], rows[None, :, 0] % 5 != 0
        _multiply(
            Products({(0, 0): total}, [x], [shift], keep, [1]), [0.5], pairs, keep, add=True, split=split
        )
        if split:
            total[0, width, width] = 0.0
        places = torch.arange(total.numel(), dtype=torch.float64, device=device).view_as(total)
        return torch.stack([total.sum(), (total * (places % 7)).sum()])

    return run


for _dtype, _name in DTYPES.items():
    register(
        KnownAnswer(
            (f"rgfast_moments_exact_{_name}", f"rgfast_moments_norms_{_name}"),
            _answer(_dtype, 37, 67, split=False),
            (668571.4375, -954884.875),
        ),
        KnownAnswer(
            (f"rgfast_moments_split_{_name}",), _answer(_dtype, 37, 67, split=True), (-315776.0, -954884.875)
        ),
    )
register(
    KnownAnswer(
        ("rgfast_moments_gather", "rgfast_moments_tops"),
        _answer(torch.float32, 1030, 3, split=True),
        (-9017.5, -10428.375),
    )
)
register(centering_answer(), pooling_answer(), surveying_answer())
