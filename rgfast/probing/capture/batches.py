"""Batches of any usual form, as entries by name and a call of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from rgfast.validation import from_array, is_shared, kind_and_way, refuse_masked

__all__ = [
    "as_entry",
    "batch_items",
    "batch_rows",
    "check_order",
    "entry_name",
    "is_array",
    "iterate",
    "only_numbers",
    "sequences_of",
    "shuffles",
]


def iterate(batches: Any, batch_size: int) -> Iterator[Any]:
    """The batches one by one: those of an iterable, or pieces of ``batch_size`` rows of one mapping or array.

    Raises TypeError for what cannot be iterated, ValueError where entries of one mapping differ in length.
    """
    if isinstance(batches, Mapping):
        whole = {key: _shared(value, entry_name(key)) for key, value in batches.items()}
        lengths = {key: len(value) for key, value in whole.items() if is_array(value) and value.ndim}
        if not lengths:
            raise ValueError("batches must hold at least one array, got a mapping without any")
        if len(set(lengths.values())) != 1:
            raise ValueError(f"batches: entries must have the same number of rows, got {lengths}")
        for start in range(0, next(iter(lengths.values())), batch_size):
            yield {
                key: as_entry(value[start : start + batch_size], entry_name(key)) if key in lengths else value
                for key, value in whole.items()
            }
    elif is_array(batches):
        if not batches.ndim:
            raise ValueError("batches must have a row for every sequence, got a single number")
        array = _shared(batches, "batches")
        for start in range(0, len(array), batch_size):
            yield as_entry(array[start : start + batch_size], "batches")
    elif isinstance(batches, Iterable) and not (
        isinstance(batches, (str, bytes)) or hasattr(batches, "to_numpy")
    ):
        yield from batches
    else:
        raise TypeError(
            f"batches must be an iterable of batches, a mapping of arrays or an array, got "
            f"{kind_and_way(batches)}"
        )


def entry_name(key: Any) -> str:
    """What messages call an entry of a batch."""
    return f"batches[{key!r}]"


def as_entry(value: Any, name: str) -> Any:
    """numpy arrays as tensors that a model may write to, everything else as it is.

    Raises TypeError for tables of other libraries and what :func:`rgfast.validation.from_array` refuses.
    """
    if isinstance(value, np.ndarray):
        return from_array(value, name, writable=True)
    if hasattr(value, "to_numpy"):
        raise TypeError(f"{name} must be a tensor or an array, got {kind_and_way(value)}")
    return value


def is_array(value: Any) -> bool:
    """Whether ``value`` is a tensor or a numpy array."""
    return isinstance(value, (Tensor, np.ndarray))


def only_numbers(value: Any) -> bool:
    """Whether ``value`` is a number, or nested lists of them."""
    if isinstance(value, (list, tuple)):
        return bool(value) and only_numbers(value[0])
    return isinstance(value, (int, float, np.number))


def _shared(value: Any, name: str) -> Any:
    """:func:`as_entry` of a whole array, but if that would copy it: its batches are copied, one by one."""
    if isinstance(value, np.ndarray):
        refuse_masked(value, name)
        return from_array(value, name) if is_shared(value) else value
    return as_entry(value, name)


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


def sequences_of(batches: Any) -> int | None:
    """How many rows all ``batches`` have, None if that is known only once they have come."""
    if isinstance(batches, Mapping):
        return next((len(x) for x in batches.values() if is_array(x) and x.ndim), None)
    if is_array(batches):
        return len(batches) if batches.ndim else None
    if isinstance(batches, (list, tuple)):
        return sum(map(batch_rows, batches))
    if isinstance(batches, DataLoader) and type(batches.batch_sampler) is BatchSampler:
        return None if batches.drop_last or not isinstance(batches.sampler, Sized) else len(batches.sampler)
    return None


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


def check_order(ordered: Iterable[tuple[str, str]], batches: Any) -> None:
    """Raise ValueError if ``batches`` come in another order than arrays over all sequences, each of which is
    what messages call it and what a batch would hold instead."""
    first = next(iter(ordered), None)
    if first is not None and (sampler := shuffles(batches)):
        said, what = first
        raise ValueError(
            f"{said} must be in the order of the sequences, and the loader shuffles them "
            f"({sampler}); let the batches hold {what} and give its entry's name, or take shuffle=False"
        )
