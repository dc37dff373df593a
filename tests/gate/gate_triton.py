"""Compiles a list of Triton kernels for an architecture, and prints what they take as one JSON document.

    python tests/gate/gate_triton.py tests/ops/OP/triton_gate.py 90

The list is a Python file. What it imports from ``rgfast/ops/OP/gpu`` is what its kernels are made of: they
are compiled again if that changes. It has

- ``entries(arch)``, which yields all that is compiled for the architecture, each with its own ``name``:
  every kernel with every configuration of the checked-in tables;
- ``compiled(entry)``, what ``triton.compile(ASTSource(...), target=GPUTarget("cuda", arch, 32))`` returns.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import triton
from gate_table import Taken, read


def main(path: str, arch: str) -> None:
    kernels = {}
    listed = _module(Path(path))
    triton.knobs.nvidia.dump_ptxas_log = True
    for entry in listed.entries(int(arch)):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            kernel = listed.compiled(entry)
        log = said.getvalue() or _assembled(kernel.asm["ptx"])
        (taken,) = read(log, kernel.asm["cubin"]).values()
        kernels[entry.name] = _with_dynamic(taken, kernel.metadata.shared)
    print(json.dumps({name: taken._asdict() for name, taken in kernels.items()}))


def _assembled(ptx: str) -> str:
    """What ptxas says of a kernel: Triton 3.4 has it said, too, and keeps it to itself."""
    from triton.backends.nvidia.compiler import get_ptxas

    (target,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas().path, "-lineinfo", "-v", f"--gpu-name={target}", source, "-o", f"{folder}/out"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def _with_dynamic(taken: Taken, shared: int) -> Taken:
    """Triton asks for its shared memory at the launch."""
    return taken._replace(shared=taken.shared + shared)


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # noqa: PT018 (it is a path of a Python file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(*sys.argv[1:])
