"""The kernels of csrc/cuda on this processor, behind a library that stands for CUDA's driver and runs them.

The way of a call is the package's own: a room's implementation, ``rgfast.runtime.cuda``, ``_native``, the
driver's functions, the kernel. Only the memory is the host's.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_driver
import pytest
import torch
from fake_driver import Fake, fat_binary

from rgfast.dispatch import Op

ROOT = Path(__file__).resolve().parents[2]


def build() -> Path:
    """Compile what has changed since it was last built, and return the library."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    ninja = shutil.which("ninja", path=path)
    assert cmake is not None, "cmake is in the dev extra"
    assert ninja is not None, "ninja is in the dev extra"
    folder = ROOT / "build" / "emulated"
    configure = [
        cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DRGFAST_TESTS=ON", "-DRGFAST_CUDA_ARCHS=none", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in two processes
        for words in (configure, [cmake, "--build", folder, "--target", "rgfast_fake_cuda"]):
            done = subprocess.run(words, capture_output=True, text=True, timeout=500, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder / "librgfast_fake_cuda.so"


class EmulatedGpu(Fake):
    """The library in this process: what :class:`Fake` has, and running."""

    device = torch.device("cpu")  # whose tensors stand for those of the GPU

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(path)
        self._monkeypatch = monkeypatch
        self._library.emulated_kernels.restype = ctypes.c_char_p

    def kernels(self) -> list[str]:
        """The names of all kernels that can be run."""
        names: bytes = self._library.emulated_kernels()
        return names.decode().split()

    def seed(self, seed: int) -> None:
        """Shuffle threads and blocks of the next launch by ``seed``, of the one after it by ``seed + 1``."""
        self._library.emulated_seed(ctypes.c_uint64(seed))

    def admit(self, *ops: Op) -> None:
        """Let the implementations ``"cuda"`` of these ops run tensors of the CPU until the test ends."""
        for op in ops:
            impl = op.impls["cuda"]
            here = dataclasses.replace(impl, devices=(*(impl.devices or ()), self.device.type))
            self._monkeypatch.setitem(op.impls, "cuda", here)
            self._monkeypatch.setattr(op, "_chosen", {})


def install(library: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> EmulatedGpu:
    """``rgfast.runtime.cuda`` opens ``library`` until the test ends, and takes tensors of the CPU."""
    gpu = EmulatedGpu(library, monkeypatch)
    gpu.reset()
    gpu.seed(0)
    image = folder / "emulated.fatbin"
    image.write_bytes(fat_binary())
    fake_driver.install(monkeypatch, gpu.path, image)
    return gpu
