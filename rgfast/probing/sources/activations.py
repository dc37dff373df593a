"""Activations that exist already, as sequences in their order and batches of bounded size."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgfast.probing.capture.axes import AxesSpec, laid_out
from rgfast.probing.capture.padding import as_keep, is_padding_name
from rgfast.probing.options import human_bytes
from rgfast.probing.sources.finding import FilesAre, find
from rgfast.probing.sources.layout import Group, Layer, check_layouts, tabulate
from rgfast.probing.sources.shards import IDS
from rgfast.probing.unread import Unread
from rgfast.validation import check_positive_int

__all__ = ["KEEP", "ActivationBatch", "Activations"]

# The entry that tells padding.
KEEP = "attention_mask"

# Bytes that are read at a time: enough that a disk reads on, whatever a batch takes.
_BLOCK = 128 << 20


@dataclass(frozen=True)
class ActivationBatch:
    """Some sequences of an :class:`Activations`, from number ``start`` on.

    ``layers[name]`` is ``[B, T, D]``. ``keep`` ``[B, T]`` bool says which positions count, None: all do.
    ``entries`` are the other arrays by name, ``[B, ...]``, and ``ids`` those of the sequences.
    """

    start: int
    layers: dict[str, Tensor]
    keep: Tensor | None
    entries: dict[str, Tensor]
    ids: tuple[int | str, ...] | None

    def __len__(self) -> int:
        return len(next(iter(self.layers.values())))


class Activations:
    """Activations that exist already: what :func:`rgfast.probe` measures in place of a model and its batches.

    Nothing is read but shapes when this is made, and later no more than 128 MiB at a time (or one sequence),
    in an order that a disk likes: files one by one if each holds all layers, long stretches of each in turn
    if each holds a layer. Nothing is unpickled.

    Args:
        source: one of

            - a mapping from names of layers to arrays: tensors, numpy arrays and memory maps, or anything
              with ``shape``, ``dtype`` and ``[...]`` (h5py, zarr); also one array, of one layer or, if it has
              an axis L, of many;
            - a list of such mappings, one per batch or request;
            - a folder of ``.npy`` files, one per layer, or one such file;
            - a folder of ``.safetensors`` files, or one: see ``files``;
            - a folder that ``probe(..., keep=...)`` wrote.

            Arrays of floats are layers. Whole numbers and bool, and padding masks of any kind, are entries,
            which go by their names to ``mask=``, ``padding=`` and ``targets=``. The entry ``ids`` numbers or
            names the sequences. Files are in the natural order of their names (9 before 10), whatever order
            the folder lists them in, and so are layers; a mapping has its own order.
        axes: which axis is which, such as ``"N T D"``: N samples, D features, L layers, other letters
            positions, flattened in their order. Also layouts by pattern of names. Without N each file is one
            sequence: ``"T D"``, ``"T L D"``. By default ``[N, D]``, ``[N, T, D]``, and of requests ``[D]``,
            ``[T, D]``, and ``[T, L, D]`` or ``[L, T, D]`` as ``token_ids`` tell.
        ids: what identifies the sequences, whole numbers or text, all different: a sequence of them, or the
            name of the entry that holds them (``"ids"`` is read by itself). Those of requests are the files'
            names, and ``ids`` that name them give their order. They are compared where two sets of
            activations meet.
        files: what a ``.safetensors`` file is: one of the ``"layers"``, of the ``"batches"`` (all layers of
            some sequences) or of the ``"requests"`` (all layers of one sequence, as inference servers write
            ``hidden_states`` beside ``token_ids``). ``"auto"`` finds out, and refuses what may be several.

    Requests may differ in length, and so may batches that have ``attention_mask`` or ``input_ids``: they are
    padded to the longest, and padding does not count.

    Raises FileNotFoundError if there is nothing at the path; TypeError for what is no array; ValueError,
    naming the file, for one that is truncated, lacks a layer, or has one of another width, depth or dtype,
    for axes that a shape, ids or tokens contradict, and for ids that are repeated, too few or too many.

    >>> import torch, rgfast
    >>> saved = {"embedding": torch.randn(100, 5, 8), "block": torch.randn(100, 5, 8)}
    >>> acts = rgfast.Activations(saved, axes="N T D")
    >>> acts
    Activations of 100 sequences, 2 layers, 5 positions (31.2 KiB)
    >>> rgfast.probe(acts, progress=False).layers
    ('embedding', 'block')
    """

    def __init__(
        self,
        source: Any,
        axes: AxesSpec = None,
        *,
        ids: Sequence[int | str] | NDArray[Any] | str | None = None,
        files: FilesAre = "auto",
    ) -> None:
        check_layouts(axes)
        found = find(source, axes, files)
        self._path = found.path
        groups, given = _ordered(found.groups, ids)
        table = tabulate(groups, found.axes, trusted=found.is_store)
        if found.layers is not None and {*found.layers} != {*table.layers}:
            odd = sorted({*found.layers} ^ {*table.layers})
            raise ValueError(f"path: {found.path} names and holds other layers ({', '.join(odd)})")
        self._table = table
        self._numbers = tuple(range(len(groups)))
        self._whole = self
        self.layers: tuple[str, ...] = found.layers or tuple(table.layers)
        self.ids = self._identified(given if given is not None else found.ids)
        self._mask = self._mask_of_all()

    def _identified(self, given: Any) -> tuple[int | str, ...] | None:
        """The ids. Raises TypeError or ValueError for those that identify no sequence."""
        groups, n = self._table.groups, self._table.sequences
        if given is None and all(IDS in group.arrays for group in groups):
            given = IDS
        if given is None and all(group.request and group.stem for group in groups):
            given = [group.stem for group in groups]
        if given is None:
            return None
        if isinstance(given, str):
            lacking = next((group for group in groups if given not in group.arrays), None)
            if lacking is not None:
                raise ValueError(f"ids: there is no {given!r} in {lacking.name}")
            given = [one for group in groups for one in _ids_in(group, given)]
        found = tuple(map(_id, given))
        if len({type(one) for one in found}) > 1:
            raise TypeError("ids must be all whole numbers or all text, got both")
        first: dict[int | str, int] = {}
        for number, one in enumerate(found):
            if one in first:
                where = {self._group_of(k).name: None for k in (first[one], number) if k < n}
                raise ValueError(f"ids must be different, got {one!r} twice (in {' and '.join(where)})")
            first[one] = number
        if len(found) != n:
            key = groups[0].layers()[0]
            raise ValueError(
                f"ids must be one per sequence, got {len(found)}, and by axes there are {n} sequences "
                f"({groups[0].called(key)} has shape {groups[0].stored(key).shape})"
            )
        return found

    def _mask_of_all(self) -> str | None:
        """The entry that says which positions of all layers are padding.

        Raises ValueError if there are several and the sequences differ in length.
        """
        masks = [name for name in self.entries if is_padding_name(name)]
        if KEEP in masks or len(masks) < 2:
            return KEEP if KEEP in masks else next(iter(masks), None)
        if self.is_ragged:
            raise ValueError(
                f"path: sequences that differ in length must have one padding mask, got {', '.join(masks)}"
            )
        return None

    def _group_of(self, sequence: int) -> Group:
        return self._table.groups[int(np.searchsorted(self._table.starts, sequence, "right")) - 1]

    def __len__(self) -> int:
        return self._table.sequences

    @property
    def shards(self) -> tuple[str, ...]:
        """What holds all layers of some sequences each: files, batches or requests, or one for all."""
        return tuple(group.name for group in self._table.groups)

    def of_shards(self, shards: Sequence[int]) -> Activations:
        """The sequences of some of the shards, by their numbers in :attr:`shards`, in this order.

        It is what one of several processes reads, if it is not to be every rank's part in their order. A part
        has the layers of the whole, padded to the same length. Raises TypeError for what is no number,
        ValueError for one that is out of range or there twice.

        >>> import torch, rgfast
        >>> acts = rgfast.Activations([{"block": torch.randn(10, 3, 8)} for _ in range(4)], "N T D")
        >>> len(acts), len(acts.of_shards([3, 0]))
        (40, 20)
        """
        numbers = list(shards)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
                raise TypeError(f"shards must be whole numbers, got {number!r}")
            if not 0 <= number < len(self._numbers):
                raise ValueError(f"shards must be numbers from 0 to {len(self._numbers) - 1}, got {number}")
            if numbers.count(number) > 1:
                raise ValueError(f"shards must not repeat a number, got {number} twice")
        part = copy.copy(self)
        part._table = self._table.of(numbers)
        part._numbers = tuple(self._numbers[number] for number in numbers)
        part.ids = None if self.ids is None else self._ids_of(numbers)
        return part

    def _ids_of(self, shards: Sequence[int]) -> tuple[int | str, ...]:
        assert self.ids is not None
        starts = self._table.starts
        return tuple(one for k in shards for one in self.ids[starts[k] : starts[k + 1]])

    @property
    def whole(self) -> Activations:
        """What :meth:`of_shards` was asked of first; this itself if it is no part."""
        return self._whole

    @property
    def numbers(self) -> tuple[int, ...]:
        """The shards by their numbers in the whole."""
        return self._numbers

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many positions each sequence has ``[n]``, those of its first layer if layers differ."""
        return np.repeat(np.array(self._table.lengths, dtype=np.int64), self._table.sizes)

    @property
    def widths(self) -> dict[str, int]:
        """How many features each layer has."""
        return {name: self._table.layers[name].width for name in self.layers}

    @property
    def is_ragged(self) -> bool:
        """Whether sequences differ in length."""
        return self._table.ragged

    @property
    def entries(self) -> tuple[str, ...]:
        """The names of the arrays that are no layers."""
        return self._table.entries

    @property
    def nbytes(self) -> int:
        """Bytes of all layers of all sequences, padding counted."""
        return len(self) * self._bytes(self.layers)

    @property
    def source(self) -> str:
        """Where the activations are: a path, or memory."""
        return "memory" if self._path is None else str(self._path)

    def __repr__(self) -> str:
        lengths, span = self.lengths, f"{self._table.longest}"
        if self.is_ragged and len(lengths):
            span = f"{lengths.min()} to {lengths.max()}"
        return (
            f"Activations of {len(self)} sequences, {len(self.layers)} layers, {span} positions "
            f"({human_bytes(self.nbytes)})"
        )

    def batches(
        self,
        size: int = 256,
        layers: Sequence[str] | None = None,
        *,
        first: int = 0,
        stop: int | None = None,
    ) -> Iterator[ActivationBatch]:
        """Batches of ``size`` sequences in their order, or fewer that take 128 MiB.

        ``layers`` reads only these, ``first`` and ``stop`` only the sequences from one number to before
        another. Raises ValueError for an unknown layer, and for a file that has changed.
        """
        check_positive_int(size, "size")
        names = self.layers if layers is None else tuple(layers)
        if unknown := [name for name in names if name not in self._table.layers]:
            raise ValueError(f"layers: there is no {unknown[0]!r}; the layers are {', '.join(self.layers)}")
        most = max(1, _BLOCK // self._bytes(names))
        size = min(size, most)
        block = most // size * size
        stop = len(self) if stop is None else min(stop, len(self))
        for start in range(first, stop, block):
            read = self._read(start, min(start + block, stop), names)
            for at in range(0, len(read), size):
                yield _part(read, at, size)

    def _bytes(self, names: Sequence[str]) -> int:
        """Bytes of a sequence that is as long as the longest."""
        table = self._table
        return sum(
            table.places[name] * table.layers[name].width * table.layers[name].dtype.itemsize
            for name in names
        )

    def _read(self, start: int, stop: int, names: Sequence[str]) -> ActivationBatch:
        table = self._table
        pieces = []
        first = int(np.searchsorted(table.starts, start, "right")) - 1
        for number in range(first, len(table.groups)):
            begin = int(table.starts[number])
            if begin >= stop:
                break
            part = slice(max(start, begin) - begin, min(stop - begin, table.sizes[number]))
            pieces.append((number, part))
        by_layer: dict[str, list[Tensor]] = {name: [] for name in names}
        by_entry: dict[str, list[Tensor]] = {name: [] for name in table.entries}
        for number, part in pieces:
            group = table.groups[number]
            for name in names:
                by_layer[name].append(_rows(group, table.layers[name], part))
            for name in table.entries:
                by_entry[name].append(_values(group, name, part))
            for shard in {id(shard): shard for shard, _ in group.arrays.values()}.values():
                shard.close()
        layers = {name: _padded(found, table.places[name]) for name, found in by_layer.items()}
        entries = {
            name: _padded(found, table.longest if name in table.by_token else None)
            for name, found in by_entry.items()
        }
        ids = None if self.ids is None else self.ids[start:stop]
        return ActivationBatch(start, layers, self._keep(start, stop, entries), entries, ids)

    def _keep(self, start: int, stop: int, entries: Mapping[str, Tensor]) -> Tensor | None:
        """Which positions count, by the lengths and the padding mask of the store."""
        name = self._mask
        keep = None if name is None else as_keep(entries[name], name, {}, Unread())
        if not self.is_ragged:
            return keep
        lengths = torch.from_numpy(self.lengths[start:stop])
        there = torch.arange(self._table.longest, dtype=torch.int64, device="cpu") < lengths[:, None]
        return there if keep is None else there & keep


def _ordered(groups: list[Group], ids: Any) -> tuple[list[Group], Any]:
    """Requests in the order of ids that name their files, and the ids."""
    stems = {group.stem: group for group in groups if group.request and group.stem}
    if ids is None or isinstance(ids, str):
        return groups, ids
    given = [_id(one) for one in ids]
    if not stems or not any(one in stems for one in given):
        return groups, given
    if lacking := [one for one in given if one not in stems]:
        raise ValueError(f"ids: there is no file of request {lacking[0]!r} in {Path(groups[0].name).parent}")
    if more := [stem for stem in stems if stem not in {*given}]:
        raise ValueError(f"ids: request {stems[more[0]].name} is not among them")
    return [stems[str(one)] for one in dict.fromkeys(given)], given


def _ids_in(group: Group, key: str) -> list[Any]:
    shard, name = group.arrays[key]
    stored = group.stored(key)
    if stored.dtype is None:
        return shard.text(name)
    if stored.dtype.is_floating_point or len(stored.shape) > 1:
        raise ValueError(
            f"ids: {group.called(key)} must be whole numbers or text, one per sequence, got "
            f"{str(stored.dtype).removeprefix('torch.')} of shape {stored.shape}"
        )
    found: list[int] = shard.read(name, (slice(None),) * len(stored.shape)).reshape(-1).tolist()
    shard.close()
    return found


def _id(one: Any) -> int | str:
    if isinstance(one, Tensor) and one.dim() == 0:
        one = one.item()
    if isinstance(one, np.generic):
        one = one.item()
    if isinstance(one, bool) or not isinstance(one, (int, str)):
        raise TypeError(f"ids must be whole numbers or text, got {one!r}")
    if isinstance(one, int) and abs(one) >= 2**63:
        raise ValueError(f"ids must lie in the range of int64, got {one}")
    return one


def _rows(group: Group, layer: Layer, part: slice) -> Tensor:
    """``[B, T, D]`` of some of the sequences of a group."""
    shard, key = group.arrays[layer.key]
    one = {} if layer.number is None else {"L": slice(layer.number, layer.number + 1)}
    chosen = {"N": part, **one}
    x = shard.read(key, tuple(chosen.get(letter, slice(None)) for letter in layer.letters))
    letters = list(layer.letters)
    if layer.number is not None:
        x = x.squeeze(letters.index("L"))
        letters.remove("L")
    if group.request:
        x, letters = x[None], ["N", *letters]
    return laid_out(x, " ".join(letters), layer.name)


def _values(group: Group, name: str, part: slice) -> Tensor:
    shard, key = group.arrays[name]
    rest = (slice(None),) * (len(group.stored(name).shape) - (0 if group.request else 1))
    if group.request:
        return shard.read(key, rest)[None]
    return shard.read(key, (part, *rest))


def _padded(parts: list[Tensor], length: int | None) -> Tensor:
    """``parts`` end to end, with zeros up to ``length`` on their second axis if one is given."""
    if length is None or all(x.shape[1] == length for x in parts):
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    first = parts[0]
    out = first.new_zeros(sum(map(len, parts)), length, *first.shape[2:])
    at = 0
    for x in parts:
        out[at : at + len(x), : x.shape[1]] = x
        at += len(x)
    return out


def _part(read: ActivationBatch, at: int, size: int) -> ActivationBatch:
    some = slice(at, at + size)
    return ActivationBatch(
        read.start + at,
        {name: x[some] for name, x in read.layers.items()},
        None if read.keep is None else read.keep[some],
        {name: x[some] for name, x in read.entries.items()},
        None if read.ids is None else read.ids[some],
    )
