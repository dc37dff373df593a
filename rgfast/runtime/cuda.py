"""Kernels of the package on a GPU: why they cannot run, and running them on torch's current stream.

They lie in one file beside the compiled module, which loads it through the GPU's driver at the first use; the
CUDA runtime that torch came with plays no part. Every parameter of a kernel is 8 bytes: an address, an int64
or a double.

Environment: ``RGFAST_CUDA_DRIVER`` names another library than ``libcuda.so.1`` to open as the driver.
"""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgfast.runtime import fatbin, native

__all__ = [
    "architecture",
    "capturing",
    "device_refusal",
    "facts",
    "images",
    "is_gpu",
    "launch",
    "missing",
    "multiprocessors",
    "refusal",
    "shared_bytes",
    "single_to_double",
    "version",
]

_SWITCH, _DRIVER, _FILE = "RGFAST_CUDA_DRIVER", "libcuda.so.1", "_kernels.fatbin"
_NO_FILE = "the package was built without kernels for GPUs, for which it takes nvcc"

# Tests add the CPU, whose tensors a library that stands for the driver can run kernels on.
_TYPES = {"cuda"}
_LOCK = threading.Lock()


class _Opened(NamedTuple):
    driver: Any  # rgfast._native.CudaDriver, or None
    reason: str | None


_opened: _Opened | None = None


def _file() -> Path | None:
    """The fat binary, which is installed where the compiled module is."""
    if native.unavailable_reason() is not None:
        return None
    path = Path(str(native.load().__file__)).with_name(_FILE)
    return path if path.exists() else None


def images() -> fatbin.Images | None:
    """What the package's kernels are compiled for, None without them."""
    path = _file()
    return None if path is None else _read(path)


@functools.lru_cache
def _read(path: Path) -> fatbin.Images:
    return fatbin.read(path.read_bytes())


def _open() -> _Opened:
    global _opened
    if _opened is None:
        with _LOCK:
            _opened = _opened or _attempt()
    return _opened


def _attempt() -> _Opened:
    reason = native.unavailable_reason()
    if reason is not None:
        return _Opened(None, reason)
    path, held = _file(), images()
    if path is None or held is None:
        return _Opened(None, _NO_FILE)
    library = os.environ.get(_SWITCH) or _DRIVER
    try:
        driver = native.load().CudaDriver(library, path.read_bytes(), str(held), held.release)
    except RuntimeError as error:
        return _Opened(None, str(error))
    return _Opened(driver, None)


def missing() -> str | None:
    """Why no kernel can run in this process, None if one might."""
    driver, reason = _open()
    if driver is None:
        return reason
    try:
        driver.same_process()
    except RuntimeError as error:
        return str(error)
    return None


def is_gpu(device: torch.device) -> bool:
    """Whether ``device`` is of the type that kernels are for, be there one or not."""
    return device.type in _TYPES


def device_refusal(device: torch.device) -> str | None:
    """Why no kernel can run on ``device``, None if one might: :func:`missing`, or no image for it."""
    if not is_gpu(device):
        return f"it runs on CUDA devices, not on {device.type}"
    reason = missing()
    if reason is not None:
        return reason
    try:
        capability = _driver().capability(_ordinal(device))
    except RuntimeError as error:
        return str(error)
    held = images()
    assert held is not None
    image = held.serving(capability)
    if image is None:
        return f"the package has no kernels for {_named(capability)} (it has {held})"
    needed = 1000 * held.release[0] + 10 * held.release[1]
    if image.startswith("PTX") and _driver().version() < needed:
        return (
            f"the package has no machine code for {_named(capability)}, only {image}, which takes a driver "
            f"for CUDA {held.release[0]}.{held.release[1]}, and this one supports {version()}"
        )
    return None


