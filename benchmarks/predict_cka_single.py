"""What CKA in single precision, in Triton, is predicted to take on an H100, over the best of torch's routes.

    python benchmarks/predict_cka_single.py

No GPU is needed and none is used: every figure of our kernels is PREDICTED. Programs for a Gram tile take
turns on the multiprocessors; a step through 64 features takes as long as its products, or as its bytes from
the second-level cache, which all programs share: on an H100 these bind. The model is first compared with
prototypes that were measured, among them whole calls. Rows that are off by more than a quarter are marked.
Times are of whole calls: rows made ready, products, torch's operators on small tensors, launches, and the
wait for the result. Torch's are measured, centering and products in fp64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from gpu_clock import HALF, LEAST_KERNEL, PASS, Row, print_beside, timed
from predict_moments import CACHE, CLOCK, FP64, MEASURED, SMS

from rgfast.ops.cka.call import Call
from rgfast.ops.cka.gpu import kernels as on_gpu
from rgfast.ops.cka.gpu.table import COLUMNS, GRAMS
from rgfast.ops.cka.impl import triton as implementation
from rgfast.ops.device import STREAM, WAIT

Shape = tuple[int, int, int, int]  # layers, positions, samples, features

# Whether neighbors, how many times faster than torch we want, and where its best route's time stands.
SHAPES: list[tuple[Shape, bool, float | None, str]] = [
    ((7, 64, 1024, 64), False, None, "cka_by_features"),
    ((13, 32, 1024, 128), False, None, "cka_by_features"),
    ((25, 16, 1024, 256), False, 4.5, "cka_by_samples"),
    ((49, 16, 1024, 256), True, 3.0, "neighbors_by_features"),
]
# Bytes per second of the second-level cache, clocks until a load from it, and seconds that the host takes to
# launch a kernel of Triton. Assumed.
CACHE_RATE, FROM_CACHE, TRITON_LAUNCH = 5.5e12, 280, 1e-5
# Products of a multiprocessor per clock in half precision, in large products of the library.
PER_CLOCK = HALF / (2 * SMS * CLOCK)
# Clocks for sums over a tile of neighbors, by its multiplications and additions.
KEPT = 500


def step_clocks(side: int, busy: int, strips: float) -> float:
    """Clocks of a program's step through some features if so many multiprocessors are busy."""
    products = 3 * side**2 * COLUMNS / PER_CLOCK
    moved = strips * 4 * side * COLUMNS  # in two parts
    return max(products, moved / CACHE, busy * moved * CLOCK / CACHE_RATE)


def turns(
    programs: int, side: int, steps: float, strips: float = 2.0, once: float = 0.0, written: float = 0.0
) -> float:
    """Seconds of programs with a multiprocessor each: steps through so many strips of samples on average,
    clocks for all else, and bytes at the end."""

    def turn(busy: int) -> float:
        last = max(written / CACHE, busy * written * CLOCK / CACHE_RATE)
        clocks = steps * step_clocks(side, busy, strips) + once + 4 * FROM_CACHE + last
        return clocks / CLOCK if busy else 0.0

    return programs // SMS * turn(SMS) + turn(programs % SMS)


