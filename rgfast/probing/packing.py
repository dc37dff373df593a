"""Batches and measures as named arrays of bytes, which one rank hands to another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.measured import Measured, to_host
from rgfast.probing.measures import MEASURES

__all__ = ["Arrays", "packed", "packed_measures", "unpacked", "unpacked_measures"]

Arrays = dict[str, NDArray[Any]]

_BOUND = "_bound"


def packed(batches: Sequence[RowBatch]) -> Arrays:
    """Batches without targets; rows in their own dtype, on the CPU without a copy."""
    arrays: Arrays = {}
    known: dict[int, list[Any]] = {}

    def put(x: Tensor | None) -> list[Any] | None:
        if x is None:
            return None
        if id(x) not in known:  # layers often share what says which of their rows count
            name = str(len(arrays))
            whole = x.cpu().contiguous()
            arrays[name] = whole.reshape(-1).view(torch.uint8).numpy()
            known[id(x)] = [name, str(x.dtype).removeprefix("torch."), list(x.shape)]
        return known[id(x)]

    said = [
        {
            "layers": [put(x) for x in batch.layers],
            "keeps": [put(x) for x in batch.keeps],
            "masked": put(batch.masked),
            "chosen": [x if isinstance(x, str) else put(x) for x in batch.chosen],
            "places": list(batch.places),
            "padded": batch.padded,
            "notes": list(batch.notes),
        }
        for batch in batches
    ]
    return {"batches": np.array(bytearray(json.dumps(said).encode()), dtype=np.uint8), **arrays}


def unpacked(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> list[RowBatch]:
    """What :func:`packed` was given, on ``device``."""
    known: dict[str, Tensor] = {}

    def take(place: list[Any] | None) -> Tensor | None:
        if place is None:
            return None
        name, dtype, shape = place
        if name not in known:
            data = torch.from_numpy(arrays[name]).view(getattr(torch, dtype)).reshape(shape)
            known[name] = data.to(device)
        return known[name]

    def chosen(place: Any) -> Tensor | str:
        found = place if isinstance(place, str) else take(place)
        assert found is not None
        return found

    return [
        RowBatch(
            layers=[take(x) for x in said["layers"]],
            keeps=[take(x) for x in said["keeps"]],
            masked=take(said["masked"]),
            chosen=[chosen(x) for x in said["chosen"]],
            places=said["places"],
            padded=said["padded"],
            notes=tuple(said["notes"]),
            owned=True,
        )
        for said in json.loads(arrays["batches"].tobytes())
    ]


def packed_measures(views: Mapping[str, Measured]) -> Arrays:
    """The measures of some views."""
    return {
        f"{view}/{name}": np.ascontiguousarray(value)
        for view, found in views.items()
        for name, value in to_host(found).items()
    }


def unpacked_measures(arrays: Mapping[str, NDArray[Any]], view: str) -> Measured:
    """Those of a view that :func:`packed_measures` was given, on the CPU."""
    own = {
        name.removeprefix(f"{view}/"): torch.from_numpy(value)
        for name, value in arrays.items()
        if name.startswith(f"{view}/")
    }
    return Measured(
        own["n_by_layer"],
        {name: value for name, value in own.items() if name in MEASURES},
        {name.removesuffix(_BOUND): value for name, value in own.items() if name.endswith(_BOUND)},
        own["refined"],
        own["singular_values"],
    )
