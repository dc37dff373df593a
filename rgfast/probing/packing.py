"""Batches and measures as messages: runs of bytes, which one rank hands to another."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.measured import Measured

__all__ = ["Message", "packed", "packed_measures", "unpacked", "unpacked_measures"]

_ALIGNED = 16  # every tensor of a message begins at a multiple
_FIELDS = ("count", "refined", "spectrum")


class Message:
    """Something that JSON holds, and tensors; it takes ``nbytes``, and they are copied by :meth:`write`."""

    def __init__(self, said: Any, tensors: Sequence[Tensor]) -> None:
        kinds = [[str(x.dtype).removeprefix("torch."), list(x.shape)] for x in tensors]
        self._head = json.dumps([said, kinds]).encode()
        self._tensors = tensors
        self.nbytes = _up(8) + _up(len(self._head)) + sum(_up(x.nbytes) for x in tensors)

    def write(self, into: Tensor) -> None:
        """Put it at ``into``, ``nbytes`` bytes on the CPU."""
        into[:8].view(torch.int64).fill_(len(self._head))
        at = _up(8)
        into[at : at + len(self._head)].numpy()[:] = np.frombuffer(self._head, dtype=np.uint8)
        at += _up(len(self._head))
        for x in self._tensors:
            into[at : at + x.nbytes].view(x.dtype).view(x.shape).copy_(x)
            at += _up(x.nbytes)

    @staticmethod
    def read(data: Tensor) -> tuple[Any, list[Tensor]]:
        """What was written; tensors share the memory of ``data``."""
        length, at = int(data[:8].view(torch.int64)), _up(8)
        said, kinds = json.loads(data[at : at + length].numpy().tobytes())
        at += _up(length)
        tensors = []
        for dtype, shape in kinds:
            kind = getattr(torch, dtype)
            size = kind.itemsize * torch.Size(shape).numel()
            tensors.append(data[at : at + size].view(kind).view(shape))
            at += _up(size)
        return said, tensors


def _up(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


class _Numbered:
    """Tensors by number, each once: layers often share what says which of their rows count."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._known: dict[int, int] = {}

    def put(self, x: Tensor | None) -> int | None:
        if x is None:
            return None
        if id(x) not in self._known:
            self._known[id(x)] = len(self.tensors)
            self.tensors.append(x)
        return self._known[id(x)]


def packed(batches: Sequence[tuple[int, RowBatch]]) -> Message:
    """Batches, each with the number of its first sequence; rows in their own dtype."""
    numbered = _Numbered()
    put = numbered.put
    said = [
        {
            "first": first,
            "layers": [put(x) for x in batch.layers],
            "keeps": [put(x) for x in batch.keeps],
            "masked": put(batch.masked),
            "targets": [put(x) for x in batch.targets],
            "chosen": [x if isinstance(x, str) else put(x) for x in batch.chosen],
            "places": list(batch.places),
            "padded": batch.padded,
            "notes": list(batch.notes),
        }
        for first, batch in batches
    ]
    return Message(said, numbered.tensors)


def unpacked(data: Tensor, device: torch.device) -> list[tuple[int, RowBatch]]:
    """What :func:`packed` was given, on ``device``."""
    batches, tensors = Message.read(data)
    tensors = [x.to(device) for x in tensors]

    def take(number: int | None) -> Tensor | None:
        return None if number is None else tensors[number]

    return [
        (
            said["first"],
            RowBatch(
                layers=[take(x) for x in said["layers"]],
                keeps=[take(x) for x in said["keeps"]],
                masked=take(said["masked"]),
                targets=[tensors[x] for x in said["targets"]],
                chosen=[x if isinstance(x, str) else tensors[x] for x in said["chosen"]],
                places=said["places"],
                padded=said["padded"],
                notes=tuple(said["notes"]),
                owned=True,
            ),
        )
        for said in batches
    ]


def packed_measures(found: Mapping[str, Measured], more: Mapping[str, Tensor]) -> Message:
    """Measures by name, and tensors by theirs."""
    numbered = _Numbered()
    put: Callable[[Tensor], Any] = numbered.put
    said = {}
    for name, one in found.items():
        said[name] = {
            **{field: put(getattr(one, field)) for field in _FIELDS},
            "values": {measure: put(value) for measure, value in one.values.items()},
            "bounds": {measure: put(value) for measure, value in one.bounds.items()},
        }
    return Message([said, {name: put(x) for name, x in more.items()}], numbered.tensors)


def unpacked_measures(data: Tensor) -> tuple[dict[str, Measured], dict[str, Tensor]]:
    """What :func:`packed_measures` was given, on the CPU."""
    (measures, more), tensors = Message.read(data)
    found = {name: _measured(said, tensors) for name, said in measures.items()}
    return found, {name: tensors[k] for name, k in more.items()}


def _measured(said: Mapping[str, Any], tensors: Sequence[Tensor]) -> Measured:
    values, bounds = ({name: tensors[k] for name, k in said[kind].items()} for kind in ("values", "bounds"))
    count, refined, spectrum = (tensors[said[field]] for field in _FIELDS)
    return Measured(count, values, bounds, refined, spectrum)
