"""Kernels of CKA by split products: rows made ready, Gram tiles, and inner products of layers.

A number is the sum of two fp16 numbers of 22 bits in all, and three products of these give fp32's accuracy.
Tensor cores truncate when they add: a chain of sums ends after ``COLUMNS`` features, or as many entries of
Gram tiles, and goes on in fp32 or fp64 on the other cores, which round.

Rows are centered in fp32, since a difference of fp32 numbers is rounded by 2^-24 of itself: the mean is two
of them. Each ``COLUMNS`` features of a layer have a scale of their own, a power of two, so that neither data
of any magnitude nor outliers leave the range of fp16. Gram tiles are scaled by the largest norm of a row,
which none of their entries exceeds.

``table`` has a row of five words for each layer: address, strides of positions, rows and columns, and width.
``tiles`` has two words for each: which strips of samples.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rgfast.ops.residual_mlp.gpu.elements import power_of_two
from rgfast.ops.residual_mlp.gpu.forward import halves_of_fp16, product

__all__ = ["gather", "grams", "inner", "near", "norms", "pairs", "prepare"]


@triton.jit(do_not_specialize=["start", "positions", "n", "padded", "layers", "blocks"])
def prepare(
    table, high, low, squares, factors, start, positions, n, padded, layers, blocks,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Centered rows in two parts ``[layers, positions, padded, blocks * COLUMNS]``, zero beyond the layer.

    Also ``factors[positions, layers, blocks]`` that they are multiplied by, and sums of the squares of each
    row's numbers in a block, ``squares[positions, layers, blocks, padded]``. A program takes a block of
    columns of a layer at a position, and reads it twice: the second time from cache, unless there are many
    rows.
    """
    layer = tl.program_id(1).to(tl.int64)
    position = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    words = table + layer * 5
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < tl.load(words + 4)
    source = tl.load(words).to(tl.pointer_type(DTYPE)) + (position + start) * tl.load(words + 1)
    source = source + column.to(tl.int64) * tl.load(words + 3)
    row_stride = tl.load(words + 2)
    row = tl.arange(0, ROWS)
    # From the first row, so that equal rows have an exact mean, and are zero.
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    top = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in range(0, n, ROWS):
        there = (at + row < n)[:, None] & inside[None, :]
        place = source[None, :] + (at + row).to(tl.int64)[:, None] * row_stride
        apart = tl.load(place, mask=there, other=0.0).to(tl.float32) - first[None, :]
        apart = tl.where(there, apart, 0.0)
        total += apart.to(tl.float64)
        top = tl.maximum(top, tl.abs(apart))
    mean = first.to(tl.float64) + tl.sum(total, 0) / n
    mean_high = mean.to(tl.float32)
    mean_low = (mean - mean_high.to(tl.float64)).to(tl.float32)
    # No number is farther from the mean than twice as far as the farthest from the first row.
    factor, _ = power_of_two(2.0 * tl.max(tl.max(top, 0), 0))
    here = (position * layers + layer) * blocks + block
    tl.store(factors + here, factor)
    squares += here * padded
    target = (layer * positions + position) * padded * (blocks * COLUMNS) + column.to(tl.int64)
    for at in range(0, padded, ROWS):
        there = (at + row < n)[:, None] & inside[None, :]
        place = source[None, :] + (at + row).to(tl.int64)[:, None] * row_stride
        x = tl.load(place, mask=there, other=0.0).to(tl.float32)
        z = tl.where(there, ((x - mean_high[None, :]) - mean_low[None, :]) * factor, 0.0)
        z_high, z_low = halves_of_fp16(z)
        place = target[None, :] + (at + row).to(tl.int64)[:, None] * (blocks * COLUMNS)
        tl.store(high + place, z_high)
        tl.store(low + place, z_low)
        tl.store(squares + at + row, tl.sum(z * z, 1))


