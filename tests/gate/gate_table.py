"""What compiled kernels take, the tables of what they should take, and the rules for any compiler."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ARCHITECTURES = (80, 90, 100)
REGISTERS = 65536  # of a multiprocessor, the same since sm_70
# Bytes of shared memory that a block can have.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_MOST_THREADS = 1024
_COLUMNS = "arch threads registers stack stores loads shared kernel"


class Taken(NamedTuple):
    """What a kernel takes; ``threads`` is the most that launch bounds allow, the last four are bytes."""

    threads: int
    registers: int
    stack: int
    stores: int  # of spilled registers
    loads: int
    shared: int


Kernels = dict[str, Taken]


@dataclass(frozen=True)
class Table:
    """What the kernels of one source take by a compiler, by architecture; ``sources`` is their digest."""

    compiler: str
    sources: str
    kernels: dict[int, Kernels]

    @classmethod
    def read(cls, path: Path) -> Table | None:
        if not path.exists():
            return None
        compiler, sources, columns, *rows = path.read_text(encoding="utf-8").splitlines()
        assert columns.split() == _COLUMNS.split(), f"{path} has other columns than '{_COLUMNS}'"
        kernels: dict[int, Kernels] = {arch: {} for arch in ARCHITECTURES}
        for row in rows:
            arch, *numbers, kernel = row.split(maxsplit=len(Taken._fields) + 1)
            kernels[int(arch)][kernel] = Taken(*map(int, numbers))
        return cls(compiler.removeprefix("compiler "), sources.removeprefix("sources "), kernels)

    def write(self, path: Path) -> None:
        widths = [max(6, len(word)) for word in _COLUMNS.split()[:-1]]
        lines = [f"compiler {self.compiler}", f"sources {self.sources}"]
        rows = [_COLUMNS.split()]
        for arch, kernels in self.kernels.items():
            rows += [[str(arch), *map(str, taken), name] for name, taken in sorted(kernels.items())]
        for *numbers, kernel in rows:
            padded = [number.rjust(width) for number, width in zip(numbers, widths, strict=True)]
            lines.append(" ".join([*padded, kernel]))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def listed_spills() -> dict[tuple[int, str], str]:
    """Spills that are known and stay, by architecture and kernel, with the reason."""
    lines = (HERE / "spills.txt").read_text(encoding="utf-8").splitlines()
    entries = [line.split(": ", 1) for line in lines if line and not line.startswith("#")]
    return {
        (int(arch), kernel): why for (arch, kernel), why in ((of.split(" ", 1), why) for of, why in entries)
    }


def faults(arch: int, kernels: Kernels, spills: dict[tuple[int, str], str]) -> list[str]:
    """What is wrong with compiled kernels by any compiler: they do not fit, or spill without being listed."""
    wrong = []
    for kernel, taken in kernels.items():
        where = f"sm_{arch} {kernel}"
        # Registers are given to warps, in steps of eight per thread.
        wanted = -(-taken.threads // 32) * 32 * (-(-taken.registers // 8) * 8)
        if wanted > REGISTERS:
            each = f"{taken.threads} threads of {taken.registers} registers"
            wrong.append(f"{where}: {each} are more than the {REGISTERS} registers of a multiprocessor")
        if taken.shared > SHARED[arch]:
            wrong.append(f"{where}: {taken.shared} bytes of shared memory, {SHARED[arch]} is the most")
        spilled = taken.stores + taken.loads
        if spilled and (arch, kernel) not in spills:
            wrong.append(f"{where}: {spilled} bytes of spills, which tests/gate/spills.txt does not list")
    return wrong


def differences(arch: int, kernels: Kernels, table: Table, compiler: str) -> list[str]:
    """Where compiled kernels differ from the table: which there are, and by its compiler what each takes."""
    wanted = table.kernels[arch]
    found = [
        f"sm_{arch} {kernel}: the table has it, the sources do not" for kernel in wanted.keys() - kernels
    ]
    found += [f"sm_{arch} {kernel}: it is not in the table" for kernel in kernels.keys() - wanted]
    if compiler == table.compiler:
        for kernel in sorted(kernels.keys() & wanted):
            for name, now, then in zip(Taken._fields, kernels[kernel], wanted[kernel], strict=True):
                if now != then:
                    found.append(f"sm_{arch} {kernel}: {name} {now}, in the table {then}")
    return found


def read(log: str, cubin: bytes) -> Kernels:
    """What every kernel takes, by what ``ptxas -v`` said and the machine code that it wrote."""
    kernels: Kernels = {}
    # Functions that a kernel calls follow it, with spills of their own.
    for part in log.split("Compiling entry function ")[1:]:
        name = re.match(r"'([^']+)'", part)
        used = re.search(r"Used (\d+) registers(.*)", part)
        properties = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        assert name is not None and used is not None and properties, part  # noqa: PT018 (one sentence says it)
        cumulative = re.search(r"(\d+) bytes cumulative stack", used[2])
        shared = re.search(r"(\d+) bytes smem", used[2])
        frames, stores, loads = (map(int, column) for column in zip(*properties, strict=True))
        kernels[name[1]] = Taken(
            threads=_launch_bounds(cubin).get(name[1], _MOST_THREADS),
            registers=int(used[1]),
            stack=int(cumulative[1]) if cumulative else max(frames),
            stores=sum(stores),
            loads=sum(loads),
            shared=int(shared[1]) if shared else 0,
        )
    return kernels


def _launch_bounds(cubin: bytes) -> dict[str, int]:
    """The most threads of a block, by kernel, of those that state it (``.maxntid``, ``.reqntid`` of PTX)."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + k * size) for k in range(count)]
    found = {}
    for at, _, _, _, begin, length in sections:
        start = sections[names][4] + at
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if name.startswith(".nv.info."):
            for key, value in _attributes(cubin[begin : begin + length]):
                if key in (0x05, 0x10):
                    x, y, z = struct.unpack("<3I", value)
                    found[name.removeprefix(".nv.info.")] = x * y * z
    return found


def _attributes(info: bytes) -> list[tuple[int, bytes]]:
    """Those that have a value of any length; the others have two bytes, or none."""
    found, at = [], 0
    while at < len(info):
        form, key, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:
            found.append((key, info[at : at + size]))
            at += size
    return found
