"""What the Triton block is predicted to take on an H100, over eager PyTorch.

    python benchmarks/gpu_block.py

No GPU is needed and none is used: every figure of the block is PREDICTED. A fused kernel is given the time of
its products, of the instructions of its other cores, counted per hidden unit and per number of the stream,
and of the bytes that it moves, one after the other; the prototypes, which were measured on an H100, are
reproduced so first. Those that are off by more than a quarter are marked.

Left out: what Python and the launches take, where that is longer than the kernels are. Whole probes are
predicted by `predict_gpu.py`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_clock
import torch
import torch.nn.functional as F
from gpu_clock import HALF, LEAST_KERNEL, PASS, Clock, Row, print_beside
from torch import Tensor

from rgfast.ops.residual_mlp.gpu.table import BACKWARD, FORWARD, STACK, WIDEST, Form, Tile

MEASURED = Path(__file__).with_name("h100_measured.json")
ROWS = 65536
MULTIPROCESSORS, SHARED, REGISTERS = 132, 227 << 10, 65536
# Products a second within a fused kernel (of 762e12 in a large GEMM), and instructions of single numbers: 128
# lanes on each multiprocessor at 1.7 GHz.
FUSED, LANES = 555e12, 28.8e12
# Until the first block of threads runs, and after the last.
START = 2.5e-6
# Instructions per number of the stream (its norm, its residual, its operand; more in two parts), and per
# hidden unit of a row: bias, scales, conversions and moves between registers. Fitted to the prototypes.
STREAM = {"plain": 10.0, "single": 13.0, "split": 13.0}
HIDDEN = {"plain": 8.0, "single": 5.0, "split": 11.0}
# Fresh sums: a number of the output is added up once for every block of hidden units.
PER_SUM = 2.0
# libdevice's erf, one by a table of the prototypes', and the two of gpu/elements.py.
ACTIVATION = {"relu": 0.0, "erf": 29.0, "mid": 16.5, "coarse": 8.0, "fine": 10.0}
# The backward pass: the slope beside the activation, and the norm's gradient.
SLOPE, GRADIENT = 10.0, 38.0
# A load or a store of a spilled register takes as long as four instructions of arithmetic. Per thread and
# block of hidden units, in the binaries of sm_90 by Triton 3.7.1.
SPILL = 4.0
SPILLED = {"backward single 256": 21, "backward split 256": 219}
PRODUCTS = {"plain": 1, "single": 1, "split": 3}
# The library's products whose sums run along all rows are cut into parts, added up by a second kernel.
LONG_SUM = 1e-5
TF32 = 396e12


@dataclass(frozen=True)
class Kernel:
    """A fused kernel over some rows: its form, width, tile, activation, and what it does beside the forward
    pass of one block. ``together`` blocks of threads share a multiprocessor."""

    form: Form
    d: int
    tile: Tile
    rows: int = ROWS
    activation: str = "coarse"
    layers: int = 1
    every_layer: bool = False
    backward: bool = False
    factors: bool = False  # of the weights' gradients, written
    spilled: int = 0
    together: int = 2

    @property
    def seconds(self) -> float:
        hidden, numbers = 4 * self.rows * self.d, self.rows * self.d
        products = (6 if self.backward else 4) * hidden * self.d * PRODUCTS[self.form] / FUSED
        each = HIDDEN[self.form] + ACTIVATION[self.activation] + SLOPE * self.backward
        if self.form != "plain":
            each += PER_SUM * self.d / self.tile.units
        products, each = self.repeated * products, self.repeated * each
        each += SPILL * self.spilled * 32 * self.tile.warps / (self.tile.rows * self.tile.units)
        per_number = STREAM[self.form] + GRADIENT * self.backward
        size = 2 if self.form == "plain" else 4
        moved = numbers * (3 if self.backward else 2) + numbers * (self.layers - 1) * self.every_layer
        moved += (numbers + 2 * hidden) * self.factors
        computing = self.layers * (products + (hidden * each + numbers * per_number) / LANES)
        return START + self.crowding * (computing + moved * size / PASS)

    @property
    def repeated(self) -> float:
        """How often a number is computed: a warp takes 16 rows, and one without any repeats another's, but
        four share 32 rows two by two."""
        if (self.tile.rows, self.tile.warps) == (32, 4):
            return 1.0
        return max(1.0, 16 * self.tile.warps / self.tile.rows)

    @property
    def crowding(self) -> float:
        """The time over that of multiprocessors which all have work to the end.

        With fewer blocks of threads than there is room for, one that is alone is not twice as fast.
        """
        blocks = -(-self.rows // self.tile.rows)
        at_once = MULTIPROCESSORS * self.together
        return max(1.0, at_once / blocks)


def together(tile: Tile, shared: int) -> int:
    """How many blocks of threads share a multiprocessor; more than two gain no more."""
    return max(1, min(2, SHARED // shared, REGISTERS // (256 * 32 * tile.warps)))


def shared_bytes(form: Form, d: int, tile: Tile) -> int:
    """About what a kernel asks for: a tile's weights, in as many copies as there are stages."""
    return tile.stages * 2 * 2 * (2 if form == "split" else 1) * d // tile.halves * tile.units


