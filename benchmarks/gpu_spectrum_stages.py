"""What eigenvalues in stages are predicted to take on an H100, over cuSOLVER's measured times.

    python benchmarks/gpu_spectrum_stages.py

As `gpu_spectrum.py` does for smaller matrices, whose clocks and two fitted factors these are: nothing was
fitted again. No GPU is needed and none is used: every figure of the package's kernels is PREDICTED. First the
same counts, of the loops that prototypes had, are held against what those took on an H100. Rows that are off
by more than a quarter are marked.

A part of a kernel has clocks of the chain of operations that wait for each other, clocks that keep a
multiprocessor busy, and bytes of the device's memory. What is busy is mostly the way to memory, for a clock
per line of 128 bytes that a warp touches. Rows of a panel are read by threads: prototypes, whose rows were
far apart, touched 32 lines for 16 bytes of each lane. In tiles these are 16, and 4 where a warp takes a whole
tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from gpu_clock import Row, print_beside
from gpu_spectrum import (
    AROUND_COUNT,
    CLOCK,
    COUNTS,
    EXCHANGED,
    FITTED_BUSY,
    FITTED_CHAIN,
    FUSED,
    GRAPHED,
    LOAD,
    LOADED,
    PROCESSORS,
    REFLECTOR,
    REGISTERS,
    ROW_BUSY,
    ROW_WAIT,
    SHARED,
    SHUFFLED,
    beside_library,
    measured,
    registers,
)

from rgfast.ops.device import LAUNCH
from rgfast.ops.spectrum.stages import STAGES, at_once

WIDTH = 16  # of a panel
# Clocks until a value comes from the device's memory, and from the second-level cache; until the result of an
# fp64 mma m16n8k16 and m16n8k8, and between two of the former (65 TF/s). Assumed but the last.
FAR, CACHED, MMA, SMALLER_MMA, MMA_BUSY = 700, 270, 35, 20, 16
# A chase's step: clocks of its chain, and shuffles and words of shared memory of its warp. Of the prototypes'
# (which passed vectors through shared memory) and of ours, as compiled.
STEP = {"prototype": (906, 143), "package": (921, 152)}
REFLECTING = 5 * SHUFFLED[8] + 2 * EXCHANGED + 2 * LOAD + 2 * SHUFFLED[8] + REFLECTOR[8] + 5 * FUSED[8]
# T of a panel's reflectors, by one warp, of which prototypes waited for every load.
FACTOR = {
    "prototype": 120 * (LOAD + FUSED[8]) + 16 * EXCHANGED,
    "package": 120 * FUSED[8] + 16 * (LOAD + FUSED[8]),
}
# Lines of 16 x 16 entries: the matrix in and out, V and W, V of the next, what turns the block (shuffles),
# what its columns get in and out of shared memory, and registers that were spilled.
BLOCK_LINES = 16 + 16 + 32 + 16 + 16 + 16 + 16 + 9


class Part(NamedTuple):
    """Of a panel with m rows below it, for one matrix: clocks of the chain, busy clocks, bytes."""

    chain: float
    busy: float
    bytes: float

    def seconds(self, together: float, batch: int) -> float:
        """With so many matrices to a multiprocessor, of a batch that shares the memory."""
        clocks = FITTED_CHAIN * self.chain + together * FITTED_BUSY * self.busy
        return clocks / CLOCK + batch * self.bytes / LOADED


def padded(n: int) -> int:
    return -(-n // WIDTH) * WIDTH


def below(n: int) -> list[int]:
    """The rows below each panel but the last."""
    return list(range(padded(n) - WIDTH, 0, -WIDTH))


def panel(m: int, most: int, alone: bool) -> Part:
    """The prototypes' reflectors, by `most` threads, or a kernel `alone` has fewer for few rows."""
    rows = 2 if m > most else 1
    warps = most // 32 if not alone else max(2, -(-m // (32 * rows)))
    arithmetic = (16 * rows + 8 * (3 + rows) + 26) * warps * 2 / 4
    column = max(23 * warps, arithmetic, 2 * 20 * warps) + 10 * warps
    lines = (8 + 16 + 8 + 8) * m
    chain = WIDTH * (REFLECTING + warps / 2 * FUSED[8]) + FACTOR["prototype"] + 2 * FAR + WIDTH * 60 * rows
    return Part(chain, WIDTH * column + lines, (WIDTH + 64) * 8 * m)


