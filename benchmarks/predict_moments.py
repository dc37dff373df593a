"""What the kernels of moments are predicted to take on an H100, over torch's widening and batched product.

    python benchmarks/predict_moments.py

No GPU is needed and none is used: every figure of our kernels is PREDICTED. A block of threads is given the
clocks that its products, conversions, loads and instructions take of a multiprocessor, which divides them
among as many blocks as its registers hold (`make gate` reads these from the machine code). A block that is
alone waits for each in turn. The model is first compared with kernels of the same products that were
measured, prototypes in Triton. Rows that are off by more than a quarter are marked.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_clock import Row, print_beside, timed

from rgfast.ops.device import LAUNCH, STREAM
from rgfast.ops.moments.call import Products
from rgfast.ops.moments.impl import cuda as kernels
from rgfast.ops.moments.impl import library
from rgfast.ops.moments.tiles import DTYPES

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "tests" / "gate" / "tables"
MEASURED = Path(__file__).with_name("h100_measured.json")
SHAPES = {
    (448, 1024, 64): 2.8,
    (416, 1024, 128): 2.2,
    (400, 1024, 256): 2.0,
}  # and how many times faster we want
WIDE = ((400, 2048, 512), (104, 4096, 1024))
OTHERS = tuple(itertools.product((1, 16, 400), (64, 1024, 16384), (16, 32, 65, 96, 512, 1024)))

SIDE, STEP = 64, 16
# An H100: multiprocessors, their registers and shared memory, and the clock at which m16n8k16 was measured to
# give 65 TF/s of fp64.
SMS, REGISTERS, SHARED, CLOCK = 132, 65_536, 227 * 1024, 65e12 / (132 * 4 * 64)
# Per clock: products of one of four tensor cores in fp64 and (by mma.sync, 62% of the peak) in fp16. Of a
# multiprocessor: conversions to fp64 and others, fp64 operations, bytes of shared memory and of the
# second-level cache.
DMMA, HMMA, TO_FP64, CONVERT, FP64, BANKS, CACHE = 32, 320, 16, 64, 64, 128, 64
# Clocks until a load from memory, one from shared memory, and a barrier.
FROM_MEMORY, FROM_SHARED, BARRIER = 600, 33, 30
# Instructions of a warp for 16 rows, counted in the machine code for sm_90: the loop, loading and storing a
# side, an fp64 product with what goes with it, split products, and adding them up every fourth time.
LOOP, SIDE_EXACT, SIDE_SPLIT, PER_PRODUCT, PRODUCTS_SPLIT, ADDING_UP = 40, 80, 165, 3.2, 150, 56
SLOW_FP64 = 2  # products per clock of a multiprocessor with 128 fp32 ones
MMA, SPLIT_MMA = 16 * 8 * 4, 16 * 8 * 16


@dataclass(frozen=True)
class Block:
    """What 16 rows of a tile take of a multiprocessor, in clocks.

    Products and instructions are those of the four warps, each on a scheduler and tensor core of its own.
    """

    products: tuple[float, ...]
    issue: tuple[float, ...]
    shared: float
    conversions: float

    def together(self, count: int) -> float:
        """Clocks of a step of ``count`` blocks at a time, whose warps of most work differ in their place."""
        turned = [[*self.products[k % 4 :], *self.products[: k % 4]] for k in range(count)]
        products = max(map(sum, zip(*turned, strict=True)))
        shares = max(self.issue), self.shared, self.conversions
        return max(products, *(count * share for share in shares), self.alone)

    @property
    def alone(self) -> float:
        """Clocks of a step of a block that has a multiprocessor to itself, in which little overlaps."""
        work = max(max(self.products), max(self.issue)) + 4 * FROM_SHARED
        return max(work, FROM_MEMORY) + self.conversions + FROM_SHARED + BARRIER


def exact(high: int, wide: int, *, diagonal: bool) -> Block:
    """A tile of so many columns down and across, by fp64 products of fp32 rows that are converted once."""
    sides = 1 if diagonal else 2
    staged = sides * SIDE * STEP
    counts = [4 * count for count in _blocks(high, wide, diagonal, together=2)]  # of m16n8k4
    # Shifting goes through the same pipes as products.
    shifting = staged / FP64
    read = sum(4 * 4 * 512 for count in counts if count)
    return Block(
        tuple(count * MMA / DMMA + shifting for count in counts),
        tuple(LOOP + SIDE_EXACT * sides + PER_PRODUCT * count for count in counts),
        (read + staged * (8 + 4)) / BANKS,
        staged / TO_FP64,
    )


def split(high: int, wide: int, *, diagonal: bool) -> Block:
    """The same by three products of numbers split into two fp16 numbers each."""
    sides = 1 if diagonal else 2
    staged = sides * SIDE * STEP
    counts = [3 * count for count in _blocks(high, wide, diagonal, together=1)]
    issue = LOOP + SIDE_SPLIT * sides + PRODUCTS_SPLIT + ADDING_UP
    read = sum(8 * 512 for count in counts if count)
    return Block(
        tuple(count * SPLIT_MMA / HMMA for count in counts),
        (issue,) * 4,
        (read + staged * (4 + 4)) / BANKS,
        3 * staged / CONVERT,
    )


def prototype() -> Block:
    """Triton's: both strips as they are in shared memory, converted by every warp that multiplies them."""
    read, staged = 4 * 2 * 32 * STEP, 2 * SIDE * STEP
    products, issue = 8 * 4 * MMA / DMMA, LOOP + 2 * SIDE_EXACT + 8 * 4 * PER_PRODUCT
    return Block((products,) * 4, (issue,) * 4, 4 * (read + 2 * staged) / BANKS, read / TO_FP64)