@triton.jit
def _reciprocal(power):
    """Of a power of two, without a division, which Triton rounds as it likes."""
    exponent = power.to(tl.int32, bitcast=True) >> 23
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["traces", "fine", "padded", "layers", "blocks"])
def norms(
    squares, factors, weights, lengths, scales, traces, fine, padded, layers, blocks, ROWS: tl.constexpr
):
    """Of a layer at a position, in the unit of its largest block of columns: squared lengths of rows, and
    their sum in ``traces[positions, layers]``, in fp64.

    ``weights[positions, layers, blocks]`` take products of a block to the scale of Gram tiles, ``scales``
    squared lengths. Not ``fine`` is a layer so small that fp32 has no digits for it.
    """
    place = tl.program_id(0).to(tl.int64) * layers + tl.program_id(1)
    factors += place * blocks
    weights += place * blocks
    squares += place * blocks * padded
    lengths += place * padded
    least = tl.load(factors)
    for block in range(1, blocks):
        least = tl.minimum(least, tl.load(factors + block))
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float64)
    top = tl.zeros([ROWS], tl.float64)
    for at in range(0, padded, ROWS):
        length = tl.zeros([ROWS], tl.float64)
        for block in range(0, blocks):
            relative = least * _reciprocal(tl.load(factors + block))
            part = tl.load(squares + block * padded + at + row, mask=at + row < padded, other=0.0)
            length += (part * (relative * relative)).to(tl.float64)
        tl.store(lengths + at + row, length, mask=at + row < padded)
        total += length
        top = tl.maximum(top, length)
    largest = tl.max(top, 0)
    scale, _ = power_of_two(largest.to(tl.float32))
    tl.store(scales + place, scale)
    tl.store(traces + place, tl.sum(total, 0) * scale)
    tl.store(fine + place, ((least < 5e37) | (largest == 0.0)).to(tl.int8))
    for block in range(0, blocks):
        relative = least * _reciprocal(tl.load(factors + block))
        tl.store(weights + block, relative * relative * scale)


