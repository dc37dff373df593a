"""What this process can run, for ``rgfast info`` and for the provenance of results."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from rgfast import dispatch, native
from rgfast.version import __version__

__all__ = ["SWITCHES", "describe", "versions"]

SWITCHES = {
    "RGFAST_ISA": "force the instruction set of compiled kernels: baseline, avx2 or avx512",
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


def describe() -> str:
    """The environment in lines: versions, native module and its ISA, threads, GPUs, ops, switches."""
    lines = [f"{name:<10} {number}" for name, number in versions().items()]
    reason = native.unavailable_reason()
    if reason is None:
        module = native.load()
        compiled, available = ", ".join(module.compiled_isas()), ", ".join(module.available_isas())
        lines.append(
            f"{'native':<10} active {module.active_isa()}, compiled {compiled}, available {available}"
        )
    else:
        lines.append(f"{'native':<10} absent: {reason}")
    lines.append(f"{'threads':<10} {torch.get_num_threads()} of {os.cpu_count()} cores")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "none"
    lines.append(f"{'gpus':<10} {names}")
    lines.append(f"{'ops':<10} {', '.join(dispatch.registered())}")
    for name, meaning in SWITCHES.items():
        lines.append(f"{name:<14} {os.environ.get(name, 'unset')} ({meaning})")
    return "\n".join(lines)
