"""Checks of Triton kernels in a process of their own: import settles whether kernels are interpreted.

    TRITON_INTERPRET=1 python tests/ops/triton_process.py ROOM FILE [NAMES]

runs every function named ``check_*`` (or those of NAMES) in ``triton_checks*.py`` of a room's folder on CPU
tensors, or on a GPU without the variable, and writes what each found to FILE as JSON: of each thing whether
it holds, or its error by what is allowed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

__all__ = ["checked", "names_of", "wrong"]


def names_of(room: Path) -> list[str]:
    """The names of a room's checks."""
    return [name for names in _by_script(room).values() for name in names]


def _by_script(room: Path) -> dict[Path, list[str]]:
    return {
        script: re.findall(r"^def check_(\w+)", script.read_text(encoding="utf-8"), re.MULTILINE)
        for script in sorted(room.glob("triton_checks*.py"))
    }


def checked(room: Path, path: Path, *names: str, **env: str) -> dict[str, Any]:
    """What a room's checks found. ``path`` is a file for it, ``env`` are variables of the process."""
    done = subprocess.run(
        [sys.executable, __file__, room, path, *names],
        env=os.environ | env, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def wrong(found: Any) -> Any:
    """What does not hold of what a check found, or how it failed."""
    if not isinstance(found, dict) or not found:
        return found or "nothing was checked"
    return {each: value for each, value in found.items() if value is False or not value <= 1}


def main(room: str, path: str, *chosen: str) -> None:
    sys.path.insert(0, room)
    found: dict[str, Any] = {}
    for script, names in _by_script(Path(room)).items():
        for name in names:
            if chosen and name not in chosen:
                continue
            try:
                found[name] = getattr(importlib.import_module(script.stem), f"check_{name}")()
            except Exception:
                found[name] = traceback.format_exc()
    Path(path).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
