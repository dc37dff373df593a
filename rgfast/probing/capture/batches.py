"""Batches of any usual form, as entries by name and a call of the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Caller", "batch_items", "batch_rows", "iterate"]


def iterate(batches: Any, batch_size: int) -> Iterator[Any]:
    """The batches one by one: those of an iterable, or pieces of ``batch_size`` rows of one mapping or array.

    Raises TypeError for what cannot be iterated, ValueError where entries of one mapping differ in length.
    """
    if isinstance(batches, Mapping):
        whole = {key: as_tensor(value) for key, value in batches.items()}
        lengths = {
            key: len(value) for key, value in whole.items() if isinstance(value, Tensor) and value.dim()
        }
        if not lengths:
            raise ValueError("batches must hold at least one array, got a mapping without any")
        if len(set(lengths.values())) != 1:
            raise ValueError(f"batches: entries must have the same number of rows, got {lengths}")
        for start in range(0, next(iter(lengths.values())), batch_size):
            yield {
                key: value[start : start + batch_size] if key in lengths else value
                for key, value in whole.items()
            }
    elif isinstance(batches, (Tensor, np.ndarray)):
        array = as_tensor(batches)
        for start in range(0, len(array), batch_size):
            yield array[start : start + batch_size]
    elif isinstance(batches, Iterable) and not isinstance(batches, (str, bytes)):
        yield from batches
    else:
        raise TypeError(
            f"batches must be an iterable of batches, a mapping of arrays or an array, got "
            f"{type(batches).__name__}"
        )


def as_tensor(value: Any) -> Any:
    """numpy arrays as tensors, everything else as it is."""
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def batch_items(batch: Any) -> list[Any]:
    """What a batch holds, without names."""
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if isinstance(batch, (tuple, list)) else [batch]


def batch_rows(batch: Any) -> int:
    """Rows of a batch: the length of its first array, 1 where it holds none."""
    for item in batch_items(batch):
        if isinstance(item, (Tensor, np.ndarray)) and item.ndim:
            return len(item)
    return 1


class Caller:
    """Calls a model on a batch: what its ``forward`` takes is passed, the rest of a mapping is not."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        parameters = inspect.signature(model.forward).parameters.values()
        self._named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        self._positional = sum(
            p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
            for p in parameters
        )
        first = next(iter(model.parameters()), None)
        self._device = None if first is None else first.device

    def entries(self, batch: Any) -> dict[str, Any]:
        """What a batch holds, by name (``input`` where it has none), on the model's device."""
        if isinstance(batch, Mapping):
            return {str(key): self._placed(value) for key, value in batch.items()}
        items = batch_items(batch)
        return {"input" if not k else f"input{k}": self._placed(item) for k, item in enumerate(items)}

    def __call__(self, batch: Any, entries: Mapping[str, Any], reserved: frozenset[str]) -> Any:
        """The model's output. ``reserved`` names entries that a model with ``**kwargs`` does not get either.

        Raises ValueError where a mapping holds nothing that ``forward`` takes.
        """
        if not isinstance(batch, Mapping):
            values = list(entries.values())
            return self.model(*(values if self._variadic else values[: max(1, self._positional)]))
        passed = {
            key: value
            for key, value in entries.items()
            if key in self._named or (self._takes_any and key not in reserved)
        }
        if not passed:
            raise ValueError(
                f"batches: {type(self.model).__name__}.forward takes {', '.join(sorted(self._named))}, "
                f"and the batch holds {', '.join(entries)}"
            )
        return self.model(**passed)

    def _placed(self, value: Any) -> Any:
        value = as_tensor(value)
        return value.to(self._device) if isinstance(value, Tensor) and self._device is not None else value
