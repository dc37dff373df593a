"""What the first batch shows, which the plan is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rgfast.ops.fast import factors_pay
from rgfast.probing.capture.rows import RowBatch
from rgfast.runtime.memory import free_bytes
from rgfast.runtime.waiting import waits_for

__all__ = ["FirstBatch", "first_of"]


@dataclass(frozen=True)
class FirstBatch:
    """What a plan is made from: widths of layers, positions, and (name, width, has labels) of targets.

    ``free`` are the bytes that the device has, None where nobody counts them, ``factors`` says whether it
    computes triangular factors at a fair price, and ``launched`` whether every sum is a launch there.
    A number of the layers' rows has ``itemsize`` bytes.
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
    itemsize: int = 4

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FirstBatch:
        """What ``asdict`` gave, after JSON."""
        targets = tuple((name, width, labels) for name, width, labels in data["targets"])
        lists = {name: tuple(data[name]) for name in ("widths", "places")}
        return cls(**{**data, **lists, "targets": targets})


def first_of(
    batch: RowBatch, rows: Sequence[Tensor], targets: Sequence[str], labelled: Sequence[bool]
) -> FirstBatch:
    """What a batch shows; ``rows`` are of all layers, some perhaps of an earlier batch, and ``labelled`` says
    which ``targets`` are labels."""
    device = rows[0].device
    return FirstBatch(
        widths=tuple(x.shape[2] for x in rows),
        length=rows[0].shape[1],
        aligned=len({x.shape[1] for x in batch.present}) == 1,
        padded=batch.padded,
        places=tuple(batch.places),
        masked=batch.masked is not None,
        targets=tuple(
            (name, x.shape[2], labels)
            for name, x, labels in zip(targets, batch.targets, labelled, strict=True)
        ),
        free=free_bytes(device),
        factors=factors_pay(rows[0]),
        launched=waits_for(device),
        itemsize=max(x.element_size() for x in rows),
    )