def triangle(m: int, warps: int) -> Part:
    """The prototypes' products: tiles of 16 x 32 of the lower triangle, each used for both of its places."""
    blocks = [max(0, m // 16 - 2 * j) for j in range(-(-m // 32))]
    tile = FAR + 4 * MMA + 8 * SMALLER_MMA + EXCHANGED + 2 * LOAD
    chain = sum(-(-count // warps) for count in blocks) * tile + len(blocks) * (FAR / 2 + 3 * EXCHANGED)
    lines = 64 + 128 + 64 + 64 + 32 + 32 + 32 + 32 + 32
    return Part(chain, sum(blocks) * max(lines, 16 * MMA_BUSY), m * m * 8.0)


def finish(m: int) -> Part:
    """The prototypes' W of U, V and T."""
    chain = m / 4 * FUSED[8] + 4 * EXCHANGED + WIDTH * (2 * LOAD + FUSED[8]) + 2 * FAR
    return Part(chain, (8 + 8 + 16 + 4 + 8 + 3) * m, 6 * WIDTH * 8 * m)


def our_begin(n: int, warps: int) -> Part:
    """Reads the package's matrix and writes its lower triangle by tiles."""
    rows = padded(n)
    chain = rows / warps * max(1.0, rows / 256) * FAR
    return Part(chain, rows * rows / 2 * (3 + 4) / 32 + 2 * rows, 4.0 * n * n + 4.0 * rows * rows)


def our_panel(m: int, warps: int) -> Part:
    """The package's: brought up to date 16 rows at a time, one or two rows of each thread in registers."""
    rows = 2 if m > 32 * warps else 1
    arithmetic = (20 * rows + 8 * (3 + rows) + 26) * warps * 2 / 4
    column = max((15 + warps) * warps, arithmetic, 2 * 20 * warps) + 10 * warps
    lines = (32 + 16 + 64) / 16 * (m + WIDTH) + (1 + 1 + 4) * m
    chain = -(-(m + WIDTH) // (16 * warps)) * (FAR + 4 * MMA)
    chain += WIDTH * (REFLECTING + warps / 2 * FUSED[8]) + FACTOR["package"] + FAR + WIDTH * 60 * rows
    return Part(chain, WIDTH * column + lines, (WIDTH + 64) * 8 * m)


def strips(m: int, warps: int) -> list[int]:
    """How many columns of 16 the warps go through together, once for every 16 rows of each."""
    return list(range((m // 16 - 1) % warps + 1, m // 16 + 1, warps))


def our_products(m: int, warps: int) -> Part:
    """The package's: blocks of 16 x 16 of the lower triangle, each used for both of its places."""
    blocks, steps = m // 16 * (m // 16 + 1) // 2, sum(strips(m, warps))
    tile = CACHED / 2 + LOAD + 2 * MMA + SHUFFLED[8] + 2 * SMALLER_MMA
    barriers = 1 if warps < 16 else 2
    step = 2 * tile + barriers * EXCHANGED + max(CACHED, LOAD + warps * FUSED[8])
    chain = steps * step + len(strips(m, warps)) * (FAR + LOAD)
    busy = blocks * max(BLOCK_LINES, 8 * MMA_BUSY) + steps * 8 * (4 + 4) + m // 16 * (32 + 16)
    return Part(chain, busy, blocks * 256 * 16.0)


def our_finish(m: int, warps: int) -> Part:
    """The package's W."""
    chain = -(-m // (8 * warps)) * (CACHED + 2 * SMALLER_MMA) + 4 * EXCHANGED + warps * FUSED[8]
    chain += WIDTH * (SHUFFLED[8] + LOAD + 2 * FUSED[8]) + -(-m // (16 * warps)) * (CACHED + 2 * MMA) + FAR
    small = 8 * (32 + 32 + 64) + (64 + 16 + 64) * warps
    lines = ((8 + 16) / 8 + max(16 + 16 + 16, 4 * MMA_BUSY) / 16) * m
    return Part(chain, lines + small, 3 * WIDTH * 8 * m)


def waves(batch: int, blocks: int) -> Iterator[int]:
    """How many blocks run at once, one lot after another, if so many fit a multiprocessor."""
    while batch > 0:
        yield min(batch, blocks * PROCESSORS)
        batch -= blocks * PROCESSORS


def prototype_band(n: int, batch: int, most: int, warps: int, split: int, streams: int) -> float:
    """Seconds. Kernels of several streams hide behind each other; products of a matrix may be split."""
    seconds = 0.0
    for m in below(n):
        for part, over in (
            (panel(m, most, alone=streams > 0), 1),
            (triangle(m, warps * split), split),
            (finish(m), 1),
        ):
            together = max(1.0, batch * over / PROCESSORS) / over
            seconds += part.seconds(together, batch) + (GRAPHED if streams else 0.0)
    return seconds


def our_parts(n: int, warps: int) -> dict[str, list[Part]]:
    """Of the package's kernel, one after another."""
    rows = below(n)
    return {
        "begin": [our_begin(n, warps)],
        "panels": [our_panel(m, warps) for m in rows],
        "products": [our_products(m, warps) for m in rows],
        "W": [our_finish(m, warps) for m in rows],
    }


def band(n: int, batch: int) -> float:
    """Seconds of the package's kernel: a block per matrix."""
    return sum(sum(seconds) for seconds in band_by_part(n, batch).values())


def band_by_part(n: int, batch: int) -> dict[str, tuple[float, float, float]]:
    """Seconds of the parts of the package's kernel: of their chains, busy, and of their bytes."""
    name, threads, shared = STAGES.launches(n, torch.float64)[0]
    found = {}
    for what, parts in our_parts(n, threads // 32).items():
        chain, busy, moved = (sum(part[k] for part in parts) for k in range(3))
        lots = list(waves(batch, fitting(name, threads, shared)))
        together = sum(math.ceil(now / PROCESSORS) for now in lots)
        found[what] = (
            len(lots) * FITTED_CHAIN * chain / CLOCK,
            together * FITTED_BUSY * busy / CLOCK,
            batch * moved / LOADED,
        )
    return found


def fitting(name: str, threads: int, shared: int) -> int:
    """Blocks of a kernel that fit a multiprocessor."""
    per_thread = -(-registers(name, "spectrum_stages") // 8) * 8
    return min(REGISTERS // (per_thread * threads), SHARED // (shared + 1024))


def chasing(n: int, batch: int, warps: int, blocks: int, near: bool, whose: str) -> float:
    """Seconds. A sweep starts two steps after the one before, or when a warp is through with another."""
    steps = sum(max(2.0, (n - s) / (16 * warps)) for s in range(n - 2)) + n / 16
    chain, busy = STEP[whose]
    chain += 0 if near else CACHED - LOAD
    clocks = 0.0
    for now in waves(batch, blocks):
        # Other warps hide what a warp waits for.
        clocks += steps * math.hypot(FITTED_CHAIN * chain, math.ceil(now / PROCESSORS) * warps * busy)
    return clocks / CLOCK


def prototype_chase(n: int, batch: int, warps: int, near: bool) -> float:
    shared = 512 * warps + 4 * n + (256 * padded(n) if near else 0)
    blocks = min(64 // warps, SHARED // (shared + 1024))
    return 10e-6 + chasing(n, batch, warps, blocks, near, "prototype")


def chase(n: int, batch: int) -> float:
    """Seconds of the package's kernel."""
    name, threads, shared = STAGES.launches(n, torch.float64)[1]
    blocks = fitting(name, threads, shared)
    return chasing(n, batch, threads // 32, blocks, not name.endswith("far_f64"), "package")


def counts(n: int, batch: int) -> float:
    """Seconds of the package's kernel, a block for every 128 eigenvalues."""
    name, threads, shared = STAGES.launches(n, torch.float64)[2]
    parts, clocks = -(-n // threads), 0.0
    for now in waves(batch * parts, fitting(name, threads, shared)):
        warps = math.ceil(now / PROCESSORS) * threads / 32
        clocks += padded(n) * max(ROW_WAIT[8], warps / 4 * ROW_BUSY[8]) + AROUND_COUNT
    return COUNTS[8] * clocks / CLOCK


def predicted(n: int, batch: int, size: int, spectra: int = 1) -> float:
    """Seconds that a batch takes by the package's kernels, one spectrum or two of a reduction."""
    seconds = LAUNCH + GRAPHED + spectra * batch * n * 16.0 / LOADED  # and puts values in order
    most = at_once(n)
    while batch > 0:
        now = min(batch, most)
        seconds += band(n, now) + chase(n, now) + spectra * counts(n, now) + 2 * GRAPHED
        # The reflector of the mean reads the matrix twice and writes it once.
        seconds += (spectra - 1) * 24.0 * n * n * now / LOADED
        if size == 4:
            seconds += GRAPHED + 12.0 * n * n * now / LOADED
        batch -= now
    return seconds


def validation() -> list[Row]:
    """The prototypes' stages, in microseconds per matrix."""
    table, rows = measured(), []
    for n, batch, *how, each in table["bands"]:
        seconds = prototype_band(n, batch, *how)
        rows.append(Row(f"dense to band, {batch} of n={n}", each, 1e6 * seconds / batch))
    for n, batch, warps, near, each in table["chases"]:
        seconds = prototype_chase(n, batch, warps, near)
        rows.append(Row(f"band to tridiagonal, {batch} of n={n}", each, 1e6 * seconds / batch))
    return rows


def table() -> str:
    """What is printed of the package's kernels."""
    return beside_library("cusolver_staged", predicted)


def main() -> None:
    print_beside("measured on an H100, us per matrix", validation())
    print(
        "\nPREDICTED, not run on a GPU: microseconds per matrix in stages by the package's kernels, how many"
    )
    print("times faster that is than cuSOLVER, measured on an H100, and in brackets what was wanted\n")
    print(table())
    print("\n| PREDICTED | dense to band | band to tridiagonal | eigenvalues |\n|---|---|---|---|")
    for n, batch in ((200, 400), (256, 64), (256, 400), (384, 400), (512, 64), (512, 400), (1024, 64)):
        parts = (1e6 * each(n, batch) / batch for each in (band, chase, counts))
        print(f"| {batch} of n={n} | {' | '.join(f'{part:.3g}' for part in parts)} |")


if __name__ == "__main__":
    main()
