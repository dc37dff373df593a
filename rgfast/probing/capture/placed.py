"""Outputs of a model that several ranks run together (tensor parallel): how they are placed over these ranks,
and which of a batch's sequences this rank sums.

A DTensor says how it is placed. A plain tensor is the same on all ranks of the group, which is looked at, or
``placements=`` says what it is a part of. Whatever the placement, sequences are then divided among the ranks:
a replicated output is cut, one that is sharded by positions or features is exchanged, and one that is still
to be summed is reduced on the way. So every sequence counts once, and every rank sums its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rgfast.probing.capture.layers import Tap
from rgfast.probing.capture.patterns import beside, by_layer
from rgfast.probing.capture.rows import Part, RowBatch
from rgfast.probing.capture.watcher import Seen
from rgfast.probing.ranks import RankError, Ranks
from rgfast.probing.sharding import is_dtensor, local, tensor_mesh, whole

__all__ = ["Placed", "PlacementsSpec", "check_placements", "divided", "regrouped", "summed_here"]

# A placement of torch.distributed.tensor, one for each dimension of the mesh, or these by layer pattern.
PlacementsSpec = Any | None

_KINDS = ("Shard", "Replicate", "Partial")
_WAYS = "Shard(dim), Replicate() or Partial() of torch.distributed.tensor"


@dataclass(frozen=True)
class _Plain:
    """What a rank says of a plain output; no ``digest`` once ``placements=`` is known to be right of it."""

    shape: tuple[int, ...]
    digest: tuple[Any, ...] | None


class Placed:
    """Makes DTensors of all that the layers of a tensor-parallel model put out; whole plain tensors if this
    process probes by itself. Outputs of other models stay as they are.

    ``asked`` is ``placements=``. Raises ValueError for a pattern that no layer matches, and if anything is
    asked of a model that is not tensor parallel.
    """

    def __init__(
        self, asked: PlacementsSpec, model: nn.Module, taps: Sequence[Tap], ranks: Ranks | None
    ) -> None:
        found = by_layer("placements", asked, [tap.name for tap in taps])
        self._asked = [None if x is None else _listed(x) for _, x in found]
        self._mesh, self._ranks = tensor_mesh(model), ranks
        if asked is not None and self._mesh is None:
            raise ValueError(
                "placements must be of a model with parameters that are DTensors (parallelize_module), got "
                f"a {type(model).__name__} without"
            )
        self._members: list[int] = [] if self._mesh is None else _members(self._mesh)
        # Layers that placements= names, until they are seen to be no whole ones.
        self._doubtful = {tap for tap, x in enumerate(self._asked) if x is not None and not _is_whole(x)}

    def seen(self, seen: Sequence[Seen]) -> list[Seen]:
        """The layers of a forward with the values of all ranks that ran it together.

        Raises ValueError for placements that are unknown or contradict each other, for a plain tensor that
        differs between the ranks if it was not said what it is a part of, and for one that is the same on all
        of them if it was said to be a part.
        """
        for layer in seen:
            if is_dtensor(layer.value):
                self._check(layer)
        if self._mesh is None:
            return list(seen)
        plain = [x for x in seen if x.value is not None and not is_dtensor(x.value)]
        told = [self._said(layer) for layer in plain]
        by_rank = _gathered(told, self._mesh) if plain else []
        values = {id(x): x.value for x in seen}
        for k, layer in enumerate(plain):
            values[id(layer)] = self._placed(layer, [told[k] for told in by_rank])
        if self._ranks is None:
            values = {key: None if x is None else whole(x) for key, x in values.items()}
        return [replace(layer, value=values[id(layer)]) for layer in seen]

    def meet(self, absent: str | None) -> None:
        """Begin a forward with the other ranks of the group: either all have a batch (``absent`` is None) or
        none has.

        Raises on all of them ValueError if some have run out of batches (""), and RankError if one failed.
        """
        if self._mesh is None:
            return
        found = _gathered(absent, self._mesh)
        if len({one is None for one in found}) == 1:
            return
        if said := next((one for one in found if one), ""):
            raise RankError(said)
        without = [rank for rank, one in zip(self._members, found, strict=True) if one is not None]
        raise ValueError(
            f"batches must be the same on ranks {self._members}, which run the model together, and those of "
            f"{without} ended before the others"
        )

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank of the group raises inside, all of them raise, so that none waits for it in the next
        forward."""
        if self._ranks is None:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as found:
            if self._mesh is not None and (lost := self._ranks.lost(found)):
                raise lost from found
            error = found
        if self._mesh is not None:
            said = _gathered(None if error is None else f"{type(error).__name__}: {error}", self._mesh)
            if error is None and any(said):
                at = next(k for k, text in enumerate(said) if text)
                rank = self._ranks.members.index(self._members[at])
                error = RankError(f"rank {rank} of {self._ranks.size} failed: {said[at]}")
        if error is not None:
            raise error

    def _check(self, layer: Seen) -> None:
        """Learn the mesh of a layer that is a DTensor. Raises ValueError unless its placement is known."""
        value: Any = layer.value
        mesh, placements = value.device_mesh, value.placements
        for one in placements:
            if not _is_known(one):
                raise ValueError(
                    f"layer {layer.name!r} is placed as {one!r} ({type(one).__name__}), and only {_WAYS} are "
                    "read; redistribute it in the model, or leave it out of layers="
                )
        asked = self._asked[layer.tap]
        if asked is not None and _positive(asked, value.dim()) != [*placements]:
            raise ValueError(
                f"placements says {_shown(asked)} of layer {layer.name!r}, which is a DTensor placed as "
                f"{_shown(placements)}; leave it out of placements="
            )
        if self._mesh is None:
            self._mesh, self._members = mesh, _members(mesh)
        if _members(mesh) != self._members:
            raise ValueError(
                f"layers must be placed over one mesh, and {layer.name!r} is over ranks {_members(mesh)} and "
                f"others over {self._members}; leave it out of layers="
            )
        if self._ranks is not None and (left_out := {*self._members} - {*self._ranks.members}):
            raise ValueError(
                f"distributed must take in all ranks that layer {layer.name!r} is placed over, got "
                f"{list(self._ranks.members)} without {sorted(left_out)}"
            )

    def _said(self, layer: Seen) -> _Plain:
        x = layer.value
        assert x is not None
        looked_at = self._asked[layer.tap] is None or layer.tap in self._doubtful
        return _Plain(tuple(x.shape), _digest(x) if looked_at else None)

    def _placed(self, layer: Seen, told: Sequence[_Plain]) -> Tensor:
        """A plain output as a DTensor, of which every rank of the group has ``told``."""
        x, asked = layer.value, self._asked[layer.tap]
        assert x is not None
        if asked is None and any(one != told[0] for one in told):
            pattern, shapes = beside(layer.name), sorted({one.shape for one in told})
            raise ValueError(
                f"placements: layer {layer.name!r} is a plain tensor {' or '.join(map(str, shapes))} that "
                f"differs between ranks {self._members}, which run the model together; say what each has of "
                f"it, as in placements={{{pattern!r}: Shard(1)}} for some of the positions, Shard(-1) for "
                "features, Partial() for a sum that is not taken yet, Replicate() if the values differ by "
                "rounding alone (and give these ranks the same batches)"
            )
        from torch.distributed.tensor import DTensor, Replicate

        dims = self._mesh.ndim
        placements = [Replicate()] * dims if asked is None else _positive(asked, x.dim())
        if len(placements) != dims:
            raise ValueError(
                f"placements of layer {layer.name!r} must be one for each of the mesh's {dims} dimensions, "
                f"got {_shown(placements)}"
            )
        if layer.tap in self._doubtful:
            same = all(one == told[0] for one in told)
            if same and _shows_place(local(x), placements):
                raise ValueError(
                    f"placements says {_shown(placements)} of layer {layer.name!r}, which is the same tensor "
                    f"{told[0].shape} on all ranks {self._members}, so whole on each of them; leave it out "
                    "of placements="
                )
            if not same:
                self._doubtful.discard(layer.tap)
        shape = _whole_shape(layer.name, placements, [one.shape for one in told])
        found: Tensor = DTensor.from_local(
            local(x), self._mesh, placements, run_check=False, shape=torch.Size(shape), stride=_strides(shape)
        )
        return found


