"""What a probe's options ``views=``, ``positions=``, ``control=`` and ``memory=`` name."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "CONTROLS",
    "POSITIONAL",
    "VIEWS",
    "Control",
    "asked_views",
    "check_views",
    "checked_folder",
    "checked_indices",
    "checked_positions",
    "default_views",
    "human_bytes",
    "index_of",
    "parse_memory",
]

VIEWS = ("visible", "masked", "position", "pooled", "mean_pooled", "flattened")
Control = Literal["random_weights", "shuffled_tokens"] | None
CONTROLS = ("random_weights", "shuffled_tokens")
POSITIONAL = ("visible", "masked", "position")

_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
          "ki": 2**10, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}  # fmt: skip


def check_views(views: Sequence[str], rows: Sequence[str] = ()) -> None:
    """Raise ValueError unless ``views`` is a sequence of known views, at least one, and one of ``rows`` if
    there are any."""
    known = (*VIEWS, *rows)
    if isinstance(views, str) or not views:
        raise ValueError(f"views must be a sequence of {', '.join(known)}, got {views!r}")
    for view in views:
        if view not in known:
            raise ValueError(f"views must be among {', '.join(known)}, got {view!r}")
    if rows and not {*rows} & {*views}:
        raise ValueError(f"views must have a view of rows= ({', '.join(rows)}), got {', '.join(views)}")


def default_views(length: int, masked: bool, aligned: bool) -> tuple[str, ...]:
    if not aligned:
        return ("mean_pooled", "pooled")
    if length == 1 and not masked:
        return ("pooled",)
    return VIEWS if masked else VIEWS[2:]


def asked_views(
    views: Sequence[str], masked: bool, aligned: bool, rows: Sequence[str] = ()
) -> tuple[str, ...]:
    for view in views:
        if view in ("visible", "masked") and not masked:
            raise ValueError(f"views: {view!r} needs mask=, the name of a batch entry or a callable")
        if not aligned and view not in ("pooled", "mean_pooled", *rows):
            raise ValueError(
                f"views: the layers differ in their positions, so {view!r} does not compare them"
            )
    return tuple(view for view in (*VIEWS, *rows) if view in views)


def checked_positions(positions: Any) -> str | tuple[int | str, ...]:
    """``positions`` as given; ``"first"`` and ``"last"`` may stand for a sequence or in one.

    Raises ValueError unless it is "auto", "all" or a sequence of whole numbers, "first" and "last", at least
    one.
    """
    if isinstance(positions, str):
        if positions in ("auto", "all"):
            return positions
        positions = (positions,)
    try:
        found = tuple(t if t in ("first", "last") else operator.index(t) for t in positions)
    except TypeError:
        found = ()
    if not found:
        raise ValueError(
            "positions must be 'auto', 'all', 'first', 'last' or a sequence of indices, got "
            f"{positions[0] if isinstance(positions, tuple) and len(positions) == 1 else positions!r}"
        )
    return found


def index_of(position: int | str) -> int:
    """The number of a position: "first" is 0, "last" is −1."""
    return {"first": 0, "last": -1}[position] if isinstance(position, str) else int(position)


def checked_indices(positions: Sequence[int | str], length: int) -> set[int]:
    """The positions as numbers. Raises ValueError unless ``length`` positions have them all."""
    wanted = {index_of(t) for t in positions}
    if not wanted or not -length <= min(wanted) <= max(wanted) < length:
        allowed = "0, the only position of these layers" if length == 1 else f"indices from 0 to {length - 1}"
        raise ValueError(f"positions must be {allowed}, got {list(positions)}")
    return wanted


def parse_memory(memory: str | int | float, name: str = "memory") -> int:
    """Bytes of ``"4GiB"``, ``"500 MB"`` or a number of bytes. Raises ValueError for anything else."""
    if isinstance(memory, (int, float)) and not isinstance(memory, bool) and memory > 0:
        return int(memory)
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kKMGT]i?)?B?\s*", memory) if isinstance(memory, str) else None
    try:
        if match and float(match[1]) > 0:
            return int(float(match[1]) * _UNITS[match[2] or ""])
    except ValueError:
        pass
    raise ValueError(f"{name} must be bytes or text such as '4GiB', got {memory!r}")


def human_bytes(number: float) -> str:
    """``number`` bytes in binary units with three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"


def checked_folder(path: Any) -> Path:
    """``path`` as a Path. Raises TypeError for what is none, ValueError unless it is new or empty."""
    if not isinstance(path, (str, Path)):
        raise TypeError(f"keep must be the path of a folder, got {type(path).__name__}")
    found = Path(path)
    if found.exists() and (not found.is_dir() or any(found.iterdir())):
        what = "it holds files" if found.is_dir() else "it is a file"
        raise ValueError(f"keep must be a new or empty folder, and {found} is not: {what}")
    return found