def ours(way: str, form: Form, d: int, rows: int = ROWS, **more: Any) -> Kernel:
    """The package's kernel with its tile for an H100."""
    tables = {"forward": FORWARD, "backward": BACKWARD, "stack": STACK}
    tile = tables[way]["h100", form][d]
    return Kernel(
        form, d, tile, rows,
        activation="fine" if form == "split" else "coarse",
        spilled=SPILLED.get(f"{way} {form} {d}", 0),
        together=together(tile, shared_bytes(form, d, tile)),
        **more,
    )  # fmt: skip


def _packing(form: Form, d: int) -> float:
    """Weights made ready; those of half-precision types that fill whole tiles are read where they lie."""
    return 0.0 if form == "plain" else max(LEAST_KERNEL, 8 * d * d * (4 + 2 * 2) / PASS)


def multiply(form: Form, d: int, rows: int) -> float:
    """Seconds of one of the library's products for a weight's gradient."""
    rate = {"plain": HALF, "single": TF32, "split": gpu_clock.FP32}[form]
    moved = 5 * rows * d * (2 if form == "plain" else 4)
    return LONG_SUM + max(moved / PASS, 8 * rows * d * d / rate)


def forward(form: Form, d: int, rows: int = ROWS) -> float:
    """Seconds of the forward pass."""
    if d <= WIDEST:
        return _packing(form, d) + ours("forward", form, d, rows).seconds
    # The norm, the activation, and in half precision the residual, which fp32's second product is added to.
    passes = 2 + 8 + 3 if form == "plain" else 3 + 8 + 1
    return passes * stream(form, d, rows) / PASS + products(form, d) * rows / ROWS


def stream(form: str, d: int, rows: int = ROWS) -> float:
    """Bytes of the residual stream."""
    return rows * d * (2.0 if form == "plain" else 4.0)


def stack(form: Form, d: int, rows: int, layers: int) -> float:
    """Seconds of blocks on top of each other whose outputs are all written: in one kernel if it can."""
    if d not in STACK["h100", form]:
        return layers * forward(form, d, rows)
    kernel = ours("stack", form, d, rows, layers=layers, every_layer=True)
    return layers * _packing(form, d) + kernel.seconds


def launches(form: Form, d: int, layers: int) -> int:
    """Of :func:`stack`."""
    if d in STACK["h100", form] and layers > 1:
        return 8  # six parameters are brought together, weights made ready, and the kernel
    # A kernel and its weights made ready, or two products with kernels before and between, and in half
    # precision after them.
    return layers * (1 + (form != "plain") if d <= WIDEST else 4 + (form == "plain"))


def both(form: Form, d: int) -> float:
    """Seconds of the forward pass and all gradients."""
    if d > WIDEST:
        # Through the activation, and through the norm.
        passes = (12 + 4) * stream(form, d) / PASS + 8 * LEAST_KERNEL
        return forward(form, d) + passes + products(form, d) + 2 * multiply(form, d, ROWS)
    kernel = ours("backward", form, d, backward=True, factors=True)
    size, numbers = 2 if form == "plain" else 4, ROWS * d
    sums = 5 * numbers * size / PASS + 8 * LEAST_KERNEL
    return forward(form, d) + _packing(form, d) + kernel.seconds + 2 * multiply(form, d, ROWS) + sums


def measured() -> dict[str, Any]:
    """What was measured on an H100 (the file says what of)."""
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return found


