"""What the gate compiles: every device source by nvcc, every room's list of Triton kernels by Triton."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from gate_table import ARCHITECTURES, HERE, ROOT, Kernels, Table, Taken, read

CUDA = ROOT / "csrc" / "cuda"
# As csrc/cuda/fatbin.cmake has them.
FLAGS = ("-std=c++17", "-O3")


@dataclass(frozen=True)
class Unit(ABC):
    """What is compiled in one go for an architecture, and has a table."""

    path: Path

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def compiler(self) -> str | None:
        """Name and version of the compiler that is here, None without one."""

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """All sources of the project that go into it."""

    @property
    def flags(self) -> str:
        return ""

    @abstractmethod
    def knows(self, arch: int) -> bool: ...

    @abstractmethod
    def compile(self, arch: int) -> Kernels:
        """Compile, however long it takes; RuntimeError with what the compiler says if it cannot."""

    @property
    def table(self) -> Path:
        return HERE / "tables" / f"{self.name}.txt"

    @property
    def digest(self) -> str:
        """Of sources and flags."""
        return _digest(self.files, self.flags)

    def compiled(self, arch: int) -> Kernels:
        """The same, unless these sources were compiled by this compiler before."""
        assert self.compiler is not None
        words = f"{self.name} {arch} {self.compiler} {self.digest}"
        kept = ROOT / "build" / "gate" / f"{_digest(list(HERE.glob('gate_*.py')), words)}.txt"
        table = Table.read(kept)
        if table is None:
            table = Table(self.compiler, self.digest, {arch: self.compile(arch)})
            table.write(kept)
        return table.kernels[arch]

    def matches(self, table: Table) -> bool:
        """Whether the table is of these sources."""
        return table.sources == self.digest


class DeviceSource(Unit):
    """A file of CUDA C++."""

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def compiler(self) -> str | None:
        return nvcc_version()

    @property
    def files(self) -> list[Path]:
        return included(self.path)

    @property
    def flags(self) -> str:
        return " ".join(FLAGS)

    def knows(self, arch: int) -> bool:
        return arch in nvcc_architectures()

    def compile(self, arch: int) -> Kernels:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            words = [
                "nvcc", *FLAGS, f"-I{ROOT / 'csrc'}", "-cubin", "-Xptxas=-v",
                f"-gencode=arch=compute_{arch},code=sm_{arch}", str(self.path), "-o", str(cubin),
            ]  # fmt: skip
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"nvcc does not compile {self.path.name} for sm_{arch}:\n{done.stderr}")
            return read(done.stderr, cubin.read_bytes())


class TritonRoom(Unit):
    """A room's list of Triton kernels, ``tests/ops/<op>/triton_gate.py``; gate_triton.py says what it has."""

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}.triton"

    @property
    def compiler(self) -> str | None:
        try:
            return f"triton {importlib.metadata.version('triton')}"
        except importlib.metadata.PackageNotFoundError:
            return None

    @property
    def files(self) -> list[Path]:
        return imported(self.path)

    def knows(self, arch: int) -> bool:
        return arch in ARCHITECTURES

    def compile(self, arch: int) -> Kernels:
        # A process of its own, since whether Triton compiles or interprets is settled when it is imported. A
        # cache of its own, since of what it finds there Triton does not say what it takes.
        with tempfile.TemporaryDirectory() as cache:
            env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
            done = subprocess.run(
                [sys.executable, HERE / "gate_triton.py", self.path, str(arch)],
                env=env | {"TRITON_CACHE_DIR": cache}, capture_output=True, text=True, check=False,
            )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"Triton does not compile {self.path} for sm_{arch}:\n{done.stderr}")
        return {name: Taken(**taken) for name, taken in json.loads(done.stdout.splitlines()[-1]).items()}


def units() -> list[Unit]:
    """All of the package."""
    sources = [DeviceSource(path) for path in sorted(CUDA.glob("*.cu")) if path.name != "kernels.cu"]
    return [*sources, *map(TritonRoom, sorted((ROOT / "tests" / "ops").glob("*/triton_gate.py")))]


def _digest(files: list[Path], words: str) -> str:
    sum_ = hashlib.sha256(words.encode())
    for file in sorted(files):
        content = file.read_bytes()
        sum_.update(f"\n{file.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return sum_.hexdigest()[:32]


def included(source: Path) -> list[Path]:
    """``source`` and all files of the project that it includes, on a GPU or off it."""
    found: dict[Path, None] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found[path] = None
            for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.M):
                places = [place for place in (path.parent / name, ROOT / "csrc" / name) if place.exists()]
                assert places, f"{path} includes {name}, which is in neither place"
                # The shim is for host compilers.
                if CUDA / "shim" not in places[0].parents:
                    waiting.append(places[0].resolve())
    return list(found)


def imported(listed: Path) -> list[Path]:
    """A list of Triton kernels and the modules that it imports from rooms' ``gpu``, theirs as well."""
    found: dict[Path, None] = {}
    waiting = [listed]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found[path] = None
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                of = str(node.module) if isinstance(node, ast.ImportFrom) else ""
                if re.fullmatch(r"rgfast\.ops\.\w+\.gpu", of):
                    names = [f"{of}.{alias.name}" for alias in node.names]
                elif re.fullmatch(r"rgfast\.ops\.\w+\.gpu\.\w+", of):
                    names = [of]
                else:
                    continue
                waiting += [ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names]
    return list(found)


@functools.cache
def nvcc_version() -> str | None:
    if shutil.which("nvcc") is None:
        return None
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    version = re.search(r"V(\d+\.\d+\.\d+)", done.stdout)
    assert version is not None, done.stdout
    return f"nvcc {version[1]}"


@functools.cache
def nvcc_architectures() -> list[int]:
    done = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return [int(arch) for arch in re.findall(r"compute_(\d+)", done.stdout)]
