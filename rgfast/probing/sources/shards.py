"""Files and mappings that hold arrays: what is in them, and a part of one array in memory of its own."""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rgfast.validation import FLOATS, from_array, kind_and_way

__all__ = ["IDS", "Index", "Shard", "Stored", "in_memory", "natural", "npy_file", "safetensors_file"]

IDS = "ids"
Index = tuple[slice, ...]

# The names of safetensors for what may be a layer, and for what else is read.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.int64, "U32": torch.int64, "U64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """An array in a shard: its shape and dtype, None for text."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def is_layer(self) -> bool:
        """Whether it holds floats."""
        return self.dtype in FLOATS


class Shard(Protocol):
    """A file, or a mapping in memory: ``name`` is what messages call it, ``stem`` a file's name without its
    ending."""

    name: str
    stem: str
    arrays: dict[str, Stored]

    def read(self, key: str, index: Index) -> Tensor:
        """A part of an array."""

    def text(self, key: str) -> list[str]:
        """All of an array of text."""

    def close(self) -> None:
        """Let go of the file until the next part is read."""


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A sort key under which ``layer_10`` comes after ``layer_9``."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(p), "") if p.isdecimal() else (0, 0, p) for p in parts], name


class _Npy:
    """An ``.npy`` file. It is mapped anew for every part, so that no pages of earlier ones stay."""

    def __init__(self, path: Path) -> None:
        self.name, self.stem, self._path = str(path), path.stem, path
        whole = self._map()
        self._kind = whole.dtype
        kind = None
        if whole.dtype.kind != "U":
            try:
                kind = from_array(np.empty(0, whole.dtype), self.name).dtype
            except TypeError as error:
                raise ValueError(f"path: {error}") from None
        self.arrays = {self.stem: Stored(whole.shape, kind)}

    def _map(self) -> np.ndarray[Any, Any]:
        try:
            # An empty array, and a single number, cannot be mapped.
            found = np.load(self._path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # of any type: numpy's parser of headers has its own
            if isinstance(error, OSError) and error.filename is not None:
                raise
            if "Python objects" in str(error) or "pickle" in str(error).lower():
                raise ValueError(
                    f"path: {self.name} holds pickled objects, or is no .npy file, and nothing is unpickled"
                ) from error
            raise ValueError(f"path: {self.name} is truncated or damaged ({error})") from error
        array: np.ndarray[Any, Any] = found
        return array

    def read(self, key: str, index: Index) -> Tensor:
        whole = self._map()
        if whole.shape != self.arrays[key].shape or whole.dtype != self._kind:
            raise ValueError(_changed(self.name))
        return from_array(np.array(whole[index]), self.name)

    def text(self, key: str) -> list[str]:
        return [str(value) for value in self._map().reshape(-1)]

    def close(self) -> None:
        pass


class _Safetensors:
    """A ``.safetensors`` file, which is open from the first part that is read until it is closed."""

    def __init__(self, path: Path) -> None:
        self.name, self.stem, self._path = str(path), path.stem, path
        self.arrays = {}
        self._file: Any = None
        with self._open() as file:
            self.metadata: dict[str, str] = file.metadata() or {}
            for key in sorted(file.keys(), key=natural):
                part = file.get_slice(key)
                kind = part.get_dtype()
                if kind not in _DTYPES:
                    raise ValueError(
                        f"path: {key!r} of {self.name} must be of one of {', '.join(_DTYPES)}, got {kind}"
                    )
                self.arrays[key] = Stored(tuple(part.get_shape()), _DTYPES[kind])

    def _open(self) -> Any:
        try:
            return safe_open(self._path, framework="pt")
        except (SafetensorError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"path: {self.name} is truncated or no .safetensors file ({error})") from error

    def read(self, key: str, index: Index) -> Tensor:
        if self._file is None:
            self._file = self._open()
        stored = self.arrays[key]
        try:
            part = self._file.get_slice(key)
            same = tuple(part.get_shape()) == stored.shape and _DTYPES[part.get_dtype()] == stored.dtype
        except (SafetensorError, KeyError):
            same = False
        if not same:
            raise ValueError(_changed(self.name))
        found: Tensor = part[index] if stored.shape else self._file.get_tensor(key)
        # What came maps the file, and would keep its pages.
        return found.to(stored.dtype) if found.dtype != stored.dtype else found.clone()

    def text(self, key: str) -> list[str]:
        raise TypeError(f"path: {key} in {self.name} must be text, which these files do not hold")

    def close(self) -> None:
        self._file = None


class _Memory:
    """Arrays, tensors, or anything with ``shape``, ``dtype`` and ``[...]``, by name."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self.name, self.stem = name, ""
        self._values = {str(key): value for key, value in values.items()}
        self.arrays = {key: self._stored(key, value) for key, value in self._values.items()}

    def _stored(self, key: str, value: Any) -> Stored:
        called = f"{self.name}[{key!r}]" if key else self.name
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_complex() or value.is_nested:
                raise TypeError(f"{called} must be dense and of real numbers, got {value.layout}")
            return Stored(tuple(value.shape), value.dtype)
        if isinstance(value, (list, tuple)) and key == IDS:
            self._values[key] = value = np.array(value)
        if not all(hasattr(value, name) for name in ("shape", "dtype", "__getitem__")):
            raise TypeError(
                f"{called} must be a tensor, an array or have shape, dtype and [...], got "
                f"{kind_and_way(value)}"
            )
        if isinstance(value.dtype, torch.dtype):
            return Stored(tuple(value.shape), value.dtype)
        kind = np.dtype(value.dtype)
        if kind.kind == "U":
            return Stored(tuple(value.shape), None)
        return Stored(tuple(value.shape), from_array(np.empty(0, kind), called).dtype)

    def read(self, key: str, index: Index) -> Tensor:
        value = self._values[key]
        # What is no array of numpy or torch may know no more than a slice of its first axis.
        some = all(part == slice(None) for part in index[1:])
        found = value[index[0] if index and some else index]
        if isinstance(found, Tensor):
            return found.detach()
        mapped = getattr(value, "base", None)
        if isinstance(value, np.memmap) and isinstance(mapped, mmap.mmap) and value.mode in ("r", "r+"):
            found = np.array(found)
            if hasattr(mmap, "MADV_DONTNEED"):  # else pages that were read would pile up
                mapped.madvise(mmap.MADV_DONTNEED)
        return from_array(np.asarray(found), f"{self.name}[{key!r}]")

    def text(self, key: str) -> list[str]:
        return [str(value) for value in self._values[key].reshape(-1)]

    def close(self) -> None:
        pass


def _changed(name: str) -> str:
    return f"path: {name} has changed since it was opened; make new Activations of it"


def npy_file(path: Path) -> Shard:
    """The array in an ``.npy`` file, by the file's name. Raises ValueError for damaged and pickled ones."""
    return _Npy(path)


def safetensors_file(path: Path) -> tuple[Shard, dict[str, str]]:
    """The tensors of a ``.safetensors`` file, and its metadata. Raises ValueError for a damaged one."""
    found = _Safetensors(path)
    return found, found.metadata


def in_memory(name: str, values: Mapping[str, Any]) -> Shard:
    """Arrays by name, of which ``name`` is what messages call them. Raises TypeError for what is no array."""
    return _Memory(name, values)
