"""What the package's eigenvalue kernels are predicted to take on an H100, over cuSOLVER's measured times.

    python benchmarks/gpu_spectrum.py

No GPU is needed and none is used: every figure of the kernels is PREDICTED. Each is a count of what a step of
its loops does: clocks of the chain of operations that wait for each other, and clocks that a multiprocessor
is busy with them (arithmetic, issue, shared memory or shuffles, the most of these), for as many blocks as fit
side by side by the registers and shared memory that the compiler took. First the same model is held against
what prototypes of the same algorithm took on an H100. Rows that are off by more than a quarter are marked.

Clocks of single operations were measured there, those of fp32 are assumed. Two factors were fitted to the
prototypes' reductions: how much longer chains and busy clocks are than the sum of their parts (addresses,
selects and branches are not counted). So were the clocks that a row of a Sturm count takes.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_clock import Row, print_beside

from rgfast.ops.device import LAUNCH
from rgfast.ops.spectrum.impl.cuda import Kernel, kernel_for

MEASURED = Path(__file__).with_name("h100_eigenvalues.json")
COMPILED = Path(__file__).resolve().parents[1] / "tests" / "gate" / "tables"

CLOCK = 1.92e9  # at which 132 multiprocessors make 65 TF/s of fp64 mma
PROCESSORS, SHARED, REGISTERS = 132, 233472, 65536
BATCHES = (64, 400, 2048)
LOADED = 3e12  # bytes a second
# Clocks: of a fused multiply-add, a shuffle and addition, a root and a reciprocal as refined ones, and a root
# and a division as the prototypes' first round had them.
FUSED, SHUFFLED = {8: 10, 4: 4}, {8: 36, 4: 27}
REFLECTOR, DIVIDING = {8: 106, 4: 60}, {8: 182, 4: 90}
EXCHANGED, LOAD = 43, 30  # through shared memory, and from it
FITTED_CHAIN, FITTED_BUSY = 1.6, 1.65
# Clocks of a row of a count: until the next row, and of the part of a multiprocessor that has the warp.
ROW_WAIT, ROW_BUSY, AROUND_COUNT = {8: 34.0, 4: 27.0}, {8: 21.0, 4: 12.5}, 200.0
# Counts of the slowest thread of a block (Gaussian matrices, on the host), the table's among them; by halving
# the interval of 2 that a table has cut.
COUNTS, BITS = {8: 17, 4: 13}, {8: 51, 4: 22}
# Before a kernel called through ctypes starts, the least that the prototypes' clock shows of one, and before
# one of a CUDA graph starts.
CTYPES, CTYPES_LEAST, GRAPHED = 10e-6, 22.5e-6, 3e-6
# Until a block has its matrix. Assumed.
BEGIN = 2e-6


@dataclass(frozen=True)
class Shape:
    """A kernel as compiled: `chunks` of 32 rows (of a lane's row: its columns) and how often it stops."""

    where: str  # lanes, registers or shared: where the matrix is
    size: int  # bytes of an entry
    chunks: int
    warps: int
    registers: int
    shared: int  # bytes, the packed matrix included
    barriers: int = 1  # per step
    paired: bool = True  # whether loads of two chunks of a matrix in shared memory are side by side
    together: int = 1  # groups of columns that a warp sums over its lanes at once
    sums: int = 2  # over lanes that wait for each other, in a step of a block
    reflector: int = 0  # clocks of a reflector's root and division

    @property
    def per_block(self) -> int:
        return 32 * self.warps // self.chunks if self.where == "lanes" else 1

    @property
    def occupancy(self) -> int:
        """Blocks per multiprocessor."""
        per_thread = -(-self.registers // 8) * 8
        return min(
            REGISTERS // (per_thread * 32 * self.warps),
            SHARED // (self.shared + 1024),
            64 // self.warps,
            32,
        )

    def step(self, n: int, k: int) -> tuple[float, float]:
        """Clocks of the chain of step k of n - 1, and those that a multiprocessor is busy with a block's."""
        return self._step_in_lanes(n, k) if self.where == "lanes" else self._step_of_block(n, k)

    def _step_in_lanes(self, n: int, k: int) -> tuple[float, float]:
        lanes, size = self.chunks, self.size
        words, fused, shuffled = size // 4, FUSED[size], SHUFFLED[size]
        # Columns from k + 1 on, four at a time and more: loads of those taken together are side by side.
        width = 4 * self.together
        taken = -(-(n if self.together > 1 else lanes) // width) - (k + 1) // width
        groups = max(1, taken) * self.together
        sums = 2 * math.log2(lanes)
        chain = sums * shuffled + self.reflector + 4 * fused + 2 * EXCHANGED
        chain += max(1, taken) * (2 * LOAD + (2 + self.together) * fused) + groups * 12 * words
        arithmetic = 12 * groups + 20
        shuffles = (sums + 1) * words
        issued = arithmetic + groups * 7 * words + shuffles
        return chain, max(self.warps / 4 * max(arithmetic * words, issued), self.warps * shuffles)

    def _step_of_block(self, n: int, k: int) -> tuple[float, float]:
        size, warps = self.size, self.warps
        words, fused, shuffled = size // 4, FUSED[size], SHUFFLED[size]
        held, packed = self.where == "registers", self.where == "shared"
        first, last = (k + 1) // 4, -(-n // 4)
        live = self.chunks - k // 32
        # Every warp: the product's parts, two sums over its lanes, the reflector, what it leaves for others.
        parts = warps if self.barriers == 1 else 0
        if self.sums == 2:  # and a value that is passed on between them
            chain = 2 * live * fused + 11 * shuffled + 9 * fused
        else:  # four at once, which are passed on; what is more than one shuffle waits for the way
            chain = live * fused + 6 * shuffled + 4 * words * (1 + 3) + 13 * fused
        added = warps if self.sums == 2 else warps // 2 + 1  # of what the warps have, one after another
        chain += LOAD + (added * fused if parts else 0) + self.reflector + 2 * EXCHANGED
        if self.barriers == 2:
            chain += EXCHANGED + LOAD + added * fused
        chunks, longest, left = 0, [0.0] * warps, [0] * warps
        for g in range(first, last):  # groups of four columns go to the warps in turns
            here = self.chunks - (g // warps * warps if held else g) // 8
            if held:
                time = 6 * fused + 16 * here * words
            else:
                time = (here + 1 if self.paired else 2 * here) // 2 * (LOAD + 5 * fused)
            longest[g % warps] += LOAD + time
            left[g % warps] += 1
            chunks += here
        # Sums over lanes: 2 + 1 + ... shuffles for a group, 4 + 2 + 1 + ... for two. Five of them wait for
        # each other, and those that are more than for one group wait for the way.
        many = {1: 6, 2: 9, 4: 16}[self.together]
        rounds = [-(-count // self.together) for count in left]
        for warp, count in enumerate(rounds):
            longest[warp] += count * (5 * shuffled + 4 * words * (many - 6))
        groups = last - first
        vectors = 3 * groups  # of v, w and u, of which ours have the last once for every chunk
        if packed and self.together > 1:
            vectors += chunks - groups
        arithmetic = 16 * chunks + warps * live * (12 + parts + (0 if self.sums == 2 else 4))
        shuffles = (12 * warps + many * sum(rounds)) * words
        moved = sum(n - 4 * g for g in range(first, last)) * 8 * size / 128 if packed else 0.0
        moved += (warps * live * (parts + 6) + vectors) * words
        issued = arithmetic + shuffles + vectors * words + chunks * (6 if held else 12 + 4 * words)
        issued += 6 * warps * live * words
        return chain + max(longest), max(arithmetic * words / 4, issued / 4, moved, shuffles)

    def reduction(self, n: int) -> Iterator[tuple[float, float]]:
        for k in range(n - 1):
            chain, busy = self.step(n, k)
            yield FITTED_CHAIN * chain, FITTED_BUSY * busy

    def reducing(self, n: int, batch: int) -> float:
        """Seconds of the reduction of a batch."""
        steps = list(self.reduction(n))
        chain, busy = (sum(part) for part in zip(*steps, strict=True)) if steps else (0, 0)
        return sum(chain + math.ceil(together) * busy for together in self._waves(batch)) / CLOCK

    def _waves(self, batch: int) -> Iterator[float]:
        """How many blocks a multiprocessor has, one lot of blocks after another."""
        left = -(-batch // self.per_block)
        while left > 0:
            now = min(left, PROCESSORS * self.occupancy)
            yield max(1.0, now / PROCESSORS)
            left -= now

    def counting(self, n: int, batch: int, counts: float, even: bool = False) -> float:
        """Seconds of so many counts by every thread, or by the slowest unless all take an `even` number."""
        rows = -(-n // 16) * 16 if self.size == 8 else -(-n // 4) * 4
        clocks = 0.0
        for together in self._waves(batch):
            warps = (math.ceil(together) if even else together) * self.warps / 4
            clocks += rows * max(ROW_WAIT[self.size], warps * ROW_BUSY[self.size]) + AROUND_COUNT
        return counts * clocks / CLOCK


def packed_bytes(n: int, size: int) -> int:
    """Of a lower triangle in groups of four columns."""
    return size * sum(4 * (n - 4 * g) for g in range(-(-n // 4)))


def measured() -> dict[str, Any]:
    """What was measured on an H100 (the file says what of)."""
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return found


def prototype(name: str, n: int) -> Shape:
    """The prototype of that name in the file, for matrices of n rows."""
    about = measured()["prototypes"][name]
    shape = Shape(shared=0, reflector=0, **{k: v for k, v in about.items() if k != "old"})
    clocks = DIVIDING if about.get("old", True) else REFLECTOR
    rows, size = 32 * shape.chunks, shape.size
    buffers = (3 - shape.barriers) * (shape.warps + 1)
    shared = {
        "lanes": 256 * size,
        "registers": rows * (5 + buffers) * size,
        "shared": rows * (4 + buffers) * size + packed_bytes(n, size),
    }
    return replace(shape, shared=shared[shape.where], reflector=clocks[size])


@functools.cache
def registers(name: str, source: str = "spectrum") -> int:
    """Of a kernel of the package, as compiled for sm_90."""
    table = COMPILED / f"{source}.txt"
    for line in table.read_text(encoding="utf-8").splitlines():
        if line.split()[0] == "90" and line.split()[-1] == name:
            return int(line.split()[2])
    raise ValueError(f"{table} has no {name} for sm_90")


def kernel(n: int, size: int) -> Shape:
    """The package's, for matrices of n rows."""
    dtype = torch.float64 if size == 8 else torch.float32
    chosen = kernel_for(n, dtype)
    if not isinstance(chosen, Kernel):
        raise ValueError(f"{n} rows of {dtype} are solved in stages: see gpu_spectrum_stages.py")
    where = next(each for each in ("lanes", "registers", "shared") if f"_{each}" in chosen.name)
    return Shape(
        where,
        size,
        chosen.rows if where == "lanes" else -(-chosen.rows // 32),
        chosen.block // 32,
        registers(chosen.name),
        chosen.shared_bytes(n, dtype),
        barriers=2 if where == "shared" else 1,
        together=2 if where == "lanes" else 4,
        sums=1,
        reflector=REFLECTOR[size],
    )


def predicted(n: int, batch: int, size: int, spectra: int = 1) -> float:
    """Seconds that a batch takes by the package's kernel: one launch, one spectrum or two of a reduction, in
    which a reflector more brings the mean to the first unit vector."""
    shape = kernel(n, size)
    read = batch * n * n * size / LOADED
    reducing = shape.reducing(n, batch) * (1 + (spectra - 1) * 1.5 / n)  # its share of the n² / 3 of them all
    solved = reducing + spectra * shape.counting(n, batch, COUNTS[size])
    return LAUNCH + BEGIN + max(read, solved)


def by_ctypes(seconds: float) -> float:
    """What the prototypes' clock shows of a kernel that takes so long."""
    return max(CTYPES_LEAST, CTYPES + seconds)


def counter(n: int, size: int) -> Shape:
    """The prototypes' kernel of counts: several small matrices in a block, or part of a large one."""
    threads = 128 if n <= 64 else -(-n // -(-n // 128))
    return Shape("counts", size, 1, -(-threads // 32), 58 if size == 8 else 40, 8192)


def counting(n: int, batch: int, size: int, counts: float, even: bool = False) -> float:
    """Seconds of the prototypes' kernel of counts."""
    blocks = -(-batch // (128 // n)) if n <= 64 else batch * -(-n // 128)
    return counter(n, size).counting(n, blocks, counts, even)


def halvings(n: int, size: int) -> float:
    """Counts that a table of n points, or 128, and halving take."""
    return 1 + math.ceil(BITS[size] - math.log2(min(n, 128) + 1))


def validation() -> list[Row]:
    """Reductions and counts of the prototypes, in microseconds per matrix."""
    table, rows = measured(), []
    for size, n, batch, name, each in table["reductions"]:
        seconds = by_ctypes(prototype(name, n).reducing(n, batch))
        rows.append(Row(f"reduction, fp{8 * size}, {batch} of n={n}, {name}", each, 1e6 * seconds / batch))
    for size, n, batch, each in table["halvings"]:
        seconds = by_ctypes(counting(n, batch, size, halvings(n, size), even=True))
        rows.append(Row(f"counts by halving, fp{8 * size}, {batch} of n={n}", each, 1e6 * seconds / batch))
    for size, n, batch, each in table["interpolations"]:
        seconds = GRAPHED + counting(n, batch, size, COUNTS[size])
        name = f"counts by interpolation, fp{8 * size}, {batch} of n={n}"
        rows.append(Row(name, each, 1e6 * seconds / batch))
    return rows


def table() -> str:
    """What is printed of the package's kernels."""
    return beside_library("cusolver", predicted)


def beside_library(measured_as: str, seconds: Callable[[int, int, int], float]) -> str:
    """Microseconds per matrix, predicted, and how many times faster than cuSOLVER, as measured."""
    cells: dict[tuple[int, int], dict[int, str]] = {}
    for size, n, batch, library, wanted in measured()[measured_as]:
        each = 1e6 * seconds(n, batch, size) / batch
        aim = f" ({wanted:.3g})" if wanted else ""
        cells.setdefault((size, n), {})[batch] = f"{each:.3g}, {library / each:.1f}{aim}"
    lines = ["| rows | batch 64 | batch 400 | batch 2,048 |", "|---|---|---|---|"]
    for (size, n), row in cells.items():
        lines.append(f"| {n}, fp{8 * size} | {' | '.join(row.get(batch, '-') for batch in BATCHES)} |")
    return "\n".join(lines)


def main() -> None:
    print_beside("measured on an H100, us per matrix", validation())
    print("\nPREDICTED, not run on a GPU: microseconds per matrix by the package's kernels, how many times")
    print("faster that is than cuSOLVER, measured on an H100, and in brackets what was wanted\n")
    print(table())


if __name__ == "__main__":
    main()