def divided(x: Tensor, samples: int, laid_out: Callable[[Tensor], Tensor]) -> Tensor:
    """``laid_out(x)`` ``[B, ...]``; of a DTensor, this rank's of the samples along axis ``samples``, as a
    DTensor of all."""
    if not is_dtensor(x):
        return laid_out(x)
    from torch.distributed.tensor import Shard

    parted: Any = x
    mesh = parted.device_mesh
    own = local(parted.redistribute(placements=[Shard(samples)] * mesh.ndim))
    return _of_all(laid_out(own), x.shape[samples], mesh)


def regrouped(rows: Tensor, batch: int) -> Tensor:
    """``[B·T, 1, D]`` as ``[B, T, D]``, of DTensors too."""
    if not is_dtensor(rows):
        return rows.reshape(batch, len(rows) // batch, -1)
    parted: Any = rows
    first, count = _own(batch, parted.device_mesh)
    every = whole(rows).reshape(batch, len(rows) // batch, -1)
    return _of_all(every[first : first + count], batch, parted.device_mesh)


def summed_here(batch: RowBatch) -> RowBatch:
    """The batch with this rank's sequences alone, if its layers are DTensors."""
    x: Any = next((x for x in batch.layers if is_dtensor(x)), None)
    if x is None:
        return batch
    first, count = _own(len(x), x.device_mesh)
    part = Part(first, len(x), tuple(_members(x.device_mesh)))
    rest = replace(batch, layers=[None] * len(batch.layers)).some(slice(first, first + count))
    return replace(rest, layers=[None if x is None else local(x) for x in batch.layers], part=part)


def check_placements(placements: Any) -> None:
    """Raise TypeError unless ``placements`` is a :data:`PlacementsSpec`."""
    if placements is None:
        return
    for value in placements.values() if isinstance(placements, Mapping) else [placements]:
        for one in _listed(value):
            if not _is_known(one):
                raise TypeError(
                    f"placements must be {_WAYS}, one for each dimension of the mesh, or these by layer "
                    f"pattern, got {one!r}"
                )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _is_known(one: Any) -> bool:
    """Whether it is one of the three placements: those of other classes mean something more."""
    return type(one).__name__ in _KINDS and type(one).__module__.startswith("torch.distributed.tensor")


def _is_whole(placements: Sequence[Any]) -> bool:
    return all(type(one).__name__ == "Replicate" for one in placements)


def _shows_place(x: Tensor, placements: Sequence[Any]) -> bool:
    """Whether a part as it was said to be would differ from the others: not if it is zero, or constant along
    the axis that is cut."""
    if not x.numel() or not x.isfinite().all():
        return False
    cut = next((one.dim for one in placements if hasattr(one, "dim")), None)
    return bool((x if cut is None else x != x.narrow(cut, 0, 1)).any())


def _positive(placements: Sequence[Any], dims: int) -> list[Any]:
    """With axes that are counted from the front. Raises ValueError for an axis that there is not."""
    for x in placements:
        if hasattr(x, "dim") and not -dims <= x.dim < dims:
            raise ValueError(f"placements says {x!r} of a layer of {dims} dimensions")
    return [type(x)(x.dim % dims) if hasattr(x, "dim") else x for x in placements]


def _shown(placements: Sequence[Any]) -> str:
    return ", ".join(map(repr, placements))


def _members(mesh: Any) -> list[int]:
    """The ranks of the default group that a mesh has, in its order."""
    found: list[int] = mesh.mesh.flatten().tolist()
    return found


def _whole_shape(name: str, placements: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """The shape of what ranks have parts of these shapes of. Raises ValueError if these do not fit."""
    cut = next((one.dim for one in placements if hasattr(one, "dim")), None)
    if cut is not None and len(placements) > 1:
        raise ValueError(
            f"placements of layer {name!r} must be Replicate() over a mesh of {len(placements)} dimensions, "
            f"got {_shown(placements)}; let the model put out a DTensor (use_local_output=False)"
        )
    whole_shape, sizes = list(shapes[0]), []
    if cut is not None:
        sizes = [shape[cut] for shape in shapes]
        whole_shape[cut] = sum(sizes)
    each = -(-sum(sizes) // len(shapes))
    wanted = [min(each, max(0, sum(sizes) - k * each)) for k in range(len(shapes))] if sizes else []
    rests = {tuple(n for k, n in enumerate(shape) if k != cut) for shape in shapes}
    if sizes != wanted or len(rests) > 1:
        raise ValueError(
            f"placements says {_shown(placements)} of layer {name!r}, and the ranks have parts of shapes "
            f"{', '.join(map(str, shapes))}, which torch.chunk does not give"
        )
    return whole_shape


def _own(size: int, mesh: Any) -> tuple[int, int]:
    """The first and the number of ``size`` things that are this rank's, as ``[Shard(0)] * mesh.ndim`` has
    it."""
    first = 0
    for dim in range(mesh.ndim):
        each = -(-size // mesh.size(dim))
        start = min(each * mesh.get_local_rank(dim), size)
        first, size = first + start, min(each, size - start)
    return first, size


def _of_all(own: Tensor, size: int, mesh: Any) -> Tensor:
    """The DTensor of ``size`` samples of which this rank has its ``own``."""
    from torch.distributed.tensor import DTensor, Shard

    shape = (size, *own.shape[1:])
    found: Tensor = DTensor.from_local(
        own, mesh, [Shard(0)] * mesh.ndim, run_check=False, shape=torch.Size(shape), stride=_strides(shape)
    )
    return found


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(tuple(shape), dtype=torch.bool, device="meta").stride()


def _gathered(value: Any, mesh: Any) -> list[Any]:
    """What every rank of the mesh gave, in its order."""
    found = [value]
    for dim in reversed(range(mesh.ndim)):
        parts: list[Any] = [None] * mesh.size(dim)
        torch.distributed.all_gather_object(parts, found, group=mesh.get_group(dim))
        found = [one for part in parts for one in part]
    return found


def _digest(x: Tensor) -> tuple[Any, ...]:
    """Type and a checksum of the bits of ``x``, which shows rows and columns that are swapped too."""
    x = local(x).contiguous()
    if not x.numel():
        return (str(x.dtype),)
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.view(words)
    bits = bits.reshape(-1, bits.shape[-1]) if bits.dim() > 1 else bits.reshape(1, -1)
    by_row, by_column = bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)
    weighted = [
        (s * torch.arange(1, len(s) + 1, dtype=s.dtype, device=s.device)).sum() for s in (by_row, by_column)
    ]
    return str(x.dtype), *torch.stack(weighted).tolist()