def _blocks(high: int, wide: int, diagonal: bool, *, together: int) -> list[int]:
    """Blocks of 16 x 8 that each quarter of a tile multiplies, of which ``together`` side by side are one."""
    found = []
    for top in (0, SIDE // 2):
        for left in (0, SIDE // 2):
            down = min(2, max(0, -(-(high - top) // 16)))
            across = together * min(4 // together, max(0, -(-(wide - left) // (8 * together))))
            below = 2 if diagonal and top == left and down == 2 else 0
            found.append(0 if diagonal and top > left else down * across - min(below, across))
    return found


def tiles(width: int, other: int | None = None, *, kind: Any = exact) -> list[Block]:
    """Of a layer's own moment, or of its products with another."""
    down, across = ([min(SIDE, d - k) for k in range(0, d, SIDE)] for d in (width, other or width))
    found = []
    for i, high in enumerate(down):
        for j, wide in enumerate(across):
            if other is not None or i <= j:
                found.append(kind(high, wide, diagonal=other is None and i == j))
    return found


def mean(blocks: list[Block]) -> Block:
    """Of blocks that come mixed."""
    n = len(blocks)
    products, issue = (
        tuple(sum(quarter) / n for quarter in zip(*each, strict=True))
        for each in ([block.products for block in blocks], [block.issue for block in blocks])
    )
    shared = sum(block.shared for block in blocks) / n
    return Block(products, issue, shared, sum(block.conversions for block in blocks) / n)


def seconds(
    batch: int,
    n: int,
    blocks: list[Block],
    resident: int,
    moved: float,
    *,
    ends: float = SIDE * SIDE * 16 / CACHE + 2 * BARRIER,  # a tile and its image
    launch: float = LAUNCH,
) -> float:
    """Of a launch of these blocks for every matrix, on multiprocessors that take them in turn."""
    each, steps = mean(blocks), -(-n // STEP)
    begins = 4 * FROM_MEMORY  # pair, layers, first rows

    def turn(count: int) -> float:
        return steps * each.together(count) + begins + ends if count else 0.0

    most = -(-batch * len(blocks) // SMS)
    clocks = most // resident * turn(resident) + turn(most % resident)
    return launch + max(clocks / CLOCK, moved / STREAM)


def resident(kernel: str, architecture: int = 90, shared: int = kernels.SHARED) -> int:
    """How many blocks a multiprocessor holds, by registers and shared memory."""
    table = TABLES / f"{kernel.split('_')[1]}.txt"
    rows = [line.split() for line in table.read_text(encoding="utf-8").splitlines()]
    (row,) = [row for row in rows if row[0] == str(architecture) and row[-1] == kernel]
    threads, registers = int(row[1]), int(row[2])
    warps = threads // 32 * 32 * (-(-registers // 8) * 8)
    return min(REGISTERS // warps, SHARED // (shared + 1024))


def of_call(call: Products, name: str = "exact") -> tuple[int, float]:
    """How many launches a call has, and their seconds."""
    (positions, n), kind = call.rows[0].shape[:2], {"exact": exact, "split": split}[name]
    columns = [x.shape[2] + call.extra for x in call.rows]
    blocks = []
    for i, j in call.sums:
        blocks += tiles(columns[i], None if i == j else columns[j], kind=kind)
    rows = sum(float(x.numel()) * x.element_size() for x in call.rows)
    entries = positions * sum(columns[i] * columns[j] for i, j in call.sums)
    spread = kernels._spread(
        positions * len(blocks), -(-n // kernels._BLOCK_ROWS), entries, torch.device("cuda")
    )
    kernel = f"rgfast_moments_{name}_{DTYPES[call.rows[0].dtype]}"
    moved = rows + 8.0 * entries * spread
    found = seconds(positions * spread, -(-n // spread), blocks, resident(kernel), moved)
    norms = bool(call.extra) or name == "split"
    found += LAUNCH * (spread > 1) + (LAUNCH + rows / STREAM) * norms
    return 1 + (spread > 1) + norms, found


def second_moments(batch: int, n: int, width: int, name: str = "exact", *, extended: bool) -> float:
    """Seconds of second moments of ``[batch, n, width]`` in fp32, with the columns |y|² and 1 or without."""
    return of_call(products(batch, n, width, extended=extended), name)[1]


def validation() -> list[tuple[str, float, float]]:
    """The prototypes: what was measured and what the model gives, in milliseconds."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))["moments_in_triton"]
    found = []
    for (batch, n, width), ms in measured["milliseconds"]:
        count = math.comb(width // SIDE + 1, 2)
        blocks = [prototype()] * count
        held = REGISTERS // (128 * (-(-measured["registers"] // 8) * 8))
        moved = 4.0 * batch * n * width + 8.0 * batch * width**2
        found.append((f"{(batch, n, width)}", ms, 1e3 * seconds(batch, n, blocks, held, moved)))
    return found


def products(batch: int, n: int, width: int, *, extended: bool) -> Products:
    """The call for these second moments, of tensors without data."""

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    extra = 2 if extended else 0
    sums = {(0, 0): empty(batch, width + extra, width + extra)}
    rows = empty(batch, n, width, dtype=torch.float32)
    return Products(sums, [rows], [empty(batch, width)], None, [0], extra)


def by_the_library(batch: int, n: int, width: int, *, extended: bool) -> float:
    """Seconds of the library's implementation for the same sums, by its operators."""
    call = products(batch, n, width, extended=extended)
    return timed(lambda: library.MOMENTS.run(call)).seconds


def by_torch(batch: int, n: int, width: int) -> float:
    """Seconds of widening and a batched product, by the model of torch's operators."""

    def run() -> None:
        z = torch.empty(batch, n, width, device="meta").double()
        torch.bmm(z.mT, z)

    return timed(run).seconds


def main() -> None:
    """The tables."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    print_beside("Triton's, measured on an H100, ms", (Row(*each) for each in validation()))
    torchs = {tuple(shape): ms for shape, ms in measured["widen_and_multiply"]}
    print("\nPREDICTED, not run on a GPU: second moments in fp64, of rows in fp32, ms\n")
    head = "[batch, n, d]", "torch, measured", "ours", "times faster", "wanted"
    more = "with abs(y)^2 and 1: the library", "ours", "times faster"
    print(f"| {' | '.join((*head, *more))} |\n|{'---|' * (len(head) + len(more))}")
    for shape, wanted in SHAPES.items():
        plain, whole = (1e3 * second_moments(*shape, extended=extended) for extended in (False, True))
        theirs, other = torchs[shape], 1e3 * by_the_library(*shape, extended=True)
        first = f"{theirs:.3g} | {plain:.3g} | {theirs / plain:.1f} | {wanted}"
        print(f"| {list(shape)} | {first} | {other:.3g} | {whole:.3g} | {other / whole:.1f} |")
    over = {shape: by_torch(*shape) / second_moments(*shape, extended=False) for shape in OTHERS}
    slower = ", ".join(f"{list(shape)} {ratio:.2f}" for shape, ratio in over.items() if ratio < 1.0)
    print(f"\nOf {len(over)} other shapes these take longer than torch's two operators: {slower}")
    print("\nPREDICTED, not run on a GPU: split products over fp64, with abs(y)^2 and 1\n")
    print("| [batch, n, d] | fp64, ms | split, ms | times faster |\n|---|---|---|---|")
    for shape in (*SHAPES, *WIDE):
        double, single = (1e3 * second_moments(*shape, name, extended=True) for name in ("exact", "split"))
        print(f"| {list(shape)} | {double:.3g} | {single:.3g} | {double / single:.2f} |")
    slow = SIDE * SIDE * STEP / SLOW_FP64 / max(split(SIDE, SIDE, diagonal=False).issue)
    print(f"\nA tile on a card with fp64 at 1/64 of fp32: {slow:.0f} times faster, by clocks alone")


if __name__ == "__main__":
    main()
