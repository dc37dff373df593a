"""Compiles the Triton block's kernels for architectures that are not here, and reads what they would take.

    python tests/ops/residual_mlp/triton_gate.py [--arch 80 90 100] [--only WORDS] [--limits]

One line per kernel, tile and architecture: registers, stack, shared memory, and the spills within the inner
loop, from the binary's code by the tools that Triton's wheel brings. With ``--limits`` the exit code is 1 if
one does not compile, does not fit, or spills more in its inner loop than ``SPILLS`` allows.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rgfast.ops.residual_mlp.gpu import backward, forward, passes
from rgfast.ops.residual_mlp.gpu.launch import OPTIONS
from rgfast.ops.residual_mlp.gpu.table import BACKWARD, FORWARD, Tile

GROUP_OF = {80: "a100", 86: "other", 90: "h100", 100: "b200"}
# Shared memory that a block may have, KiB.
SHARED = {80: 163, 86: 99, 90: 227, 100: 227}
# Loads and stores of spilled registers in the inner loop that are known of; none elsewhere. Of some thousand
# instructions there; tiles without them are half as large, and were slower as prototypes.
SPILLS = {
    "forward plain 256 sm_90": 30,
    "forward single 128 sm_90": 2,
    "forward split 128 sm_90": 12,
    "forward split 256 sm_90": 120,
    "backward split 256 sm_90": 120,
}
# What is not compiled for every tile: the other norms and activations, at sizes that are not whole tiles.
KINDS = (("rms", "relu"), ("none", "silu"), ("layer", "tanh"), ("rms", "gelu_tanh"))
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Entry(NamedTuple):
    """A kernel with everything that it is compiled with."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    arch: int


class Taken(NamedTuple):
    """What the code takes; ``spilled`` loads and stores of local memory are in the inner loop.

    ``tensor`` are columns of tensor memory, of which Blackwell has 512: with more there is no code.
    """

    registers: int
    stack: int
    shared: int
    spilled: int
    tensor: int


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
        "BM": tile.rows, "BH": tile.units, "STAGES": tile.stages,
    } | more  # fmt: skip
    names = set(kernel.arg_names)
    constants = {k: v for k, v in constants.items() if k in names}
    return {k: v for k, v in types.items() if k in names and k not in constants}, constants


def entries(arch: int) -> Iterator[Entry]:
    """Every kernel with every tile of the table for an architecture, and every kind of block with one."""
    group = GROUP_OF[arch]
    for way, kernel, table in (
        ("forward", forward.block, FORWARD),
        ("backward", backward.gradient, BACKWARD),
    ):
        for (of, form), tiles in table.items():
            for width, tile in tiles.items() if of == group else ():
                made = _block(kernel, form, width, tile)
                yield Entry(f"{way} {form} {width}", kernel, *made, tile.warps, arch)
        for norm, activation in KINDS:
            tile = table[group, "split"][64]
            absent = dict.fromkeys(("b1", "b2", "norm_weight", "norm_bias") if norm == "none" else ())
            made = _block(kernel, "split", 64, tile, D=50, H=200, NORM=norm, ACTIVATION=activation, **absent)
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
    types = {"sums": "*bf16", "b1": "*bf16", "numbers": "i64"}
    constants = {"H": 4096, "ACTIVATION": "gelu", "FINE": False, "CHUNK": 2048}
    yield Entry("activate 4096", passes.activate, types, constants, 4, arch)


def compiled(entry: Entry) -> Any:
    """The kernel, compiled; strides and pointers are multiples of 16, as they nearly always are."""
    signature = {name: entry.types.get(name, "constexpr") for name in entry.kernel.arg_names}
    even = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(entry.kernel.arg_names)
        if signature[name].startswith("*") or name == "row_stride"
    }
    source = ASTSource(entry.kernel, signature, entry.constants, even)
    options = {"num_warps": entry.warps, **OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", entry.arch, 32), options=options)


def taken(kernel: Any) -> Taken:
    """What a compiled kernel takes, by the tools of Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Taken(
        int(found[1]),
        int(found[2]),
        kernel.metadata.shared,
        spilled_in_loop(code),
        getattr(kernel.metadata, "tmem_size", 0) or 0,
    )


def spilled_in_loop(code: str) -> int:
    """Loads and stores of local memory in the shortest loop that multiplies on the tensor cores."""
    lines = code.splitlines()
    labels = {found[1]: at for at, line in enumerate(lines) if (found := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = []
    for at, line in enumerate(lines):
        found = re.search(r"BRA\S*\s.*`\((\.L_x_\d+)\)", line)
        if found and labels.get(found[1], at) < at:
            body = "\n".join(lines[labels[found[1]] : at])
            if re.search(r"\b(HGMMA|HMMA|UTCHMMA)\b", body):
                loops.append(body)
    return len(re.findall(r"\b(?:LDL|STL)\b", min(loops, key=len))) if loops else 0


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(GROUP_OF))
    parser.add_argument("--only", default="")
    parser.add_argument("--limits", action="store_true")
    chosen, failed = parser.parse_args(), 0
    for arch in chosen.arch:
        for entry in entries(arch):
            if chosen.only not in entry.name:
                continue
            began, problem = time.time(), ""
            try:
                found = taken(compiled(entry))
                allowed = SPILLS.get(f"{entry.name} sm_{arch}", 0)
                if found.shared > SHARED[arch] * 1024:
                    problem = f"more than {SHARED[arch]} KiB"
                elif found.tensor > 512:
                    problem = f"{found.tensor} columns of tensor memory"
                elif found.spilled > allowed:
                    problem = f"more than {allowed} spills"
                line = f"{found.registers} registers, {found.stack} B stack, {found.shared} B shared, "
                line += f"{found.spilled} spills in the loop"
            except Exception as error:  # any failure of the compiler is a result here
                line, problem = " ".join(str(error).split())[-200:], "does not compile"
            failed += bool(problem)
            print(f"sm_{arch} {entry.name:20} {line} ({time.time() - began:.1f} s) {problem}", flush=True)
    return int(chosen.limits and failed > 0)


if __name__ == "__main__":
    sys.exit(main())
