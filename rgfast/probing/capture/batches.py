"""Batches of any usual form, as entries by name and a call of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

__all__ = ["as_tensor", "batch_items", "batch_rows", "iterate", "shuffles"]


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
    if not isinstance(batch, (tuple, list)):
        return [batch]
    return [item for part in batch for item in (part.values() if isinstance(part, Mapping) else [part])]


def batch_rows(batch: Any) -> int:
    """Rows of a batch: the length of its first array, 1 if it holds none."""
    for item in batch_items(batch):
        if isinstance(item, (Tensor, np.ndarray)) and item.ndim:
            return int(item.size(0)) if isinstance(item, Tensor) else len(item)
    return 1


def shuffles(batches: Any) -> str:
    """The name of the sampler that makes the order of ``batches`` random, as far as it can be seen."""
    if not isinstance(batches, DataLoader):
        return ""
    for holder in (batches, batches.batch_sampler):
        sampler = getattr(holder, "sampler", None)
        if isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)) or (
            isinstance(sampler, DistributedSampler) and sampler.shuffle
        ):
            return type(sampler).__name__
    return ""
