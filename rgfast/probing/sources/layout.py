"""Which array is a layer, which of its axes is which, and whether all files agree."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from rgfast.probing.capture.axes import AxesSpec
from rgfast.probing.capture.padding import is_padding_name
from rgfast.probing.capture.patterns import by_layer
from rgfast.probing.sources.shards import IDS, Shard, Stored

__all__ = ["TOKENS", "Group", "Layer", "Table", "check_layouts", "tabulate", "without_samples"]

# Entries that have a number for every position.
TOKENS = ("token_ids", "input_ids")

_LETTERS = "N (samples), L (layers), D (features) and other capital letters (places)"
_BY_SAMPLE = {2: "N D", 3: "N T D"}
_BY_REQUEST = {1: "D", 2: "T D"}
_STACKED = ("T L D", "L T D")  # what a server may write for a request


@dataclass(frozen=True)
class Group:
    """Sequences whose activations lie in the same shards: ``arrays[key]`` is a shard and the array's name in
    it. ``request``: it is one sequence, and its arrays have no axis of samples."""

    name: str
    stem: str
    arrays: Mapping[str, tuple[Shard, str]]
    request: bool

    def stored(self, key: str) -> Stored:
        """Shape and dtype of an array."""
        shard, name = self.arrays[key]
        return shard.arrays[name]

    def called(self, key: str) -> str:
        """What messages call an array."""
        name = self.arrays[key][0].name
        return f"{key!r} of {name}" if key else name

    def layers(self) -> list[str]:
        """The arrays that are layers: floats, but for padding masks."""
        return [key for key in self.arrays if self.stored(key).is_layer and not is_padding_name(key)]

    def entries(self) -> list[str]:
        """The arrays that are none, but for ids."""
        layers = {*self.layers(), IDS}
        return [key for key in self.arrays if key not in layers]


@dataclass(frozen=True)
class Layer:
    """A layer: the array that it is (the ``number``-th slice of) and what the array's axes are."""

    name: str
    key: str
    letters: tuple[str, ...]
    number: int | None
    width: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Table:
    """What a store holds. ``sizes[g]`` are the sequences of a group, ``lengths[g]`` the positions that all
    its layers have if it is ``ragged`` (groups differ in them), ``places`` those of each layer, by name, in
    the longest. ``by_token`` are the entries that have a value for every position."""

    groups: Sequence[Group]
    layers: Mapping[str, Layer]
    sizes: Sequence[int]
    lengths: Sequence[int]
    places: Mapping[str, int]
    ragged: bool
    entries: tuple[str, ...]
    by_token: frozenset[str]
    starts: np.ndarray[Any, np.dtype[np.int64]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", np.concatenate([[0], np.cumsum(self.sizes)]))

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return int(self.starts[-1])

    @property
    def longest(self) -> int:
        """What shorter sequences are padded to, those of other groups of the same store as well."""
        return max(self.places.values())

    def of(self, numbers: Sequence[int]) -> Table:
        """Some of the groups."""
        return replace(
            self,
            groups=[self.groups[k] for k in numbers],
            sizes=[self.sizes[k] for k in numbers],
            lengths=[self.lengths[k] for k in numbers],
        )


def check_layouts(axes: Any) -> None:
    """Raise TypeError or ValueError unless ``axes`` is None, a layout, or layouts by pattern of names."""
    for layout in _all(axes):
        if not isinstance(layout, str):
            raise TypeError(f"axes must be a layout of {_LETTERS}, or layouts by name, got {layout!r}")
        letters = layout.split()
        if not all(re.fullmatch("[A-Z]", letter) for letter in letters) or len({*letters}) < len(letters):
            raise ValueError(f"axes must be different letters with spaces between, got {layout!r}")
        if "D" not in letters:
            raise ValueError(f"axes must hold D (features), and may hold {_LETTERS}, got {layout!r}")
    if len({"N" in layout.split() for layout in _all(axes)}) > 1:
        raise ValueError("axes must have N (samples) in every layout, or in none if a file is a request")


def without_samples(axes: AxesSpec) -> bool:
    """Whether layouts were given, and have no samples: every file is one sequence."""
    return bool(_all(axes)) and not any("N" in layout.split() for layout in _all(axes))


def _all(axes: Any) -> list[Any]:
    if axes is None:
        return []
    return list(axes.values()) if isinstance(axes, Mapping) else [axes]


def tabulate(groups: Sequence[Group], axes: AxesSpec, *, trusted: bool = False) -> Table:
    """What groups hold, read by ``axes``; ``trusted``: lengths need no entry that confirms them.

    Raises ValueError, naming the file, for an array that one group lacks, shapes that contradict the axes or
    each other, and widths or dtypes that differ.
    """
    first = groups[0]
    keys = first.layers()
    if not keys:
        raise ValueError(f"path: {first.name} holds no floats, so there is no layer")
    _check_keys(groups, keys)
    letters = _layouts(groups, keys, axes)
    sizes = [_samples(group, letters) for group in groups]
    layers = {layer.name: layer for key in keys for layer in _layers(first, key, letters[key])}
    times = [_places(group, groups[0], letters) for group in groups]
    ragged = any(found != times[0] for found in times)
    for group, found in zip(groups, times, strict=True):
        _check_tokens(group, found, letters)
    lengths = [next(iter(found.values())) for found in times]
    if ragged:
        _check_ragged(groups, times, letters, trusted)
    places = {layer.name: max(lengths) if ragged else times[0][layer.key] for layer in layers.values()}
    entries, by_token = _entries(groups, lengths, ragged)
    return Table(groups, layers, sizes, lengths, places, ragged, entries, by_token)


def _check_keys(groups: Sequence[Group], keys: Sequence[str]) -> None:
    for group in groups:
        found = group.layers()
        if lacking := [key for key in keys if key not in found]:
            raise ValueError(f"path: {group.name} lacks {_listed(lacking)}, which {groups[0].name} has")
        if more := [key for key in found if key not in keys]:
            raise ValueError(f"path: {group.name} has {_listed(more)}, which {groups[0].name} lacks")


def _layouts(groups: Sequence[Group], keys: Sequence[str], axes: AxesSpec) -> dict[str, tuple[str, ...]]:
    found = {}
    for key, (_, asked) in zip(keys, by_layer("axes", axes, keys), strict=True):
        layout = _usual(groups, key) if asked is None else asked
        letters = tuple(layout.split())
        for group in groups:
            shape = group.stored(key).shape
            if len(shape) != len(letters):
                raise ValueError(
                    f"axes: {layout!r} has {len(letters)} axes, and {group.called(key)} has shape {shape}"
                )
            if 0 in [size for letter, size in zip(letters, shape, strict=True) if letter != "N"]:
                raise ValueError(f"axes: {group.called(key)} has an empty axis, got shape {shape}")
        found[key] = letters
    return found


def _usual(groups: Sequence[Group], key: str) -> str:
    """The layout of an array that none was given for."""
    group = groups[0]
    shape = group.stored(key).shape
    usual = (_BY_REQUEST if group.request else _BY_SAMPLE).get(len(shape))
    if usual is None and group.request and len(shape) == 3:
        fitting = [layout for layout in _STACKED if _fits(groups, key, layout)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise ValueError(
                f"axes: {group.called(key)} of shape {shape} may be {' or '.join(fitting)}, as far as its "
                f"tokens tell; say which, as in axes={fitting[0]!r}"
            )
    if usual is None:
        shown = "'T L D'" if group.request else "'N H W D'"
        raise ValueError(
            f"axes: nothing tells the axes of {group.called(key)} of shape {shape}; say which is which, as "
            f"in axes={shown}: {_LETTERS}"
        )
    return usual


def _fits(groups: Sequence[Group], key: str, layout: str) -> bool:
    """Whether a layout has as many positions as tokens, and as many layers, in every request."""
    letters = layout.split()
    depth = groups[0].stored(key).shape[letters.index("L")]
    for group in groups:
        shape = group.stored(key).shape
        tokens = [group.stored(name).shape for name in TOKENS if name in group.arrays]
        if len(shape) != 3 or shape[letters.index("L")] != depth or not tokens:
            return False
        if any(found != (shape[letters.index("T")],) for found in tokens):
            return False
    return True


def _samples(group: Group, letters: Mapping[str, tuple[str, ...]]) -> int:
    """How many sequences a group has. Raises ValueError if its arrays differ in that."""
    if group.request:
        return 1
    counts = {key: group.stored(key).shape[found.index("N")] for key, found in letters.items()}
    first = next(iter(counts))
    for key, count in counts.items():
        if count != counts[first]:
            raise ValueError(
                f"axes: {_layout(letters[key])} gives {group.called(key)} of shape {group.stored(key).shape} "
                f"{count} samples, and {group.called(first)} of shape {group.stored(first).shape} has "
                f"{counts[first]} by {_layout(letters[first])}"
            )
    for key in [*group.entries(), *([IDS] if IDS in group.arrays else [])]:
        shape = group.stored(key).shape
        if not shape or shape[0] != counts[first]:
            raise ValueError(
                f"axes: {_layout(letters[first])} gives {group.called(first)} of shape "
                f"{group.stored(first).shape} {counts[first]} samples, and {group.called(key)} has shape "
                f"{shape}"
            )
    return counts[first]


def _layers(group: Group, key: str, letters: tuple[str, ...]) -> list[Layer]:
    stored = group.stored(key)
    sizes = dict(zip(letters, stored.shape, strict=True))
    assert stored.dtype is not None
    if "L" not in sizes:
        return [Layer(key or "activations", key, letters, None, sizes["D"], stored.dtype)]
    return [
        Layer(f"{key}.{number}" if key else str(number), key, letters, number, sizes["D"], stored.dtype)
        for number in range(sizes["L"])
    ]


def _places(group: Group, first: Group, letters: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """How many positions each array has. Raises ValueError if it differs from ``first`` in something else."""
    found = {}
    for key, layout in letters.items():
        stored, other = group.stored(key), first.stored(key)
        if stored.dtype != other.dtype:
            raise ValueError(
                f"path: {group.called(key)} is {_kind(stored)}, and that of {first.name} {_kind(other)}"
            )
        sizes, others = (dict(zip(layout, x.shape, strict=True)) for x in (stored, other))
        for letter, what in (("D", "features"), ("L", "layers")):
            if letter in sizes and sizes[letter] != others[letter]:
                raise ValueError(
                    f"axes: {_layout(layout)} gives {group.called(key)} of shape {stored.shape} "
                    f"{sizes[letter]} {what}, and that of {first.name} of shape {other.shape} has "
                    f"{others[letter]}"
                )
        found[key] = math.prod(size for letter, size in sizes.items() if letter not in "NLD")
    return found


def _check_tokens(group: Group, places: Mapping[str, int], letters: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ValueError if tokens or a padding mask are of another length than all layers."""
    having = [key for key, layout in letters.items() if {*layout} - {*"NLD"}]
    for name in _by_token(group):
        length = group.stored(name).shape[-1]
        if having and length not in {places[key] for key in having}:
            key = having[0]
            raise ValueError(
                f"axes: {_layout(letters[key])} gives {group.called(key)} of shape "
                f"{group.stored(key).shape} {places[key]} positions, and {group.called(name)} has {length}"
            )


def _by_token(group: Group) -> list[str]:
    """The entries that tell how many positions there are."""
    axes = 1 if group.request else 2
    return [
        name
        for name in group.entries()
        if (name in TOKENS or is_padding_name(name)) and len(group.stored(name).shape) == axes
    ]


def _check_ragged(
    groups: Sequence[Group],
    times: Sequence[Mapping[str, int]],
    letters: Mapping[str, tuple[str, ...]],
    trusted: bool,
) -> None:
    for group, places in zip(groups, times, strict=True):
        first = next(iter(places))
        odd = next((key for key, length in places.items() if length != places[first]), None)
        if odd is not None:
            raise ValueError(
                f"axes: sequences that differ in length must have as many positions in every layer, and "
                f"{group.called(first)} has {places[first]}, {group.called(odd)} {places[odd]}"
            )
        if group.request or trusted or _by_token(group):
            continue
        there = next(k for k, found in enumerate(times) if found != places)
        raise ValueError(
            f"axes: {_layout(letters[first])} gives {group.name} {places[first]} positions and "
            f"{groups[there].name} {times[there][first]}, which is right only if every file has "
            "attention_mask or input_ids [N, T]"
        )
    for key, layout in letters.items():
        if len({*layout} - {*"NLD"}) != 1:
            raise ValueError(
                f"axes: {_layout(layout)} of {key!r} must have one axis of places, since sequences differ "
                "in length"
            )


def _entries(
    groups: Sequence[Group], lengths: Sequence[int], ragged: bool
) -> tuple[tuple[str, ...], frozenset[str]]:
    """The entries that all groups have, and which of them have a value for every position.

    Raises ValueError, naming the file, for one that a group lacks or has in another shape or dtype.
    """
    first = groups[0]
    by_token = set()
    lead = 0 if first.request else 1
    for group in groups:
        if {*group.entries()} != {*first.entries()}:
            odd = sorted({*group.entries()} ^ {*first.entries()})
            raise ValueError(f"path: {group.name} and {first.name} do not both have {_listed(odd)}")
    for name in first.entries():
        shapes = [group.stored(name).shape[lead:] for group in groups]
        kinds = [group.stored(name).dtype for group in groups]
        if None in kinds:
            raise ValueError(f"path: {first.called(name)} must be of numbers, got text")
        if ragged and all(s and s[0] == length for s, length in zip(shapes, lengths, strict=True)):
            by_token.add(name)
            shapes = [shape[1:] for shape in shapes]
        for group, shape, kind in zip(groups, shapes, kinds, strict=True):
            if shape != shapes[0] or kind != kinds[0]:
                raise ValueError(
                    f"path: {group.called(name)} is {_kind(group.stored(name))} of shape "
                    f"{group.stored(name).shape}, and that of {first.name} {_kind(first.stored(name))} of "
                    f"shape {first.stored(name).shape}"
                )
    return tuple(first.entries()), frozenset(by_token)


def _layout(letters: Iterable[str]) -> str:
    return repr(" ".join(letters))


def _kind(stored: Stored) -> str:
    return str(stored.dtype).removeprefix("torch.")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
