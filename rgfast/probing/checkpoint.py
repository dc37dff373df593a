"""Checkpoints of a running probe: rows or moments and the place in the stream, in one file, atomically.

The rows of all batches so far are written each time. They are what a probe may hold in ``memory``, as moments
are, which go to the file as often.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from rgfast.files import leftovers, write_stream
from rgfast.probing.capture.batches import batch_items
from rgfast.probing.offloaded import brought
from rgfast.probing.sharding import class_of, whole
from rgfast.runtime.copies import flat_bytes
from rgfast.validation import from_array

__all__ = [
    "PART",
    "UNREADABLE",
    "batch_digest",
    "clear_stale",
    "digest_of",
    "fingerprint",
    "is_model",
    "known_fingerprint",
    "model_digest",
    "read",
    "read_header",
    "refuse_another",
    "runs_of",
    "write",
]

# Version 1, of 0.1, was of moments only.
FORMAT, VERSION = "rgfast.checkpoint", 2
_HEADER = "header"
PART = 1 << 22  # bytes of a tensor that are digested by themselves
_TRANSFER = 64 << 20  # bytes of tensors that come from a device at once
# What reading weights raises that cannot be read.
UNREADABLE = (RuntimeError, NotImplementedError, TypeError, AttributeError)


def write(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Replace ``path`` by these arrays and a header of JSON values; whoever reads it sees all or nothing."""
    text = json.dumps({"format": FORMAT, "format_version": VERSION, **header})

    everything: dict[str, Any] = {_HEADER: np.frombuffer(text.encode(), dtype=np.uint8), **arrays}
    # Rows and moments may take most of the memory: they go to the file array by array.
    write_stream(path, lambda file: np.savez(file, **everything))


def clear_stale(path: Path) -> None:
    """Remove what a process killed while writing ``path`` left beside it. A checkpoint has one writer."""
    for stale in leftovers(path):
        stale.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """What :func:`write` wrote. Raises ValueError for any other file, or one of a newer version."""
    return _read(path)


def read_header(path: Path) -> dict[str, Any]:
    """The header alone, as :func:`read` reads it."""
    return _read(path, only=(_HEADER,))[0]


def _read(
    path: Path, only: Sequence[str] | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in only or file.files}
        header = json.loads(arrays.pop(_HEADER).tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"checkpoint: {path} is damaged or not a probe checkpoint ({error})") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"checkpoint: {path} is not a probe checkpoint")
    if header["format_version"] > VERSION:
        raise ValueError(
            f"checkpoint: {path} was written by a newer rgfast (format {header['format_version']}; this one "
            f"reads up to {VERSION})"
        )
    return header, arrays


def runs_of(names: Sequence[str], seen: Any) -> list[str]:
    """The layers ``names``, as the forwards before a checkpoint, ``seen``, have told how often each runs;
    ``names`` if these are of other layers."""
    if not isinstance(seen, list) or {*names} != {re.sub(r"#\d+$", "", str(name)) for name in seen}:
        return list(names)
    return [str(name) for name in seen]


def refuse_another(was: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise ValueError if the options ``asked`` for are not those that a checkpoint ``was`` made with."""
    for name in dict.fromkeys((*asked, *was)):
        if was.get(name) != asked.get(name):
            raise ValueError(
                f"checkpoint is of another probe: {name} was {was.get(name)}, now {asked.get(name)}; "
                "delete it to start anew"
            )


def model_digest(model: nn.Module) -> str:
    """A digest of the model's class, its parameters and buffers, taken on as many threads as torch has.

    It is the same wherever they are: on several ranks, which then have to call this together, and offloaded
    to the host or to disk, from where each is read by itself. Those on a device come to the host, where
    processors have instructions for it, many in one transfer.
    """
    state = model.state_dict()
    tensors = (whole(brought(model, name, value)) for name, value in state.items() if _is_tensor(value))
    return digest_of(model, state, _data(tensors))


def digest_of(model: nn.Module, state: Mapping[str, Any], data: Iterable[Sequence[memoryview]]) -> str:
    """:func:`model_digest` of a model's ``state``; ``data`` are the bytes of its tensors, of some at a time,
    none of them cut but at multiples of ``PART``."""
    digest = hashlib.blake2b(class_of(model).__qualname__.encode(), digest_size=16)
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as threads:
        cut = ([x[k : k + PART] for x in some for k in range(0, len(x), PART)] for some in data)
        parts = chain.from_iterable(threads.map(_part_digest, some) for some in cut)
        for name, value in state.items():
            digest.update(name.encode())
            if _is_tensor(value):
                digest.update(_kind(value))
                for part in islice(parts, -(-value.numel() * value.element_size() // PART)):
                    digest.update(part)
    return digest.hexdigest()


def is_model(digest: str, model: nn.Module) -> bool:
    """Whether ``digest`` is this model's, as it is taken now or as rgfast 0.1 took it."""
    if digest == model_digest(model):
        return True
    before = hashlib.blake2b(type(model).__qualname__.encode(), digest_size=16)
    for name, value in model.state_dict().items():
        before.update(name.encode())
        if isinstance(value, Tensor):
            _update(before, brought(model, name, value))
    return digest == before.hexdigest()


def fingerprint(model: nn.Module) -> str | None:
    """:func:`model_digest` for comparing results, None for weights that cannot be read."""
    try:
        return model_digest(model)
    except UNREADABLE:
        return None


def known_fingerprint(model: nn.Module) -> str:
    """:func:`fingerprint`. Raises ValueError if weights cannot be read."""
    if (found := fingerprint(model)) is None:
        raise ValueError(
            "checkpoint must be of a model whose weights can be read, to tell it from others, and those "
            f"of this {class_of(model).__name__} cannot (offloaded, and no hook says where to)"
        )
    return found


def batch_digest(batch: Any) -> str:
    """A digest of the arrays in a batch."""
    digest = hashlib.blake2b(digest_size=16)
    for item in batch_items(batch):
        if isinstance(item, np.ndarray):
            item = from_array(item, "batches")
        if isinstance(item, Tensor):
            _update(digest, item)
    return digest.hexdigest()


def _update(digest: hashlib.blake2b, value: Tensor) -> None:
    digest.update(_kind(value))
    for some in _data([value]):
        for data in some:
            digest.update(data)


def _kind(value: Tensor) -> bytes:
    return f"{value.dtype}{tuple(value.shape)}".encode()


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor)


def _data(tensors: Iterable[Tensor]) -> Iterator[list[memoryview]]:
    """The elements of each; neighbors on a device come together, since every transfer is waited for."""
    together: list[Tensor] = []
    size = 0
    for flat in map(flat_bytes, tensors):
        if together and (flat.device != together[0].device or size + len(flat) > _TRANSFER):
            yield _on_host(together)
            together, size = [], 0
        together.append(flat)
        size += len(flat)
    yield _on_host(together)


def _on_host(together: Sequence[Tensor]) -> list[memoryview]:
    if len(together) > 1 and together[0].device.type != "cpu":
        whole = torch.cat(list(together)).cpu()
        together = torch.split(whole, [len(flat) for flat in together])
    return [flat.cpu().numpy().data for flat in together if len(flat)]


def _part_digest(part: memoryview) -> bytes:
    # The processor has instructions for SHA-1, and nobody forges weights here.
    return hashlib.sha1(part, usedforsecurity=False).digest()