def refusal(
    kernel: str, device: torch.device, *, block: int = 1, shared: int = 0, cluster: int = 1
) -> str | None:
    """Why ``kernel`` cannot be launched on ``device`` in such blocks and clusters, None if it can."""
    reason = device_refusal(device)
    if reason is not None:
        return reason
    try:
        _driver().check(kernel, _ordinal(device), (cluster, 1, 1), block, shared, cluster)
    except RuntimeError as error:
        return str(error)
    return None


def launch(
    kernel: str,
    grid: tuple[int, int, int],
    block: int,
    shared: int,
    *arguments: Tensor | int | float,
    device: torch.device,
    cluster: int = 1,
) -> None:
    """Queue ``kernel`` on torch's current stream of ``device``; a tensor is passed as its address.

    ``shared`` is dynamic shared memory in bytes, ``cluster`` the number of blocks in a cluster along the
    first side of the grid. Nothing is copied and nothing is waited for. Raises RuntimeError with a sentence
    if the driver refuses, ValueError for a tensor on another device.
    """
    ordinal = _ordinal(device)
    words: list[int | float] = []
    for each in arguments:
        if isinstance(each, Tensor):
            if each.device.type != device.type or (device.type == "cuda" and each.device.index != ordinal):
                raise ValueError(f"arguments of {kernel} must be on {device}, got a tensor on {each.device}")
            words.append(each.data_ptr())
        else:
            words.append(each)
    _driver().launch(kernel, ordinal, _stream(device, ordinal), grid, block, shared, cluster, words)


def capturing(device: torch.device) -> bool:
    """Whether what is queued on the current stream of ``device`` goes into a CUDA graph, not to the GPU."""
    ordinal = _ordinal(device)
    return bool(_driver().capturing(ordinal, _stream(device, ordinal)))


def architecture(device: torch.device) -> str:
    """The architecture of ``device``, as ``sm_90``."""
    return _named(_driver().capability(_ordinal(device)))


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors ``device`` has: of a part of a GPU (MIG), how many the part has."""
    return int(_driver().multiprocessors(_ordinal(device)))


def shared_bytes(device: torch.device) -> int:
    """How many bytes of shared memory a block can have on ``device``."""
    return int(_driver().shared_bytes(_ordinal(device)))


def single_to_double(device: torch.device) -> int:
    """How many times faster ``device`` is in fp32 than in fp64, by its own account."""
    return int(_driver().single_to_double(_ordinal(device)))


def version() -> str | None:
    """The CUDA version that the driver supports, None if there is no driver."""
    driver = _open().driver
    return None if driver is None else f"{driver.version() // 1000}.{driver.version() % 1000 // 10}"


def facts() -> dict[str, Any]:
    """What `rgfast info` says: compiled architectures, compiler, driver, GPUs with their image or refusal."""
    held, reason = images(), missing()
    gpus = []
    if reason is None:
        driver = _driver()
        for k in range(driver.device_count()):
            device, capability = torch.device("cuda", k), driver.capability(k)
            gpus.append(
                {
                    "name": driver.device_name(k),
                    "architecture": _named(capability),
                    "image": None if held is None else held.serving(capability),
                    "refusal": device_refusal(device),
                }
            )
    return {
        "absent": reason,
        "compiled": None if held is None else str(held),
        "nvcc": None if held is None else f"{held.release[0]}.{held.release[1]}",
        "driver": version(),
        "gpus": gpus,
    }


def _driver() -> Any:
    driver, reason = _open()
    if driver is None:
        raise RuntimeError(reason)
    return driver


def _ordinal(device: torch.device) -> int:
    usual = torch.cuda.current_device() if device.type == "cuda" and device.index is None else 0
    return usual if device.index is None else device.index


def _stream(device: torch.device, ordinal: int) -> int:
    if device.type != "cuda":
        return 0
    return int(torch._C._cuda_getCurrentRawStream(ordinal))  # a tenth of the time of making a Stream


def _named(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def _after_fork() -> None:
    global _LOCK
    _LOCK = threading.Lock()  # a thread that the child lacks may have had it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
