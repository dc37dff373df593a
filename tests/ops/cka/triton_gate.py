"""What the gate compiles of CKA in Triton, for architectures that need not be here.

Gram tiles and tiles of neighbors as the table has them for the architecture; rows are made ready from every
type.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rgfast.ops.cka.gpu import kernels, table
from rgfast.ops.residual_mlp.gpu.table import OPTIONS, group_of

SINGLE, DOUBLE, HALF = "*fp32", "*fp64", "*fp16"


class Entry(NamedTuple):
    """A kernel with everything that it is compiled with."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int
    arch: int


def entries(arch: int) -> Iterator[Entry]:
    """Every kernel of a call on an architecture."""
    group = group_of(divmod(arch, 10))
    rows = {"high": HALF, "low": HALF, "weights": SINGLE, "tiles": "*i64"}
    both = {"to_high": HALF, "to_low": HALF}
    for kernel, tiles, to in ((kernels.grams, table.GRAMS, both), (kernels.near, table.NEAR, {"to": DOUBLE})):
        side, warps, stages = tiles[group]
        cut = {"SIDE": side, "COLUMNS": table.COLUMNS, "STAGES": stages}
        yield Entry(kernel.__name__, kernel, rows | to, cut, warps, arch)
    spans = table.GRAMS[group].side ** 2 // table.SPAN
    span = {"GROUP": table.GROUP, "SPAN": table.SPAN, "SPANS": spans, "STEP": table.STEP}
    parts = {"high": HALF, "low": HALF, "to": DOUBLE}
    for one in (True, False):
        constants = span | {"ONE": one, "STAGES": table.STAGES}
        yield Entry(f"inner {'one group' if one else 'groups'}", kernels.inner, parts, constants, 4, arch)
    made = {"table": "*i64", "high": HALF, "low": HALF, "squares": SINGLE, "factors": SINGLE}
    for dtype in (tl.float32, tl.bfloat16, tl.float16):
        constants = {"DTYPE": dtype, "ROWS": table.ROWS, "COLUMNS": table.COLUMNS}
        yield Entry(f"prepare {dtype}", kernels.prepare, made, constants, 8, arch)
    sums = dict.fromkeys(("squares", "factors", "weights", "scales"), SINGLE)
    sums |= {"lengths": DOUBLE, "traces": DOUBLE, "fine": "*i8"}
    yield Entry("norms", kernels.norms, sums, {"ROWS": table.LONG}, 4, arch)
    lengths = {"lengths": DOUBLE, "scales": SINGLE, "to": DOUBLE}
    for near in (False, True):
        constants = {"NEAR": near, "GROUP": table.TOGETHER, "ROWS": table.LONG}
        yield Entry(f"pairs {'near' if near else 'all'}", kernels.pairs, lengths, constants, 4, arch)
    apart = {"apart": DOUBLE, "to": DOUBLE}
    yield Entry("gather", kernels.gather, apart, {"PARTS": table.PARTS, "ENTRIES": table.ENTRIES}, 4, arch)


def compiled(entry: Entry) -> Any:
    """The kernel, compiled; tensors start at multiples of 16 bytes."""
    signature = {
        name: "constexpr" if name in entry.constants else entry.pointers.get(name, "i32")
        for name in entry.kernel.arg_names
    }
    even = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(entry.kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(entry.kernel, signature, entry.constants, even)
    options = {"num_warps": entry.warps, **OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", entry.arch, 32), options=options)
