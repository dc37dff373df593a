"""On which architectures kernels were measured: ``auto`` takes them only there, a name has them anywhere.

A room's rows stand in ``measured.json`` beside it, if there are any. A user's own, which
``rgfast bench --device cuda --save`` measures, stand in ``rgfast/measured.json`` in the folder for
configurations (``$XDG_CONFIG_HOME``, ``~/.config`` if that is unset) and count for the version of rgfast that
they were measured with. Both are JSON and are checked field by field.
"""

from __future__ import annotations

import json
import math
import os
import typing
import warnings
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rgfast.files import as_json, write_text
from rgfast.runtime import cuda
from rgfast.runtime.tracing import constant_when_traced
from rgfast.version import __version__

__all__ = ["Measured", "architecture", "refusal", "save", "saved", "stands", "user_file"]

_FORMAT, _FILE = "rgfast.measured/1", "measured.json"
_ROOMS = Path(__file__).resolve().parents[1] / "ops"


class Measured(NamedTuple):
    """One case that an implementation of an op was timed in on a GPU, its value having been right.

    ``against`` is the fastest other implementation and ``times_faster`` its median time over ours, with the
    quartiles ``low`` and ``high``; times are in seconds. ``size`` is the one that decides which kernel runs,
    such as the rows of a matrix or the width of a block; None if the op has no such size.
    """

    op: str
    impl: str
    architecture: str
    gpu: str
    case: str
    against: str
    times_faster: float
    low: float
    high: float
    seconds: float
    rival_seconds: float
    rgfast: str
    torch: str
    size: int | None = None


_KINDS = typing.get_type_hints(Measured)


@constant_when_traced
def refusal(op: str, impl: str, device: torch.device, size: int | None = None) -> str | None:
    """Why ``auto`` does not take ``impl`` of ``op`` on ``device``, None if rows stand for its architecture.

    For the field ``by_name_only`` of an implementation. A row in which it was slower than another one, the
    spread of the ratio considered, speaks against it: at any size, or for a call of this ``size`` if it is of
    the nearest one that was measured, by ratio (two that are as near both count), or of none.
    """
    here = architecture(device)
    if here is None:
        return f"nothing was measured on {device.type}"
    rows = _standing().get((op, impl, here))
    if not rows:
        return f"it was not measured on {here} (rgfast bench --device cuda --save does that)"
    slowest = min(_of_size(rows, size), key=lambda row: row.high)
    if slowest.high < 1.0:
        return (
            f"{slowest.against} was {1 / slowest.times_faster:.2f} times as fast where it was measured on "
            f"{here} ({slowest.case})"
        )
    return None


def _of_size(rows: list[Measured], size: int | None) -> list[Measured]:
    """The rows that tell of a call of this size."""
    if size is None:
        return rows
    apart = {row: max(row.size / size, size / row.size) for row in rows if row.size is not None}
    least = min(apart.values(), default=1.0)
    return [row for row in rows if apart.get(row, least) == least]


def stands(device: torch.device) -> bool:
    """Whether there is a row of any op for the architecture of ``device``."""
    here = architecture(device)
    return here is not None and any(key[2] == here for key in _standing())


def architecture(device: torch.device) -> str | None:
    """The architecture of a GPU, as ``sm_90``, or None if it is none that there is."""
    if device.type != "cuda":  # one may stand for a GPU in a test
        return cuda.architecture(device) if cuda.device_refusal(device) is None else None
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def user_file() -> Path:
    """Where the user's own rows stand, whether there are any or not."""
    home = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    if not home.is_absolute():  # what is relative is to be ignored, by the specification
        home = Path.home() / ".config"
    return home / "rgfast" / _FILE


def _read(path: Path) -> list[Measured]:
    """The rows of a table. Raises ValueError, which names the file and the field, if it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ValueError(f"{path} must be a table of the format {_FORMAT!r}")
    rows = document.get("rows")
    if not isinstance(rows, list):
        raise ValueError(f"{path}: rows must be a list, got {type(rows).__name__}")
    return [_row(row, f"{path}: rows[{k}]") for k, row in enumerate(rows)]


def saved() -> list[Measured]:
    """The user's own rows that count. Raises ValueError, naming file and field, if the table is not valid."""
    path = user_file()
    return [row for row in _read(path) if row.rgfast == __version__] if path.exists() else []


def save(rows: Iterable[Measured]) -> Path:
    """Put rows into the user's table, in place of those of the same op, implementation and architecture.

    Rows of other versions of rgfast are dropped. Processes that run already do not see the change. Raises
    ValueError if the file is there and is no such table.
    """
    path, new = user_file(), list(rows)
    replaced = {_key(row) for row in new}
    kept = [row for row in saved() if _key(row) not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"format": _FORMAT, "rows": [row._asdict() for row in sorted([*kept, *new])]}
    write_text(path, as_json(document))
    _standing.cache_clear()
    return path


@lru_cache(maxsize=1)
def _standing() -> dict[tuple[str, str, str], list[Measured]]:
    """All rows that count, by op, implementation and architecture; the user's in place of the package's."""
    shipped = [row for path in sorted(_ROOMS.glob(f"*/{_FILE}")) for row in _read(path)]
    try:
        own = saved()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: there is no home
        warnings.warn(f"the measured times of kernels are ignored: {error}", RuntimeWarning, stacklevel=2)
        own = []
    found: dict[tuple[str, str, str], list[Measured]] = {}
    for table in (shipped, own):
        grouped: dict[tuple[str, str, str], list[Measured]] = {}
        for row in table:
            grouped.setdefault(_key(row), []).append(row)
        found |= grouped
    return found


def _key(row: Measured) -> tuple[str, str, str]:
    return row.op, row.impl, row.architecture


def _row(row: Any, where: str) -> Measured:
    if not isinstance(row, dict) or set(row) != set(_KINDS):
        have = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where} must have the fields {', '.join(_KINDS)}, got {have}")
    for name, value in row.items():
        if _KINDS[name] is str:
            if not isinstance(value, str):
                raise ValueError(f"{where}: {name} must be a string, got {value!r}")
        elif name == "size":
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{where}: size must be a positive whole number or null, got {value!r}")
        elif type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"{where}: {name} must be a positive number, got {value!r}")
    return Measured(**row)