@triton.jit(do_not_specialize=["to", "padded", "layers"])
def pairs(lengths, scales, to, padded, layers, NEAR: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Sums of products of squared lengths ``to[positions, layers, layers]`` of a layer with those after it:
    all of them, or the next one."""
    position = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1)
    base = position * layers
    mine = lengths + (base + layer) * padded
    row = tl.arange(0, ROWS)
    stop = tl.minimum(layer + 2, layers) if NEAR else layers
    for start in range(layer, stop, GROUP):
        other = start + tl.arange(0, GROUP)
        theirs = lengths + (base + other)[:, None] * padded + row[None, :]
        total = tl.zeros([GROUP, ROWS], tl.float64)
        for at in range(0, padded, ROWS):
            there = at + row < padded
            a = tl.load(mine + at + row, mask=there, other=0.0)
            b = tl.load(theirs + at, mask=(other < stop)[:, None] & there[None, :], other=0.0)
            total += a[None, :] * b
        scale = tl.load(scales + base + layer) * tl.load(scales + base + other, mask=other < stop, other=0.0)
        tl.store(to + (base + layer) * layers + other, tl.sum(total, 1) * scale, mask=other < stop)


@triton.jit
def _multiplied(
    high, low, down, across, blocks, SAME: tl.constexpr, SIDE: tl.constexpr, COLUMNS: tl.constexpr
):
    """Products of a strip of samples with another one across, over some columns of a layer.

    A strip with itself, SAME, is read once. Offsets within a layer at a position take 32 bits.
    """
    sample = tl.arange(0, SIDE)
    column = tl.arange(0, COLUMNS)
    left = (down * SIDE + sample)[:, None] * (blocks * COLUMNS) + column[None, :]
    a = tl.load(high + left)
    a_low = tl.load(low + left)
    if SAME:
        b = tl.trans(a)
        b_low = tl.trans(a_low)
    else:
        right = (across * SIDE + sample)[None, :] * (blocks * COLUMNS) + column[:, None]
        b = tl.load(high + right)
        b_low = tl.load(low + right)
    return product(a, a_low, b, b_low, "split")


@triton.jit
def _above(SIDE: tl.constexpr):
    """Which entries of a tile on the diagonal of the whole Gram matrix are above it."""
    sample = tl.arange(0, SIDE)
    return sample[:, None] < sample[None, :]


@triton.jit
def _gram(
    high, low, weights, down, across, blocks,
    SAME: tl.constexpr, SIDE: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A layer's Gram tile of two strips of samples."""
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for block in tl.range(0, blocks, num_stages=STAGES):
        at = block * COLUMNS
        found = _multiplied(high + at, low + at, down, across, blocks, SAME, SIDE, COLUMNS)
        total += found * tl.load(weights + block)
    return total


@triton.jit(do_not_specialize=["start", "positions", "padded", "blocks", "first", "count"])
def grams(
    high, low, weights, tiles, to_high, to_low, start, positions, padded, blocks, first, count,
    SIDE: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gram tiles ``[positions here, count, layers, SIDE * SIDE]`` in two parts, above the diagonal.

    ``count`` tiles from ``first`` on of those whose strips are in ``tiles``, for positions from ``start`` on.
    """
    layer = tl.program_id(1).to(tl.int64)
    layers = tl.num_programs(1)
    position = (start + tl.program_id(0) // count).to(tl.int64)
    tile = first + tl.program_id(0) % count
    down = tl.load(tiles + 2 * tile).to(tl.int32)
    across = tl.load(tiles + 2 * tile + 1).to(tl.int32)
    place = (layer * positions + position) * padded * (blocks * COLUMNS)
    weights += (position * layers + layer) * blocks
    high += place
    low += place
    if down == across:
        total = _gram(high, low, weights, down, across, blocks, True, SIDE, COLUMNS, STAGES)
        total = tl.where(_above(SIDE), total, 0.0)
    else:
        total = _gram(high, low, weights, down, across, blocks, False, SIDE, COLUMNS, STAGES)
    k_high, k_low = halves_of_fp16(total)
    sample = tl.arange(0, SIDE)
    target = (tl.program_id(0).to(tl.int64) * layers + layer) * (SIDE * SIDE)
    target = target + sample[:, None] * SIDE + sample[None, :]
    tl.store(to_high + target, k_high)
    tl.store(to_low + target, k_low)


@triton.jit(do_not_specialize=["start", "positions", "layers", "count", "add"])
def inner(
    high, low, to, start, positions, layers, count, add,
    GROUP: tl.constexpr, ONE: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Products of layers over ``SPAN`` entries of the tiles that ``grams`` left, ``SPANS`` of each.

    ``to[spans, positions, layers, layers]`` of ``count`` tiles at a position, added to what is there if
    ``add``: GROUP layers with as many that do not come before them. With ONE group they are read once.
    """
    span = tl.program_id(0) % SPANS
    slot = (tl.program_id(0) // SPANS).to(tl.int64)
    position = start + slot // count
    part = slot % count * SPANS + span
    # Groups in the order (0, 0), (0, 1), (1, 1), (0, 2), ...
    across = tl.program_id(1) * 0
    left = tl.program_id(1)
    while left > across:
        left -= across + 1
        across += 1
    one = left * GROUP + tl.arange(0, GROUP)
    two = across * GROUP + tl.arange(0, GROUP)
    entry = span * SPAN + tl.arange(0, STEP)
    from_one = (slot * layers + one)[:, None] * (SPAN * SPANS) + entry[None, :]
    from_two = (slot * layers + two)[None, :] * (SPAN * SPANS) + entry[:, None]
    there_one = (one < layers)[:, None]
    there_two = (two < layers)[None, :]
    total = tl.zeros([GROUP, GROUP], tl.float64)
    for at in tl.range(0, SPAN, STEP, num_stages=STAGES):
        a = tl.load(high + (from_one + at), mask=there_one, other=0.0)
        a_low = tl.load(low + (from_one + at), mask=there_one, other=0.0)
        if ONE:
            b = tl.trans(a)
            b_low = tl.trans(a_low)
        else:
            b = tl.load(high + (from_two + at), mask=there_two, other=0.0)
            b_low = tl.load(low + (from_two + at), mask=there_two, other=0.0)
        total += product(a, a_low, b, b_low, "split").to(tl.float64)
    target = to + ((part * positions + position) * layers + one)[:, None] * layers + two[None, :]
    wanted = there_one & there_two & (one[:, None] <= two[None, :])
    if add != 0:
        total += tl.load(target, mask=wanted, other=0.0)
    tl.store(target, total, mask=wanted)


@triton.jit
def _products(a, b):
    """The sum of ``a b`` as a tensor of one number: of a scalar Triton 3.7 makes no layout for sm_100."""
    return tl.sum(tl.sum(a * b, 1, keep_dims=True).to(tl.float64), 0)


@triton.jit
def _compared(
    high, low, weights, to, positions, padded, blocks, down, across, first, end, layers,
    SAME: tl.constexpr, SIDE: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some layers' tiles one after the other, the tile of the layer before in registers."""
    total = tl.zeros([SIDE, SIDE], tl.float32)
    before = total
    one = tl.arange(0, 1)
    for step in tl.range(0, (tl.minimum(end + 1, layers) - first) * blocks, num_stages=STAGES):
        layer = first + step // blocks
        block = step % blocks
        at = layer * positions * padded * (blocks * COLUMNS) + block * COLUMNS
        found = _multiplied(high + at, low + at, down, across, blocks, SAME, SIDE, COLUMNS)
        total += found * tl.load(weights + layer * blocks + block)
        if block == blocks - 1:
            if SAME:
                total = tl.where(_above(SIDE), total, 0.0)
            tl.store(to + layer * 2 + one, _products(total, total), mask=one + layer < end)
            tl.store(to + layer * 2 - 1 + one, _products(total, before), mask=one + layer > first)
            before = total
            total = tl.zeros([SIDE, SIDE], tl.float32)


@triton.jit(do_not_specialize=["positions", "padded", "layers", "blocks", "count", "run"])
def near(
    high, low, weights, tiles, to, positions, padded, layers, blocks, count, run,
    SIDE: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Over a Gram tile of each layer the sum of squares, and of products with the next layer's tile.

    ``to[count, positions, layers, 2]``. A program goes through ``run`` layers and the one after them.
    """
    position = (tl.program_id(0) // count).to(tl.int64)
    tile = tl.program_id(0) % count
    down = tl.load(tiles + 2 * tile).to(tl.int32)
    across = tl.load(tiles + 2 * tile + 1).to(tl.int32)
    first = (tl.program_id(1) * run).to(tl.int64)
    end = tl.minimum(first + run, layers)
    place = position * padded * (blocks * COLUMNS)
    to += (tile * positions + position) * layers * 2
    weights += position * layers * blocks
    high += place
    low += place
    if down == across:
        _compared(
            high, low, weights, to, positions, padded, blocks, down, across, first, end, layers,
            True, SIDE, COLUMNS, STAGES,
        )  # fmt: skip
    else:
        _compared(
            high, low, weights, to, positions, padded, blocks, down, across, first, end, layers,
            False, SIDE, COLUMNS, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["to", "parts", "size"])
def gather(apart, to, parts, size, PARTS: tl.constexpr, ENTRIES: tl.constexpr):
    """Add up ``apart[parts, size]`` in an order that their number alone decides."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    part = tl.arange(0, PARTS)
    total = tl.zeros([PARTS, ENTRIES], tl.float64)
    for at in range(0, parts, PARTS):
        there = (at + part < parts)[:, None] & (entry < size)[None, :]
        place = (at + part).to(tl.int64)[:, None] * size + entry[None, :]
        total += tl.load(apart + place, mask=there, other=0.0)
    tl.store(to + entry, tl.sum(total, 0), mask=entry < size)
