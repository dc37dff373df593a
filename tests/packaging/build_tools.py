"""Running the tools of a build as on another machine."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import which

ROOT = Path(__file__).resolve().parents[2]


def execute(
    *command: str | Path, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` without what this process was told about compilers, paths and rgfast."""
    dropped = ("PYTHON", "RGFAST_", "CMAKE", "SKBUILD", "PIP_", "CC", "CXX")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd, env=env | environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


def tool(name: str) -> Path:
    found = which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert found is not None, f"{name} is in the dev extra"
    return Path(found)
