"""What the kernels of CKA are predicted to take on an H100, over the best of torch's routes.

    python benchmarks/predict_cka.py

No GPU is needed and none is used: every figure of our kernels is PREDICTED, by the model of
predict_moments.py with the instructions and registers of these kernels. It is first compared with kernels of
the same products that were measured, prototypes in Triton. Rows that are off by more than a quarter are
marked. Times are of whole calls: passes over the rows, products, torch's operators on small tensors,
launches, and the wait for the result. Torch's are measured, centering and products in fp64.
"""

from __future__ import annotations

import json
from dataclasses import replace
from unittest import mock

import torch
from gpu_clock import LEAST_KERNEL, PASS, Row, print_beside, timed
from predict_moments import (
    BARRIER,
    CACHE,
    CLOCK,
    DMMA,
    FP64,
    FROM_MEMORY,
    MEASURED,
    MMA,
    REGISTERS,
    SIDE,
    SMS,
    STEP,
    Block,
    exact,
    prototype,
    resident,
    seconds,
    tiles,
)

from rgfast.ops.cka import launches
from rgfast.ops.cka.call import Call
from rgfast.ops.cka.impl import cuda as kernels
from rgfast.ops.cka.sums import wanted_by
from rgfast.ops.device import LAUNCH, STREAM, WAIT, cache_bytes
from rgfast.ops.similarity import call as similarity
from rgfast.ops.similarity.impl import library

Shape = tuple[int, int, int, int]  # layers, positions, samples, features

# Whether neighbors, how many times faster than torch we want, and where its best route's time stands.
SHAPES: list[tuple[Shape, bool, float, str]] = [
    ((7, 64, 1024, 64), False, 2.2, "cka_by_features"),
    ((13, 32, 1024, 128), False, 2.1, "cka_by_features"),
    ((25, 16, 1024, 256), False, 2.9, "cka_by_samples"),
    ((49, 16, 1024, 256), True, 1.9, "neighbors_by_features"),
    ((24, 1, 256, 512), False, 1.0, "cka_at_one_position"),
]
# Clocks until a load from the second-level cache, its bytes per second and least load. Assumed.
FROM_CACHE, CACHE_RATE, SECTOR = 280, 5.5e12, 32
# Instructions of a warp, counted in the machine code for sm_90: for 16 features of a Gram tile beyond those
# of a moment's, and for a tile that is kept and compared with the one before.
MORE, KEPT = 50, 1000
# Entries that a warp multiplies at a time.
ENTRIES = 8
# Clocks of a thread for a pair of layers in the end: loads that wait for each other, roots and divisions.
FINISHED = 4000
# Of a jackknife, and orders of samples of a null, for two representations [n, d].
GROUPS, ORDERS = 8, 200
NULLS = [(1024, 64), (1024, 512), (4096, 256), (4096, 1024), (4096, 2048)]


def gram(*, diagonal: bool) -> Block:
    """A whole Gram tile: rows lose the rounding of their mean as well."""
    one = exact(SIDE, SIDE, diagonal=diagonal)
    again = (1 if diagonal else 2) * SIDE * STEP / FP64
    return replace(
        one,
        products=tuple(each + again for each in one.products),
        issue=tuple(each + MORE for each in one.issue),
    )


def strips_of_samples(n: int, groups: int = 1) -> list[Block]:
    """All Gram tiles of a layer at a position."""
    count, side = launches.sample_tiles(n, groups), launches._strips(n, groups) * groups
    return [gram(diagonal=True)] * side + [gram(diagonal=False)] * (count - side)