def tiles_of(n: int, side: int) -> int:
    """Gram tiles of a layer at a position."""
    strips = -(-n // side)
    return strips * (strips + 1) // 2


def strips_of(padded: int, side: int) -> float:
    """How many strips of samples are read for a tile on average: on the diagonal it is one."""
    return 2 - padded // side / tiles_of(padded, side)


class Launches:
    """Seconds of the package's kernels, by what they are launched with."""

    def __init__(self) -> None:
        self.count, self.device = 0, 0.0

    def add(self, name: str, grid: tuple[int, ...], given: Any, options: dict[str, Any]) -> None:
        self.count += 1
        self.device += LEAST_KERNEL + float(getattr(self, name)(grid, *given, **options))

    def prepare(self, grid: Any, words: Any, high: Any, low: Any, *rest: Any, **options: Any) -> float:
        positions, n, padded, layers, blocks = rest[-5:]
        read, written = (4.0 * positions * layers * rows * blocks * COLUMNS for rows in (n, padded))
        return (read + written) / PASS + read / CACHE_RATE

    def norms(self, grid: Any, squares: Any, *rest: Any, **options: Any) -> float:
        return 4.0 * squares.numel() / CACHE_RATE + 4 * FROM_CACHE / CLOCK

    def pairs(
        self, grid: Any, lengths: Any, scales: Any, to: Any, padded: int, *rest: Any, **options: Any
    ) -> float:
        positions, layers = grid
        rows = positions * padded * (2 * layers if options["NEAR"] else layers * (layers + 1) / 2)
        return max(8.0 * rows / CACHE_RATE, rows / (SMS * FP64 * CLOCK))

    def grams(self, grid: Any, *given: Any, **options: Any) -> float:
        side, (padded, blocks) = options["SIDE"], given[-4:-2]
        return turns(math.prod(grid), side, blocks, strips_of(padded, side), written=4.0 * side**2)

    def near(self, grid: Any, *given: Any, **options: Any) -> float:
        padded, layers, blocks, _, run = given[-5:]
        side, each = options["SIDE"], min(run + 1, layers)
        return turns(math.prod(grid), side, each * blocks, strips_of(padded, side), once=KEPT * each)

    def inner(self, grid: Any, high: Any, *given: Any, **options: Any) -> float:
        layers, (spans, groups) = high.shape[1], grid
        read = 4.0 * options["SPAN"] * (layers if options["ONE"] else 2 * options["GROUP"])
        return spans * groups * (read + 8.0 * min(layers, options["GROUP"]) ** 2) / CACHE_RATE

    def gather(self, grid: Any, apart: Any, *given: Any, **options: Any) -> float:
        return 8.0 * apart.numel() / CACHE_RATE + 4 * FROM_CACHE / CLOCK


@contextmanager
def counted() -> Iterator[Launches]:
    """Launches of the package's kernels are counted, and none is made."""
    found = Launches()
    with mock.patch.multiple(on_gpu, **{name: Kernel(name, found) for name in on_gpu.__all__}):
        yield found


class Kernel:
    """In place of a kernel."""

    def __init__(self, name: str, found: Launches) -> None:
        self.name, self.found = name, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given, **options: self.found.add(self.name, grid, given, options)


def call_of(shape: Shape, *, near: bool) -> Call:
    """The call, of layers without data."""
    layers, positions, n, width = shape
    rows = tuple(torch.empty(positions, n, width, dtype=torch.float32, device="meta") for _ in range(layers))
    options = (("debiased", False), ("precision", "single"))
    return Call("drift" if near else "matrix", ("layers",), rows, options=options)


def whole(shape: Shape, *, near: bool) -> float:
    """Seconds of a call."""
    with counted() as ours:
        around = timed(lambda: implementation._computed(call_of(shape, near=near)))
    return max(around.host + TRITON_LAUNCH * ours.count, around.device + ours.device) + WAIT


def validation() -> list[tuple[str, float, float]]:
    """The prototypes: what was measured and what the model gives, in milliseconds."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))["cka_split_in_triton"]
    side = GRAMS["h100"].side

    def bytes_of(shape: Shape) -> float:
        return 4.0 * math.prod(shape)

    def grams(shape: Shape) -> float:
        layers, positions, n, width = shape
        programs = layers * positions * tiles_of(n, side)
        return LEAST_KERNEL + turns(programs, side, width / COLUMNS, written=4.0 * side**2)

    def products(shape: Shape, size: int) -> float:
        layers, positions, n, _ = shape
        return LEAST_KERNEL + size * side**2 * layers * positions * tiles_of(n, side) / STREAM

    def neighbors(shape: Shape) -> float:
        layers, positions, n, width = shape
        steps = layers * width / COLUMNS
        return LEAST_KERNEL + turns(positions * tiles_of(n, side), side, steps, once=KEPT * layers)

    found = []
    for shape, ms in measured["parts"]:
        found.append((f"rows in two parts, {tuple(shape)}", ms, LEAST_KERNEL + 2 * bytes_of(shape) / PASS))
    for shape, columns, ms in measured["grams"]:
        found.append((f"Gram tiles, {columns} features at a time, {tuple(shape)}", ms, grams(shape)))
    for shape, size, ms in measured["products_of_layers"]:
        found.append((f"products of layers from memory, {tuple(shape)}", ms, products(shape, size)))
    for shape, ms in measured["neighbors"]:
        found.append((f"neighbors, {tuple(shape)}", ms, neighbors(shape)))
    for shape, ms in measured["whole"]:
        # Rows are read twice for means and norms, then read and written in two parts.
        passes = 2 * LEAST_KERNEL + 4 * bytes_of(shape) / PASS
        near = shape[0] == 49
        rest = neighbors(shape) if near else grams(shape) + products(shape, 4)
        found.append((f"the whole, {tuple(shape)}", ms, passes + rest))
    return [(name, ms, 1e3 * model) for name, ms, model in found]


def predictions() -> list[tuple[Shape, bool, float, float, float | None]]:
    """Shape, whether neighbors, torch's milliseconds and ours, and the ratio wanted."""
    data = json.loads(MEASURED.read_text(encoding="utf-8"))
    found = []
    for shape, near, wanted, route in SHAPES:
        theirs = sum(ms for key in ("center", route) for given, ms in data[key] if tuple(given) == shape)
        found.append((shape, near, theirs, 1e3 * whole(shape, near=near), wanted))
    return found


def main() -> None:
    """The tables."""
    print_beside("Triton's prototypes, measured on an H100, ms", (Row(*each) for each in validation()))
    print("\nPREDICTED, not run on a GPU: single precision of rows in fp32, centering included, ms\n")
    head = "which, [L, T, n, d]", "torch, measured", "ours", "times faster", "wanted"
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for shape, near, theirs, ours, wanted in predictions():
        which = f"{'neighbors' if near else 'all pairs'} {list(shape)}"
        print(f"| {which} | {theirs:.3g} | {ours:.3g} | {theirs / ours:.1f} | {wanted or ''} |")


if __name__ == "__main__":
    main()
