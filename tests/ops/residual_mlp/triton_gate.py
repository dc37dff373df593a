"""What the gate compiles of the Triton block, for architectures that need not be here.

Every kernel with every tile of the table at H = 4 D, and every kind of block with the narrowest tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rgfast.ops.residual_mlp.gpu import backward, forward, passes
from rgfast.ops.residual_mlp.gpu.table import BACKWARD, FORWARD, OPTIONS, STACK, Tile, group_of

# What is not compiled for every tile: the other norms and activations, at sizes that are not whole tiles.
KINDS = (("rms", "relu"), ("none", "silu"), ("layer", "tanh"), ("rms", "gelu_tanh"))


class Entry(NamedTuple):
    """A kernel with everything that it is compiled with."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    arch: int


def _block(
    kernel: Any, form: str, width: int, tile: Tile, **more: Any
) -> tuple[dict[str, str], dict[str, Any]]:
    """Types and constants of a kernel of ``form`` at H = 4 D; ``more`` constants replace them."""
    stream = "*bf16" if form == "plain" else "*fp32"
    operand = stream if form == "plain" else "*fp16"
    types = dict.fromkeys(("x", "y", "dy", "dx", "b1", "b2", "norm_weight", "norm_bias"), stream)
    types |= dict.fromkeys(("normed", "hidden", "slopes"), stream)
    types |= dict.fromkeys(("w1", "w1_low", "w2", "w2_low"), operand)
    types |= {"unit1": "*fp32", "unit2": "*fp32", "sums": "*fp32", "row_stride": "i32", "rows": "i32"}
    types |= {"eps": "fp32", "residual_scale": "fp32"}
    constants = {
        "D": width, "H": 4 * width, "HALF": width // tile.halves, "HALVES": tile.halves,
        "H_PADDED": 4 * width, "LAYERS": 1, "EVERY_LAYER": False, "W2_BY_UNIT": form != "plain",
        "NORM": "layer", "ACTIVATION": "gelu", "PRODUCTS": form,
        "BM": tile.rows, "BH": tile.units, "STAGES": tile.stages, "TMA": tile.tma,
    } | more  # fmt: skip
    names = set(kernel.arg_names)
    if constants["TMA"] and "TMA" in names:
        up = [tile.units, constants["HALF"]]
        down = up if constants["W2_BY_UNIT"] else up[::-1]
        for name, shape in (("w1", up), ("w1_low", up), ("w2", down), ("w2_low", down)):
            types[name] = f"tensordesc<{operand.removeprefix('*')}{shape}>"
    constants = {k: v for k, v in constants.items() if k in names}
    return {k: v for k, v in types.items() if k in names and k not in constants}, constants


def entries(arch: int) -> Iterator[Entry]:
    """Every kernel with every tile of the table for an architecture, and every kind of block with one."""
    group = group_of(divmod(arch, 10))
    several = {"LAYERS": 12, "EVERY_LAYER": True, "W2_BY_UNIT": True}
    for way, kernel, table, more in (
        ("forward", forward.block, FORWARD, {}),
        ("backward", backward.gradient, BACKWARD, {}),
        ("stack", forward.block, STACK, several),
    ):
        for (of, form), tiles in table.items():
            for width, tile in tiles.items() if of == group else ():
                made = _block(kernel, form, width, tile, **more)
                yield Entry(f"{way} {form} {width}", kernel, *made, tile.warps, arch)
        for norm, activation in KINDS:
            tile = table[group, "split"][64]
            absent = dict.fromkeys(("b1", "b2", "norm_weight", "norm_bias") if norm == "none" else ())
            made = _block(
                kernel, "split", 64, tile, D=50, H=200, NORM=norm, ACTIVATION=activation, **absent, **more
            )
            yield Entry(f"{way} {norm} {activation} 50", kernel, *made, tile.warps, arch)
    yield from _small(arch)


def _small(arch: int) -> Iterator[Entry]:
    strides = dict.fromkeys(("w1_layer", "w1_unit", "w1_column", "w2_layer", "w2_column", "w2_unit"), "i32")
    packed = {"high1": "*fp16", "low1": "*fp16", "high2": "*fp16", "low2": "*fp16"}
    types = {"w1": "*fp32", "w2": "*fp32", "unit1": "*fp32", "unit2": "*fp32"} | packed | strides
    constants = {"D": 256, "H": 1024, "D_PADDED": 256, "H_PADDED": 1024, "UNITS": 32, "PRODUCTS": "split"}
    yield Entry("pack split 256", forward.pack, types, constants, 4, arch)
    types = dict.fromkeys(("x", "normed", "start", "norm_weight", "norm_bias", "b2"), "*bf16")
    types |= {"row_stride": "i32", "eps": "fp32", "residual_scale": "fp32"}
    yield Entry("begin 1024", passes.begin, types, {"D": 1024, "D_PADDED": 1024, "NORM": "layer"}, 4, arch)
    types = {"sums": "*bf16", "b1": "*bf16", "hidden": "*bf16", "numbers": "i64"}
    constants = {"H": 4096, "ACTIVATION": "gelu", "FINE": False, "CHUNK": 2048}
    yield Entry("activate 4096", passes.activate, types, constants, 4, arch)
    types = {"sums": "*fp32", "b1": "*fp32", "gradient": "*fp32", "parts": "*fp32", "residual_scale": "fp32"}
    types |= {"rows": "i32", "each": "i32"}
    constants = {"H": 4096, "ACTIVATION": "gelu", "FINE": True, "BM": 16, "BC": 128}
    yield Entry("descend 4096", passes.descend, types, constants, 4, arch)
    types = dict.fromkeys(("x", "gradient", "dy", "dx", "norm_weight"), "*bf16") | {"parts": "*fp32"}
    types |= {"row_stride": "i32", "rows": "i32", "each": "i32", "eps": "fp32"}
    yield Entry("finish 1024", passes.finish, types, {"D": 1024, "D_PADDED": 1024, "NORM": "layer"}, 4, arch)


def compiled(entry: Entry) -> Any:
    """The kernel, compiled; strides and pointers are multiples of 16, as they nearly always are.

    AssertionError unless tensors are copied by their descriptors if and only if its tile says so.
    """
    signature = {name: entry.types.get(name, "constexpr") for name in entry.kernel.arg_names}
    even = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(entry.kernel.arg_names)
        if signature[name].startswith("*") or name == "row_stride"
    }
    source = ASTSource(entry.kernel, signature, entry.constants, even)
    options = {"num_warps": entry.warps, **OPTIONS}
    kernel = triton.compile(source, target=GPUTarget("cuda", entry.arch, 32), options=options)
    found = "cp.async.bulk.tensor" in kernel.asm["ptx"]
    assert found == entry.constants.get("TMA", False), f"{entry.name}: copies of tensors {found}"
    return kernel
