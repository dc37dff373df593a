"""What a probe will hold and compute, decided on the first batch's shapes and said before the run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rgfast.streaming import Pairs, state_bytes

__all__ = ["POSITIONAL", "VIEWS", "Plan", "make_plan", "parse_memory"]

VIEWS = ("visible", "masked", "position", "pooled", "mean_pooled", "flattened")
POSITIONAL = ("visible", "masked", "position")

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
          "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}  # fmt: skip
_PLAIN = ("length", "views_asked", "groups", "state_bytes", "flops_per_sequence")
_FLATTENED_WIDTH = 1024  # above this the flattened view is only taken when asked for


def parse_memory(memory: str | int | float) -> int:
    """Bytes of ``"4GiB"``, ``"500 MB"`` or a number of bytes. Raises ValueError for anything else."""
    if isinstance(memory, (int, float)) and not isinstance(memory, bool) and memory > 0:
        return int(memory)
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]i?)?B?\s*", memory) if isinstance(memory, str) else None
    try:
        if match and float(match[1]) > 0:
            return int(float(match[1]) * _UNITS[match[2] or ""])
    except ValueError:
        pass
    raise ValueError(f"memory must be bytes or text such as '4GiB', got {memory!r}")


@dataclass(frozen=True)
class Plan:
    """Layers, positions and views of one probe, and their cost.

    ``positions`` are those followed one by one, of ``length`` in all (the first batch's); the others count in
    the pooled views only. ``state_bytes`` is fixed from here on; ``flops_per_sequence`` is what measuring
    adds to the model's forward.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    length: int
    positions: tuple[int, ...]
    views: tuple[str, ...]
    views_asked: bool
    pairs: Pairs
    groups: int
    state_bytes: int
    flops_per_sequence: float
    notes: tuple[str, ...] = ()

    def to_json(self, **extra: Any) -> str:
        """Everything that decides what is measured, as JSON."""
        return json.dumps({**asdict(self), **extra})

    @classmethod
    def from_json(cls, text: str) -> tuple[Plan, dict[str, Any]]:
        """The plan that :meth:`to_json` wrote, and what was added to it."""
        data = json.loads(text)
        pairs = data["pairs"]
        known = {
            **{name: data.pop(name) for name in _PLAIN},
            **{name: tuple(data.pop(name)) for name in ("names", "widths", "positions", "views", "notes")},
            "pairs": pairs if isinstance(pairs, str) else tuple((i, j) for i, j in pairs),
        }
        del data["pairs"]
        return cls(**known), data

    @property
    def all_positions(self) -> bool:
        return len(self.positions) == self.length

    def __str__(self) -> str:
        where = "all" if self.all_positions else f"{len(self.positions)} of"
        lines = [
            f"{len(self.names)} layers (width {_span(self.widths)}), {where} {self.length} positions, "
            f"views {', '.join(self.views)}: {human_bytes(self.state_bytes)} of state, "
            f"{self.flops_per_sequence / 1e6:,.3g} Mflop a sequence"
        ]
        return "\n".join([*lines, *self.notes])


def make_plan(
    names: Sequence[str],
    widths: Sequence[int],
    length: int,
    *,
    positions: str | Sequence[int],
    views: Sequence[str] | None,
    pairs: Pairs,
    groups: int,
    memory: int,
    masked: bool,
    aligned: bool = True,
) -> Plan:
    """The :class:`Plan` that fits ``memory``; ``aligned`` says whether all layers have the same positions.

    Raises ValueError, naming the change to make, where what was asked for explicitly does not fit.
    """
    notes: list[str] = []
    if views is None:
        chosen = _default_views(widths, length, masked, aligned, pairs, groups, memory, notes)
    else:
        chosen = [view for view in VIEWS if view in views]
        _check_views(views, masked, aligned)
    follow = any(view in POSITIONAL for view in chosen)
    per_position = _positional_bytes(widths, 1, pairs, chosen) * groups
    fixed = _fixed_bytes(widths, length, pairs, chosen, groups)
    if fixed > memory:
        raise ValueError(_too_big(fixed, memory, chosen, pairs, groups, "the views without positions"))
    picked = _positions(positions, length, follow, per_position, memory - fixed, notes)
    total = fixed + per_position * len(picked)
    if total > memory:
        raise ValueError(_too_big(total, memory, chosen, pairs, groups, f"{len(picked)} positions"))
    return Plan(
        tuple(names),
        tuple(widths),
        length,
        picked,
        tuple(chosen),
        views is not None,
        pairs,
        groups,
        total,
        _flops(widths, length, pairs, chosen),
        tuple(notes),
    )


def human_bytes(number: float) -> str:
    """``number`` bytes in binary units with three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"


def _span(widths: Sequence[int]) -> str:
    return str(widths[0]) if len(set(widths)) == 1 else f"{min(widths)} to {max(widths)}"


def _default_views(
    widths: Sequence[int],
    length: int,
    masked: bool,
    aligned: bool,
    pairs: Pairs,
    groups: int,
    memory: int,
    notes: list[str],
) -> list[str]:
    if not aligned:
        notes.append("layers differ in their positions: the mean_pooled view alone compares them")
        return ["mean_pooled"]
    if length == 1 and not masked:
        return ["pooled"]
    views = ["visible", "masked"] if masked else []
    views += ["position", "pooled", "mean_pooled"]
    flat = groups * state_bytes([length * d for d in widths], 1, pairs)
    if length * max(widths) <= _FLATTENED_WIDTH and flat <= memory / 4:
        views.append("flattened")
    return views


def _check_views(views: Sequence[str], masked: bool, aligned: bool) -> None:
    if isinstance(views, str) or not views:
        raise ValueError(f"views must be a sequence of {', '.join(VIEWS)}, got {views!r}")
    for view in views:
        if view not in VIEWS:
            raise ValueError(f"views must be among {', '.join(VIEWS)}, got {view!r}")
        if view in ("visible", "masked") and not masked:
            raise ValueError(f"views: {view!r} needs mask=, the name of a batch entry or a callable")
        if not aligned and view != "mean_pooled":
            raise ValueError(
                f"views: the layers differ in their positions, so {view!r} is not defined for them"
            )


def _positional_bytes(widths: Sequence[int], positions: int, pairs: Pairs, views: Sequence[str]) -> int:
    # With a mask the rows go to one of two states; `position` is their sum.
    states = 2 if {"visible", "masked"} & set(views) else 1
    return states * state_bytes(widths, positions, pairs) if set(views) & set(POSITIONAL) else 0


def _fixed_bytes(widths: Sequence[int], length: int, pairs: Pairs, views: Sequence[str], groups: int) -> int:
    total = 0
    if "pooled" in views:
        total += state_bytes(widths, 1, pairs)
    if "mean_pooled" in views:
        total += state_bytes(widths, 1, pairs)
    if "flattened" in views:
        total += state_bytes([length * d for d in widths], 1, pairs)
    return total * groups


def _positions(
    asked: str | Sequence[int], length: int, follow: bool, each: int, room: int, notes: list[str]
) -> tuple[int, ...]:
    if not isinstance(asked, str):
        wanted = sorted({int(t) + (length if t < 0 else 0) for t in asked})
        if not wanted or not 0 <= wanted[0] <= wanted[-1] < length:
            raise ValueError(f"positions must be indices from 0 to {length - 1}, got {list(asked)}")
        return tuple(wanted) if follow else ()
    if asked not in ("auto", "all"):
        raise ValueError(f"positions must be 'auto', 'all' or a sequence of indices, got {asked!r}")
    if not follow:
        return ()
    fit = room // each
    if asked == "all" or fit >= length:
        return tuple(range(length))
    if fit < 1:
        raise ValueError(
            f"memory: one position needs {human_bytes(each)} and {human_bytes(room)} are left; raise "
            "memory=, or leave the positional views out with views=('pooled', 'mean_pooled')"
        )
    chosen = _log_spaced(length, fit)
    notes.append(
        f"{len(chosen)} log-spaced positions of {length} fit the memory; the others count in the pooled views"
    )
    return chosen


def _log_spaced(length: int, number: int) -> tuple[int, ...]:
    """At most ``number`` of 0 … length−1, dense at the start, first and last included where two fit."""
    if number == 1:
        return (0,)
    for steps in range(number, 4 * number):
        found = {round((length ** (k / (steps - 1))) - 1) for k in range(steps)}
        if len(found) > number:
            break
        best = found
    return tuple(sorted(min(t, length - 1) for t in best))


def _flops(widths: Sequence[int], length: int, pairs: Pairs, views: Sequence[str]) -> float:
    def gram(widths: Sequence[int]) -> float:
        return 2.0 * state_bytes(widths, 1, pairs) / 8

    positional = 2 if {"visible", "masked"} & set(views) else 1 if {"position", "pooled"} & set(views) else 0
    total = positional * length * gram(widths)
    total += gram(widths) if "mean_pooled" in views else 0.0
    return total + (gram([length * d for d in widths]) if "flattened" in views else 0.0)


def _too_big(need: int, memory: int, views: Sequence[str], pairs: Pairs, groups: int, what: str) -> str:
    changes = []
    if pairs == "all":
        changes.append("pairs='adjacent'")
    if groups > 1:
        changes.append("fewer groups")
    if "flattened" in views:
        changes.append("views without 'flattened'")
    if "positions" in what:
        changes.append("fewer positions (positions='auto')")
    changes.append("fewer layers")
    return (
        f"memory: {what} need {human_bytes(need)} and memory allows {human_bytes(memory)}; "
        f"raise memory= or take {', or '.join(changes)}"
    )
