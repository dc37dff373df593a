"""The file of a monitor: a line of JSON for the set-up and one for every measured step.

A step is one append, so that another process can read the file while training runs; a line that is not whole
yet, or was cut off, is not counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rgfast.files import append_bytes, plain, write_bytes

__all__ = ["FORMAT", "append", "read", "rewrite"]

FORMAT = "rgfast.monitor/1"


def rewrite(path: Path, header: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> None:
    """Replace the file atomically by a header and these steps."""
    write_bytes(path, b"".join(map(_line, [{"format": FORMAT, **header}, *steps])))


def append(path: Path, step: Mapping[str, Any]) -> None:
    """Add a step, on the disk when this returns. Raises OSError, naming ``path``; the step is then not
    counted."""
    append_bytes(path, _line(step))


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the steps. Raises FileNotFoundError if there is no such file, ValueError for a file of
    another kind, a damaged one and one that a newer version wrote."""
    if not path.is_file():
        raise FileNotFoundError(f"path must be the file of a monitor, and there is no file {path}")
    whole = path.read_bytes()
    lines = whole[: whole.rfind(b"\n") + 1].splitlines()
    try:
        documents = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} is damaged or not the file of a monitor: {error}") from error
    form = documents[0].get("format") if documents and isinstance(documents[0], dict) else None
    if not isinstance(form, str) or not form.startswith("rgfast.monitor/"):
        raise ValueError(f"{path} is not the file of a monitor (its first line has no format {FORMAT!r})")
    if form != FORMAT:
        raise ValueError(f"{path} was written by another rgfast (format {form!r}; this one reads {FORMAT!r})")
    header, *steps = documents
    if not all(isinstance(step, dict) and {"step", "values"} <= step.keys() for step in steps):
        raise ValueError(f"{path} is damaged: a line after the first is no step")
    return header, steps


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(plain(dict(document)), ensure_ascii=False, allow_nan=False).encode() + b"\n"