def cross(width: int, layers: int, *, near: bool) -> list[Block]:
    """Tiles of cross moments of all pairs of layers at a position."""
    pairs = layers - 1 if near else layers * (layers - 1) // 2
    return tiles(width) * layers + [exact(SIDE, SIDE, diagonal=False)] * (pairs * (-(-width // SIDE)) ** 2)


def products_of_layers(layers: int, spans: int) -> float:
    """Seconds for so many spans of entries, every layer by every other."""
    groups = -(-layers // launches._GROUP)
    wide = -(-layers // 8)
    # Blocks of 16 x 8 layers on and above the diagonal; four warps have a tensor core each.
    mmas = sum(max(0, wide - 2 * down) for down in range(-(-layers // 16)))
    blocks = spans * groups * (groups + 1) // 2
    held = resident("rgfast_cka_inner", shared=launches._INNER_SHARED)
    steps = launches._SPAN // launches._WARPS // ENTRIES
    each = 2 * mmas * spans / blocks * MMA / DMMA
    most = -(-blocks // SMS)
    clocks = sum(
        steps * max(count * each, FROM_CACHE) + 4 * BARRIER + 2 * FROM_CACHE
        for count in [held] * (most // held) + [most % held] * (most % held > 0)
    )
    return LEAST_KERNEL + max(
        clocks / CLOCK, spans * launches._SPAN * layers * 8 * (groups + 1) / 2 / CACHE_RATE
    )


def collected(count: int, turns: int = 1) -> float:
    """Seconds for adding up what so many tiles left, by warps that have every fourth."""
    return turns * (LEAST_KERNEL + -(-count // launches._WARPS) * FROM_CACHE / CLOCK)


def by_features(shape: Shape, *, near: bool, groups: int = 1) -> float:
    """Seconds of the squares of cross moments."""
    layers, positions, n, width = shape
    blocks = cross(width, layers, near=near)
    moved = 4.0 * layers * positions * n * width
    if groups > 1:
        held = resident("rgfast_cka_left_out_float32", shared=launches._LEFT_OUT_SHARED)
        rows = n + groups * -(-n // groups // STEP) * STEP
        # Every variant begins with a load and ends with squares.
        ends = (1 + groups) * (2 * FROM_MEMORY + KEPT)
        return seconds(positions, rows, blocks, held, 2 * moved, ends=ends, launch=LEAST_KERNEL)
    held = resident("rgfast_cka_squares_float32")
    return seconds(positions, n, blocks, held, moved, ends=4 * BARRIER, launch=LEAST_KERNEL)


def by_samples(shape: Shape, *, near: bool, groups: int = 1) -> float:
    """Seconds of Gram tiles and of the products of layers over them."""
    layers, positions, n, width = shape
    blocks, count = strips_of_samples(n, groups), launches.sample_tiles(n, groups)
    if near:
        held = resident("rgfast_cka_near_float32", shared=launches._NEAR_SHARED)
        runs = -(-6 * SMS // (positions * count))
        run = max(launches._RUN, -(-layers // runs))
        again = layers + -(-layers // run) - 1
        return seconds(positions * again, width, blocks, held, 0.0, ends=KEPT, launch=2 * LEAST_KERNEL)
    held = resident("rgfast_cka_grams_float32", shared=launches._GRAM_SHARED)
    some, side = launches.chunk(layers, n, groups)
    some = min(some, positions)
    ends = SIDE * SIDE * 8 / CACHE + BARRIER
    found = 0.0
    for start in range(0, positions, some):
        here = min(some, positions - start)
        for first in range(0, count, side):
            now = min(side, count - first)
            found += seconds(
                here * layers, width, blocks[count - now :], held, 0.0, ends=ends, launch=LEAST_KERNEL
            )
            found += products_of_layers(layers, here * now * SIDE * SIDE // launches._SPAN)
    turns = -(-positions // some) * -(-count // side) if groups > 1 else 1
    return found + collected(side, turns)


def call_of(shape: Shape, *, near: bool, groups: int = 1) -> Call:
    """The call, of layers without data."""
    layers, positions, n, width = shape
    rows = tuple(torch.empty(positions, n, width, dtype=torch.float32, device="meta") for _ in range(layers))
    if groups > 1:
        return Call("alignment", ("layers",), rows, options=(("adjacent", near), ("groups", groups)))
    options = (("debiased", False), *(() if near else (("sample_limit", 4096),)))
    return Call("drift" if near else "matrix", ("layers",), rows, options=options)


def whole(shape: Shape, *, near: bool, samples: bool | None = None, groups: int = 1) -> float:
    """Seconds of a call, by the way that it takes unless ``samples`` says which."""
    layers, positions, n, width = shape
    call = call_of(shape, near=near, groups=groups)
    samples = kernels._takes_samples(call) if samples is None else samples
    with (
        mock.patch.object(launches.cuda, "launch") as launched,
        mock.patch.object(kernels, "_takes_samples", return_value=samples),
    ):
        around = timed(lambda: kernels._computed(call))
    rows, variants = 4.0 * layers * positions * n * width, kernels._variants(groups)
    # Means and norms, sums of groups and products with them, and sums of products of norms per pair.
    passes = (2 if groups == 1 else 4) * (LEAST_KERNEL + rows / PASS)
    pairs = wanted_by(call).pairs
    read = 16.0 + 32.0 * (variants - 1)
    passes += LEAST_KERNEL + read * positions * pairs * n / CACHE_RATE
    # Four blocks on a multiprocessor, by registers.
    turns = -(-positions * variants // (4 * SMS))
    passes += LEAST_KERNEL + turns * -(-pairs // launches.THREADS) * FINISHED / CLOCK
    products = (by_samples if samples else by_features)(shape, near=near, groups=groups)
    host = around.host + LAUNCH * launched.call_count
    return max(host, passes + products + around.device) + WAIT


def validation() -> list[tuple[str, float, float]]:
    """The prototypes: what was measured and what the model gives, in milliseconds."""
    data = json.loads(MEASURED.read_text(encoding="utf-8"))
    measured = data["cka_in_triton"]
    held = REGISTERS // (128 * (-(-data["moments_in_triton"]["registers"] // 8) * 8))
    found = []
    for (layers, positions, n, width), ms in measured["features"]:
        blocks = [prototype()] * len(cross(width, layers, near=layers == 49))
        moved = 4.0 * layers * positions * n * width
        model = seconds(positions, n, blocks, held, moved, ends=4 * BARRIER)
        found.append((f"features, {(layers, positions, n, width)}", ms, 1e3 * model))
    for (layers, positions, n, width), size, ms in measured["grams"]:
        count = launches.sample_tiles(n)
        moved = layers * positions * (4.0 * n * width + count * SIDE * SIDE * size)
        ends = SIDE * SIDE * size / CACHE + BARRIER
        model = seconds(layers * positions, width, [prototype()] * count, held, moved, ends=ends)
        found.append((f"Gram tiles, {size} bytes, {(layers, positions, n, width)}", ms, 1e3 * model))
    for (layers, positions, n, width), size, ms in measured["products_of_layers"]:
        model = LAUNCH + layers * positions * launches.sample_tiles(n) * SIDE * SIDE * size / STREAM
        found.append((f"products of layers from memory, {(layers, positions, n, width)}", ms, 1e3 * model))
    return found


def predictions() -> list[tuple[Shape, bool, float, float, bool, float]]:
    """Shape, whether neighbors, torch's milliseconds and ours, whether by samples, and the ratio wanted."""
    data = json.loads(MEASURED.read_text(encoding="utf-8"))
    found = []
    for shape, near, wanted, route in SHAPES:
        rows = data[route] if route == "cka_at_one_position" else (*data["center"], *data[route])
        theirs = sum(sum(ms) for given, *ms in rows if tuple(given) == shape)
        samples = kernels._takes_samples(call_of(shape, near=near))
        found.append((shape, near, theirs, 1e3 * whole(shape, near=near), samples, wanted))
    return found


def over_pytorch_cka() -> tuple[Shape, float]:
    """A shape, and how many times faster than pytorch-cka, which goes position by position."""
    data = json.loads(MEASURED.read_text(encoding="utf-8"))
    ((layers, measured, n, width), ms), positions = data["pytorch_cka"][0], SHAPES[0][0][1]
    shape = layers, positions, n, width
    return shape, ms * positions / measured / (1e3 * whole(shape, near=False))


def jackknives() -> list[tuple[Shape, bool, float, float, bool, float]]:
    """Shape, whether neighbors, milliseconds of both ways, whether by samples, and those of a call alone."""
    found = []
    for shape, near, *_ in SHAPES:
        by = (1e3 * whole(shape, near=near, samples=way, groups=GROUPS) for way in (False, True))
        samples = kernels._takes_samples(call_of(shape, near=near, groups=GROUPS))
        found.append((shape, near, *by, samples, 1e3 * whole(shape, near=near)))
    return found


def nulls() -> list[tuple[int, int, str, float, float]]:
    """n, d, the way, milliseconds of a value with its null, and of as many calls."""
    found = []
    for n, d in NULLS:
        x = torch.empty(n, d, dtype=torch.float32, device="meta")
        orders = torch.empty(1 + ORDERS, n, dtype=torch.int64, device="meta")
        call = similarity.Call("cka", (x,), (x,), orders, (("debiased", True),))
        features = library._features_pay(call, n)
        cost = timed(lambda call=call: library.SIMILARITY.run(call))
        # Of a kernel every entry that is looked up moves a sector of the cache, or of memory.
        rate = CACHE_RATE if 8 * n * n <= cache_bytes(call.device) else STREAM
        looked_up = 0.0 if features else (1 + ORDERS) * n * n / 2 * SECTOR / rate
        both = 1e3 * (max(cost.host, cost.device + looked_up) + WAIT)
        found.append(
            (
                n,
                d,
                "features" if features else "kernels",
                both,
                (1 + ORDERS) * 1e3 * whole((2, 1, n, d), near=False),
            )
        )
    return found


def main() -> None:
    """The tables."""
    print_beside("Triton's, measured on an H100, ms", (Row(*each) for each in validation()))
    print("\nPREDICTED, not run on a GPU: exact CKA of rows in fp32, centering included, ms\n")
    head = "[L, T, n, d]", "torch, measured", "by features", "by samples", "taken", "times faster", "wanted"
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for shape, near, theirs, ours, samples, wanted in predictions():
        both = (1e3 * whole(shape, near=near, samples=way) for way in (False, True))
        name = f"{list(shape)}{', neighbors' if near else ''}"
        ways = " | ".join(f"{ms:.3g}" for ms in both)
        taken = "samples" if samples else "features"
        print(f"| {name} | {theirs:.3g} | {ways} | {taken} | {theirs / ours:.1f} | {wanted} |")
    shape, times = over_pytorch_cka()
    print(
        f"\nPREDICTED: {times:.0f} times as fast as pytorch-cka at {list(shape)}, measured at fewer positions"
    )
    print(f"\nPREDICTED, not run on a GPU: the same, and without each of {GROUPS} groups of samples, ms\n")
    head = (
        f"without each of {GROUPS} groups",
        "by features",
        "by samples",
        "taken",
        "over none",
        f"{GROUPS + 1} calls over it",
    )
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for shape, near, *ways, samples, alone in jackknives():
        name = f"{list(shape)}{', neighbors' if near else ''}"
        both, ours = " | ".join(f"{ms:.3g}" for ms in ways), ways[samples]
        taken, apart = "samples" if samples else "features", (GROUPS + 1) * alone / ours
        print(f"| {name} | {both} | {taken} | {ours / alone:.1f} | {apart:.1f} |")
    print(f"\nPREDICTED, not run on a GPU: CKA in {1 + ORDERS} orders of samples, by the library, ms\n")
    head = f"[n, d], {ORDERS} orders", "by", "ms", f"{1 + ORDERS} calls", "times faster"
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for n, d, by, ours, calls in nulls():
        print(f"| {[n, d]} | {by} | {ours:.3g} | {calls:.3g} | {calls / ours:.1f} |")


if __name__ == "__main__":
    main()
