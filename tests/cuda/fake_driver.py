"""The library that stands for CUDA's driver, from Python, and fat binaries that hold nothing."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

from rgfast.runtime import cuda, known_answers

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def build(folder: Path, *more: str) -> Path:
    """Compile the library, which records and runs nothing, into ``folder``, with ``more`` sources."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "clang++"
    library = folder / "librgfast_fake_cuda.so"
    sources = [str(CSRC / "driver" / "tests" / name) for name in ("fake.cpp", *more)]
    words = [compiler, "-std=c++17", "-shared", "-fPIC", f"-I{CSRC}", *sources, "-o", str(library)]
    subprocess.run(words, check=True, timeout=200)
    return library


def install(monkeypatch: Any, library: Path | str, image: Path | None) -> Any:
    """Make ``rgfast.runtime.cuda`` open ``library`` and the file ``image``, for tensors on the CPU, too.

    With a library that runs kernels on the host's memory, these then compute.
    """
    monkeypatch.setenv("RGFAST_CUDA_DRIVER", str(library))
    monkeypatch.setattr(cuda, "_TYPES", {"cuda", "cpu"})
    monkeypatch.setattr(cuda, "_file", lambda: image)
    monkeypatch.setattr(cuda, "_opened", None)
    monkeypatch.setattr(known_answers, "_TRIED", {})
    return cuda


class Fake:
    """The state of the library in this process; see csrc/driver/tests/fake.hpp."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._library.fake_log.restype = ctypes.c_char_p

    def reset(self) -> None:
        self._library.fake_reset()

    def kernel(self, name: str, parameters: int, shared: int = 0) -> None:
        self._library.fake_kernel(name.encode(), parameters, shared)

    def set(self, **settings: int) -> None:
        for name, value in settings.items():
            self._library.fake_set(name.encode(), ctypes.c_int64(value))

    def fail(self, function: str, code: int) -> None:
        self._library.fake_fail(function.encode(), code)

    def lacks(self, function: str) -> None:
        self._library.fake_lacks(function.encode())

    def mistake(self, which: int) -> None:
        """Plant a mistake into the kernel that the library runs; see csrc/driver/tests/filling.cpp."""
        self._library.filling_mistake(which)

    def log(self, *names: str) -> list[dict[str, Any]]:
        """All calls since the last one of this, or those of the functions named."""
        calls = [json.loads(line) for line in self._library.fake_log().decode().splitlines()]
        return [each for each in calls if not names or each["call"] in names]


def fat_binary(cubins: tuple[int, ...] = (90,), ptx: tuple[int, ...] = (90,), release: str = "13.0") -> bytes:
    """A fat binary with images of these architectures, each of them a line of the compiler's that made it."""
    body = b""
    for kind, architectures in ((2, cubins), (1, ptx)):
        for architecture in architectures:
            text = (
                f"Cuda compilation tools, release {release}, V{release}.88 -arch sm_{architecture}".encode()
            )
            text += bytes(-len(text) % 8)
            body += struct.pack("<HHIQQIIIIIIQ", kind, 257, 64, len(text), 0, 0, architecture, 0, 0, 0, 0, 0)
            body += bytes(64 - 56) + text
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body
