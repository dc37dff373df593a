"""Runs tests on an Intel processor as they run on one by AMD, as far as libraries go by the maker's name.

    python tests/reliability/other_make.py [pytest's arguments; tests/test_bits.py by default]

MKL takes other paths there, whose bits depend on threads, addresses and strides. `other_make.c` is compiled
with the system's compiler and preloaded. Linux on x86-64 with CPUID faulting (``cpuid_fault`` in
/proc/cpuinfo).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def missing() -> str | None:
    """None, or what this machine lacks, in words."""
    facts = Path("/proc/cpuinfo")
    if not facts.exists() or "cpuid_fault" not in facts.read_text():
        return "this processor has no CPUID faulting"
    if compiler() is None:
        return "there is no C compiler"
    return None


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build(folder: Path) -> Path:
    """The library to preload. Raises CalledProcessError if it does not compile."""
    library = folder / "other_make.so"
    command = [str(compiler()), "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([*command, str(HERE / "other_make.c"), "-ldl"], check=True)
    return library


def main(arguments: list[str]) -> int:
    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 77
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"LD_PRELOAD": str(build(Path(folder)))}
        tests = arguments or [str(HERE.parent / "test_bits.py")]
        return subprocess.run([sys.executable, "-m", "pytest", *tests], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
