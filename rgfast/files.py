"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "as_json",
    "check_new_folder",
    "clear_leftovers",
    "plain",
    "write_atomically",
    "write_folder_atomically",
    "write_text",
]

_HOUR = 3600.0


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it to ``path``.

    Whatever ``write`` raises leaves ``path`` as it was and no temporary file behind. An OSError of the system
    (no such folder, a folder that may not be written to) names ``path``.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        missing = not path.parent.exists()
        reason = f"there is no folder {path.parent} to write it to" if missing else error.strerror
        raise OSError(error.errno, reason, str(path)) from None
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; a result is as readable as any other file of its owner.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == name:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def clear_leftovers(folder: str | Path) -> None:
    """Remove the temporary files of writers that were killed in ``folder``; not yet in their first hour.

    A younger one may be that of another process, which is about to rename it.
    """
    for path in Path(folder).glob(".*.tmp-*"):
        try:
            if time.time() - path.stat().st_mtime > _HOUR:
                path.unlink()
        except OSError:
            pass  # gone by now, or not ours to remove


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, in UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_new_folder(path: str | Path) -> None:
    """Raise the system's OSError if :func:`write_folder_atomically` could not make ``path``, before any work.

    Folders above are made where missing.
    """
    write_folder_atomically(path, lambda _: None)
    Path(path).rmdir()


def write_folder_atomically(path: str | Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write files into a temporary folder beside ``path``, then rename it to ``path``.

    Folders above are made where missing; ``path`` must be new or empty. Whatever ``fill`` raises leaves no
    folder behind. An OSError of the system names ``path``.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        fill(temporary)
        if path.exists():
            path.rmdir()
        temporary.replace(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: arrays and tuples as lists, NaN and inf as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.bool_):
        return bool(value)
    return value


def as_json(document: Any) -> str:
    """``document`` as indented JSON that every reader takes, with a newline at its end."""
    return json.dumps(plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
