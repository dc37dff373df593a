"""Planted faults for the gate, and what they should be; gate_triton.py says what such a list has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def shares(x, out, WIDTH: tl.constexpr):
    """A warp holds WIDTH numbers while it sums them up."""
    at = tl.arange(0, WIDTH)
    held = tl.load(x + at)
    total = tl.sum(held, 0)
    tl.store(out + at, held / total)


@dataclass(frozen=True)
class Entry:
    name: str
    width: int
    arch: int


def entries(arch: int) -> Iterator[Entry]:
    yield Entry("fits", 512, arch)
    yield Entry("spills", 8192, arch)


def compiled(entry: Entry) -> Any:
    types = {"x": "*fp32", "out": "*fp32", "WIDTH": "constexpr"}
    source = ASTSource(shares, types, {"WIDTH": entry.width})
    return triton.compile(source, target=GPUTarget("cuda", entry.arch, 32), options={"num_warps": 1})
