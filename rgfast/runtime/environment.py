"""What this process can run, for ``rgfast info`` and for the provenance of results."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rgfast import dispatch
from rgfast.runtime import cuda, native
from rgfast.version import __version__

__all__ = ["SWITCHES", "describe", "facts", "versions"]

SWITCHES = {
    "RGFAST_CUDA_DRIVER": "open this library as the GPU's driver instead of libcuda.so.1 (for tests)",
    "RGFAST_ISA": "force the instruction set of compiled kernels: baseline, neon, avx2 or avx512",
    "RGFAST_STRICT": "1 makes a fallback to the reference an error instead of a warning",
}


def versions() -> dict[str, str]:
    """Versions of Python and of every package a result depends on ('absent' where not installed)."""
    found = {"rgfast": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "scipy", "xarray", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def facts() -> dict[str, Any]:
    """The environment as values for JSON: versions, machine, native module, threads, GPUs, ops, switches."""
    reason = native.unavailable_reason()
    return {
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native": {
            "absent": reason,
            "active": native.active_isa(),
            "compiled": list(native.compiled_isas()),
            "available": list(native.available_isas()),
        },
        "cuda": cuda.facts(),
        "gpus": _gpus(),
        "ops": list(dispatch.registered()),
        "switches": {name: os.environ.get(name) for name in SWITCHES},
    }


def describe() -> str:
    """The environment in lines: versions, native module and its ISA, threads, GPUs, ops, switches."""
    found = facts()
    lines = [f"{name:<10} {number}" for name, number in found["versions"].items()]
    module = found["native"]
    if module["absent"] is None:
        compiled, available = ", ".join(module["compiled"]), ", ".join(module["available"])
        lines.append(f"{'native':<10} active {module['active']}, compiled {compiled}, available {available}")
    else:
        lines.append(f"{'native':<10} absent, so every op runs its reference in PyTorch: {module['absent']}")
    lines += [f"{'cuda':<10} {line}" for line in _cuda_lines(found["cuda"])]
    lines.append(f"{'machine':<10} {found['machine']}, {found['cpu']}")
    lines.append(f"{'threads':<10} {found['threads']} of {found['cores']} cores")
    lines.append(f"{'gpus':<10} {', '.join(found['gpus']) or 'none'}")
    lines.append(f"{'ops':<10} {', '.join(found['ops'])}")
    for name, meaning in SWITCHES.items():
        lines.append(f"{name:<18} {found['switches'][name] or 'unset'} ({meaning})")
    return "\n".join(lines)


def _cuda_lines(found: dict[str, Any]) -> list[str]:
    """Kernels of the package, the driver, and for each GPU what runs there or why nothing does."""
    if found["compiled"] is None:
        return [found["absent"]]
    lines = [f"kernels for {found['compiled']}, built by nvcc {found['nvcc']}"]
    if found["absent"] is not None:
        return [*lines, f"cannot run: {found['absent']}"]
    lines.append(f"driver for CUDA {found['driver']}")
    for gpu in found["gpus"]:
        runs = f"runs {gpu['image']}" if gpu["refusal"] is None else f"cannot run: {gpu['refusal']}"
        lines.append(f"{gpu['name']} ({gpu['architecture']}) {runs}")
    return lines


def _cpu() -> str:
    """The processor's name, as far as the system tells it."""
    listed = Path("/proc/cpuinfo")
    for line in listed.read_text(encoding="utf-8").splitlines() if listed.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_name(i) for i in range(count)]