def _of(kind: str, form: str, d: int) -> float | None:
    """Measured seconds of eager PyTorch at a form's precision."""
    return next((us * 1e-6 for (f, at), us in measured()[kind] if (f, at) == (form, d)), None)


def products(form: str, d: int) -> float:
    """Seconds of a block's products: measured, and by the rate of the widest that was beyond that."""
    found = _of("block_products", form, d)
    return products(form, d // 2) * 4 if found is None else found


def eager_backward(form: Form, d: int) -> tuple[float, bool]:
    """Seconds of eager PyTorch's backward pass, and whether they were measured.

    In fp32 that of TF32 with products of fp32, or, where there is none, the model of torch's operators.
    """
    found = _of("block_eager_backward", form, d)
    if found is not None:
        return found, True
    single = _of("block_eager_backward", "single", d)
    if form == "split" and single is not None:
        return single + 2 * (products("split", d) - products("single", d)), False
    if form == "plain":
        return modeled_backward(d, torch.bfloat16), False
    return modeled_backward(d, torch.float32) + 2 * (products(form, d) - products("split", d)), False


def modeled_backward(d: int, dtype: torch.dtype) -> float:
    """Seconds of eager PyTorch's backward pass by its operators; below D = 256 far too few."""

    def meta(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)

    x, up, down = meta(ROWS, d), meta(4 * d, d), meta(d, 4 * d)
    norm, bias, high = meta(d), meta(d), meta(4 * d)
    y = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (d,), norm, bias), up, high)), down, bias)
    with Clock() as clock:
        torch.autograd.grad(y, [x, up, down, norm, bias, high], torch.empty_like(y))
    return clock.cost.seconds


def validation() -> list[Row]:
    """Every prototype of the block, and the widest of eager PyTorch's backward passes that is used."""
    table, rows = measured(), []
    for (form, d, tile, activation, layers, every, count, alongside), us in table["block"]:
        kernel = Kernel(
            form, d, Tile(*tile), count, activation, layers, every_layer=every, together=alongside
        )
        words = f"{form}, D={d}, {activation}, {count} rows"
        words += f", {layers} layers" * (layers > 1) + ", each written" * every
        rows.append(Row(words, us, 1e6 * kernel.seconds))
    for (d, tile, factors), us in table["block_backward"]:
        kernel = Kernel("plain", d, Tile(*tile), backward=True, factors=factors)
        words = f"backward, D={d}{', factors written' if factors else ''}"
        rows.append(Row(words, us, 1e6 * kernel.seconds))
    for (form, d), us in table["block_weights"]:
        rows.append(Row(f"weights' gradients, {form}, D={d}", us, 2e6 * multiply(form, d, ROWS)))
    (us,) = (us for (form, d), us in table["block_eager_backward"] if (form, d) == ("plain", 256))
    rows.append(Row("eager, backward, bf16, D=256", us, 1e6 * modeled_backward(256, torch.bfloat16)))
    return rows


NAMES: dict[Form, str] = {"plain": "bf16", "single": "TF32", "split": "fp32"}


def table() -> list[str]:
    """Rows of the block's table."""
    lines = []
    for form, name in NAMES.items():
        for d in (64, 128, 256, 512, 1024):
            bare = _of("block_eager", form, d)
            assert bare is not None
            took = forward(form, d)
            cells = [name, str(d), f"{1e6 * took:.0f}", f"{bare / took:.2f}"]
            back, known = eager_backward(form, d)
            more = both(form, d)
            cells += [f"{1e6 * more:.0f}", f"{(bare + back) / more:.1f}{'' if known else '*'}"]
            if d in STACK["h100", form]:
                kernel = ours("stack", form, d, layers=12)
                together = 12 * _packing(form, d) + kernel.seconds
                cells += [f"{12 * bare / together:.1f} ({12 * bare / stack(form, d, ROWS, 12):.1f})"]
            else:
                cells += ["-"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print_beside("measured on an H100, us", validation())
    print("\nPREDICTED, not run on a GPU: the block, 65,536 rows, H = 4 D, LayerNorm, exact GELU\n")
    head = ["products", "D", "forward, us", "over eager", "with gradients, us", "over eager"]
    head += ["twelve layers in one kernel, over eager (each written)"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    print("\n".join(table()))
    print("\n* eager PyTorch's backward pass was not measured\n")


if __name__ == "__main__":
    main()
