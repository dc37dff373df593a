"""From a path, or arrays in memory, to groups of sequences: which files there are and what each one is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rgfast.probing.capture.axes import AxesSpec
from rgfast.probing.sources.layout import TOKENS, Group, without_samples
from rgfast.probing.sources.shards import IDS, Shard, in_memory, natural, npy_file, safetensors_file
from rgfast.validation import check_choice, kind_and_way

__all__ = ["FORMAT", "KINDS", "MANIFEST", "PART", "VERSION", "FilesAre", "Found", "find"]

FilesAre = Literal["auto", "layers", "batches", "requests"]
KINDS = ("auto", "layers", "batches", "requests")
# What a probe that keeps activations writes: the list of its parts comes last.
MANIFEST, PART = "activations.json", "rgfast.activations.part"
FORMAT, VERSION = "rgfast.activations", 1
_PICKLED = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib")
_OTHERS = "save arrays as .npy or tensors as .safetensors"


@dataclass(frozen=True)
class Found:
    """Groups of sequences in their order, and what a store says of itself: ``axes``, ``layers`` in their
    order and ``ids``; None for what it does not say."""

    groups: list[Group]
    axes: AxesSpec
    layers: tuple[str, ...] | None = None
    ids: list[int | str] | None = None
    path: Path | None = None

    @property
    def is_store(self) -> bool:
        """Whether a probe wrote it."""
        return self.layers is not None


def find(source: Any, axes: AxesSpec, files: FilesAre) -> Found:
    """The groups in ``source``. Raises what :class:`rgfast.Activations` says."""
    check_choice(files, "files", KINDS)
    if isinstance(source, (str, Path)):
        return _on_disk(Path(source), axes, files)
    if files not in ("auto", "requests" if _is_listed(source) else "layers"):
        raise ValueError(f"files: {files!r} is of files, and the activations are in memory")
    if isinstance(source, Mapping):
        if not source:
            raise ValueError("activations must hold at least one layer, got an empty mapping")
        return Found([_whole([in_memory("activations", source)], "activations", False)], axes)
    if _is_listed(source):
        request = files == "requests" or without_samples(axes) or _has_tokens(source)
        shards = [in_memory(f"activations[{k}]", one) for k, one in enumerate(source)]
        return Found([_whole([shard], shard.name, request) for shard in shards], axes)
    if isinstance(source, torch.Tensor) or hasattr(source, "shape"):
        return Found([_whole([in_memory("activations", {"": source})], "activations", False)], axes)
    raise TypeError(
        "activations must be a path, a mapping of arrays by layer, a list of such mappings or one array, got "
        f"{kind_and_way(source)}"
    )


def _is_listed(source: Any) -> bool:
    return isinstance(source, (list, tuple)) and bool(source) and all(isinstance(x, Mapping) for x in source)


def _has_tokens(source: Sequence[Mapping[str, Any]]) -> bool:
    return all(any(len(getattr(x.get(name), "shape", ())) == 1 for name in TOKENS) for x in source)


def _on_disk(path: Path, axes: AxesSpec, files: FilesAre) -> Found:
    if not path.exists():
        raise FileNotFoundError(f"path must be a folder or a file of activations, and there is no {path}")
    if path.is_file():
        return _of_files([path], path, axes, files)
    if (path / MANIFEST).is_file():
        return _store(path, axes, files)
    names = sorted(
        (x for x in path.iterdir() if x.is_file() and x.name[0] != "."), key=lambda x: natural(x.name)
    )
    pickled = [x for x in names if x.suffix in _PICKLED]
    kept = [x for x in names if x.suffix in (".npy", ".safetensors")]
    if pickled and not kept:
        raise ValueError(f"path: {pickled[0]} is pickled, and nothing is unpickled; {_OTHERS}")
    if not kept:
        raise ValueError(f"path: {path} holds no .npy and no .safetensors file")
    if len({x.suffix for x in kept}) > 1:
        raise ValueError(f"path must hold files of one kind, and {path} holds .npy and .safetensors files")
    return _of_files(kept, path, axes, files)


def _of_files(paths: list[Path], path: Path, axes: AxesSpec, files: FilesAre) -> Found:
    suffix = paths[0].suffix
    if suffix in _PICKLED:
        raise ValueError(f"path: {path} is pickled, and nothing is unpickled; {_OTHERS}")
    if suffix == ".npy":
        if files not in ("auto", "layers"):
            raise ValueError(f"files: an .npy file is a layer, got files={files!r}")
        if without_samples(axes):
            raise ValueError("axes must hold N (samples), since an .npy file is a layer of all sequences")
        return Found([_whole([npy_file(one) for one in paths], str(path), False)], axes, path=path)
    if suffix != ".safetensors":
        raise ValueError(f"path must be a folder, an .npy or a .safetensors file, got {path}")
    shards = []
    for one in paths:
        shard, metadata = safetensors_file(one)
        if metadata.get("format") == PART:
            raise ValueError(
                f"path: {one} is part of a store without {MANIFEST}, which is written last: the probe that "
                "was to write it did not end"
            )
        shards.append(shard)
    kind = _kind(shards, path, axes) if files == "auto" else files
    if kind == "layers":
        return Found([_by_layer(shards, str(path))], axes, path=path)
    request = kind == "requests"
    if not request and without_samples(axes):
        raise ValueError("axes must hold N (samples), since a file is a batch")
    return Found([_whole([shard], shard.name, request) for shard in shards], axes, path=path)


def _kind(shards: Sequence[Shard], path: Path, axes: AxesSpec) -> str:
    """What each file is. Raises ValueError if that may be several things."""
    if without_samples(axes):
        return "requests"
    arrays = [{key for key, x in shard.arrays.items() if x.is_layer} for shard in shards]
    if all(any(len(s.arrays[name].shape) == 1 for name in TOKENS if name in s.arrays) for s in shards):
        return "requests"
    if len(shards) == 1:
        return "batches"
    if sum(map(len, arrays)) == len(set().union(*arrays)):
        return "layers"
    if max(map(len, arrays)) > 1:
        return "batches"
    raise ValueError(
        f"files: all files in {path} hold one array of the same name; say whether a file is a layer "
        "(files='layers'), a batch (files='batches') or one sequence (files='requests')"
    )


def _whole(shards: Sequence[Shard], name: str, request: bool) -> Group:
    """A group whose arrays have the names that they have in their shards."""
    arrays = {key: (shard, key) for shard in shards for key in shard.arrays}
    return Group(name, shards[0].stem, arrays, request)


def _by_layer(shards: Sequence[Shard], name: str) -> Group:
    """A group of files that hold some layers each. A layer that all call the same has its file's name.

    Raises ValueError if two files have an entry that differs.
    """
    floats = [key for shard in shards for key, x in shard.arrays.items() if x.is_layer]
    renamed = len({*floats}) < len(floats)
    arrays: dict[str, tuple[Shard, str]] = {}
    for shard in shards:
        for key, stored in shard.arrays.items():
            called = shard.stem if renamed and stored.is_layer else key
            if called not in arrays:
                arrays[called] = shard, key
                continue
            first, _ = arrays[called]
            if stored.is_layer:
                raise ValueError(f"files: {shard.name} is a layer, and must hold one array of floats")
            if first.arrays[key] != stored or not _same(first, shard, key):
                what = "the sequences in another order or others" if key == IDS else "another " + repr(key)
                raise ValueError(f"path: {shard.name} has {what} than {first.name}")
    return Group(name, "", arrays, False)


def _same(one: Shard, other: Shard, key: str) -> bool:
    every = (slice(None),) * len(one.arrays[key].shape)
    same = torch.equal(one.read(key, every), other.read(key, every))
    one.close()
    other.close()
    return same


def _store(path: Path, axes: AxesSpec, files: FilesAre) -> Found:
    """What a probe kept."""
    manifest = path / MANIFEST
    try:
        said = json.loads(manifest.read_text(encoding="utf-8"))
        version, parts, layers, ids = (said[key] for key in ("format_version", "parts", "layers", "ids"))
        good = said["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"path: {manifest} is damaged or no list of activations ({error})") from error
    if not good:
        raise ValueError(f"path: {manifest} is no list of activations")
    if version > VERSION:
        raise ValueError(
            f"path: {path} was written by a newer rgfast (format {version}; this one reads up to {VERSION})"
        )
    if files not in ("auto", "batches"):
        raise ValueError(f"files: {path} holds batches, got files={files!r}")
    if axes is not None and axes != "N T D":
        raise ValueError(f"axes: {path} has 'N T D', got {axes!r}")
    groups = []
    for name in parts:
        if not (path / name).is_file():
            raise ValueError(f"path: {path} lacks {name}, which its {MANIFEST} names")
        shard, _ = safetensors_file(path / name)
        groups.append(_whole([shard], shard.name, False))
    return Found(groups, "N T D", tuple(layers), list(ids), path)
