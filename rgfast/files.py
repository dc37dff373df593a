"""Writing files so that a reader never sees half of one, and a full disk leaves the old one in place."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

__all__ = [
    "append_bytes",
    "as_json",
    "check_file",
    "check_new_folder",
    "clear_leftovers",
    "leftovers",
    "plain",
    "write_bytes",
    "write_folder_atomically",
    "write_stream",
    "write_text",
]

_HOUR = 3600.0


def write_bytes(path: str | Path, content: bytes | memoryview) -> None:
    """Write ``content`` to ``path`` atomically; see :func:`write_stream` for links, modes and errors."""
    write_stream(path, lambda file: file.write(content))


def append_bytes(path: str | Path, content: bytes) -> None:
    """Add ``content`` to the end of ``path``, on the disk when this returns. OSErrors name ``path``; part of
    it may then have been written."""
    path = Path(path)
    with _naming(path, path), path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, in UTF-8; see :func:`write_stream`."""
    write_bytes(path, text.encode("utf-8"))


def write_stream(path: str | Path, fill: Callable[[BinaryIO], object]) -> None:
    """Let ``fill`` write a temporary file beside ``path``, bring it to the disk, then rename it to ``path``.

    A link stays a link: the file that it points to is replaced. An existing file keeps its mode; a new one
    gets what the umask leaves. What is no regular file (a pipe, ``/dev/stdout``) is written to as it is.

    Whatever ``fill`` raises leaves ``path`` as it was and no temporary file behind. An OSError of the system
    (a full disk or quota, no such folder, a folder or file that may not be written to) names ``path``.
    """
    path = Path(path)
    with _naming(path, path):
        target, mode = _target(path)
        if target is None:
            with path.open("wb") as file:
                fill(file)
            return
        temporary = _temporary(target, target.suffix)
        # Born with the final mode, narrowed by the umask: a private file is at no time public.
        born = 0o666 if mode is None else mode
        with _naming(temporary, path):
            try:
                with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, born)) as file:
                    fill(file)
                    file.flush()
                    os.fsync(file.fileno())
                if mode is not None:
                    temporary.chmod(mode)
                temporary.replace(target)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
        _sync_folder(target.parent)


def _target(path: Path) -> tuple[Path | None, int | None]:
    """The file that ``path`` leads to and its mode (None: there is none yet); no file if it is a device."""
    target = Path(os.path.realpath(path))
    try:
        found = path.stat()
    except FileNotFoundError:
        if not target.parent.exists():
            told = f"there is no folder {target.parent if path.is_symlink() else path.parent} to write it to"
            raise FileNotFoundError(errno.ENOENT, told, str(path)) from None
        return target, None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        return None, None
    if not os.access(target, os.W_OK):  # renaming would replace a write-protected file, too
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return target, stat.S_IMODE(found.st_mode)


@contextlib.contextmanager
def _naming(inner: Path, outer: Path) -> Iterator[None]:
    """Let errors of the system about ``inner``, or about no file by name, speak of ``outer``."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename == str(outer):
            raise
        named = None if error.filename is None else Path(error.filename)
        if named is None or named == inner:
            told = str(outer)
        elif inner in named.parents:
            told = str(outer / named.relative_to(inner))
        else:
            raise
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), told) from None


def _stem(path: Path) -> str:
    # Longer names would leave no room below the 255 bytes that file systems allow.
    return f".{path.name.encode()[:200].decode(errors='ignore')}.tmp-"


def _temporary(target: Path, suffix: str = "") -> Path:
    return target.parent / f"{_stem(target)}{secrets.token_hex(4)}{suffix[:30]}"


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk, too, if the system can."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def leftovers(path: str | Path) -> list[Path]:
    """What writers of ``path`` that were killed, or are still at work, have beside it."""
    target = Path(os.path.realpath(path))
    return sorted(target.parent.glob(f"{glob.escape(_stem(target))}*"))


def clear_leftovers(folder: str | Path) -> None:
    """Remove the temporary files of writers that were killed in ``folder``; not yet in their first hour.

    A younger one may be that of another process, which is about to rename it.
    """
    _clear(Path(folder).glob(".*.tmp-*"))


def _clear(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # gone by now, or not ours to remove
            if time.time() - path.lstat().st_mtime > _HOUR:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def check_file(path: Any, name: str) -> Path:
    """The argument ``name`` as a Path. Raises TypeError for what is no path, ValueError where no file can be
    written: a folder, or a file in a folder that does not exist."""
    if not isinstance(path, (str, Path)):
        raise TypeError(f"{name} must be the path of a file, got {type(path).__name__}")
    found = Path(path)
    if found.is_dir():
        raise ValueError(f"{name} must be the path of a file, and {found} is a folder")
    if not found.parent.is_dir():
        raise ValueError(f"{name} must be in a folder that exists, got {found}")
    return found


def check_new_folder(path: str | Path) -> None:
    """Raise the system's OSError if :func:`write_folder_atomically` could not make ``path``, before any work.

    Folders above are made where missing.
    """
    write_folder_atomically(path, lambda _: None)
    Path(os.path.realpath(path)).rmdir()


def write_folder_atomically(path: str | Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write files into a temporary folder beside ``path``, then rename it to ``path``.

    Folders above are made where missing; ``path`` must be new or empty. A link stays a link, an empty folder
    keeps its mode. Whatever ``fill`` raises leaves no folder behind. An OSError of the system names ``path``
    or the file in it.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    temporary = _temporary(target)
    with _naming(target, path), _naming(temporary, path):
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(leftovers(path))
        temporary.mkdir()
        try:
            fill(temporary)
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
                target.rmdir()
            temporary.replace(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(target.parent)


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
