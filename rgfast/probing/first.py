"""What the first batch shows, which the plan is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FirstBatch"]


@dataclass(frozen=True)
class FirstBatch:
    """What a plan is made from: widths of layers, positions, and (name, width, has labels) of targets.

    ``free`` are the bytes that the device has, None where nobody counts them, ``factors`` says whether it
    computes triangular factors at a fair price, and ``launched`` whether every sum is a launch there.
    """

    widths: tuple[int, ...]
    length: int
    aligned: bool
    places: tuple[int, ...]
    padded: bool
    masked: bool
    targets: tuple[tuple[str, int, bool], ...]
    free: int | None = None
    factors: bool = True
    launched: bool = False

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FirstBatch:
        """What ``asdict`` gave, after JSON."""
        targets = tuple((name, width, labels) for name, width, labels in data["targets"])
        lists = {name: tuple(data[name]) for name in ("widths", "places")}
        return cls(**{**data, **lists, "targets": targets})
