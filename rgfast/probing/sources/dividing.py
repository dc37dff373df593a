"""Which sequences of activations each of several ranks reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rgfast.probing.checkpoint import batch_digest
from rgfast.probing.ranks import Ranks
from rgfast.probing.sources.activations import Activations

__all__ = ["Share", "divided"]


@dataclass(frozen=True)
class Share:
    """What a rank reads: the sequences from number ``first`` to before ``stop`` of what it was given. ``ids``
    are those of all ranks in the order of ranks, None if some have none."""

    first: int
    stop: int
    ids: tuple[int | str, ...] | None


def divided(acts: Activations, ranks: Ranks) -> Share:
    """What this rank reads of ``acts``, which every rank gives.

    Where all give the same whole activations, each reads an equal run of sequences, in the order of ranks.
    Parts of the same activations (:meth:`Activations.of_shards`), and other activations on every rank, are
    read as they are.

    Raises ValueError, the same on every rank, if two ranks read the same shard or sequence, and TypeError if
    some ids are numbers and others text.
    """
    given = {"store": _digest(acts.whole), "shards": acts.numbers}
    found = ranks.gather(f"store/{ranks.round()}", given)
    size, rank, n = ranks.size, ranks.rank, len(acts)
    every = [*range(len(acts.whole.shards))]
    if all(one["store"] == given["store"] and one["shards"] == every for one in found):
        return Share(n * rank // size, n * (rank + 1) // size, acts.ids)
    _check_once(found)
    parts = ranks.gather(f"ids/{ranks.round()}", None if acts.ids is None else list(acts.ids))
    if None in parts:
        return Share(0, n, None)
    _check_ids(parts)
    return Share(0, n, tuple(one for part in parts for one in part))


def _digest(acts: Activations) -> str:
    """A digest of shapes, ids and the first and the last sequence: other activations have another one."""
    digest = hashlib.blake2b(f"{acts.widths} {acts.lengths.tolist()} {acts.ids}".encode(), digest_size=16)
    for number in (0, len(acts) - 1):
        for batch in acts.batches(1, first=number, stop=number + 1):
            digest.update(batch_digest(batch.layers).encode())
    return digest.hexdigest()


def _check_once(found: Sequence[Any]) -> None:
    """Raise ValueError if two ranks read a shard of the same activations."""
    readers: dict[tuple[str, int], int] = {}
    for rank, one in enumerate(found):
        for number in one["shards"]:
            other = readers.setdefault((one["store"], number), rank)
            if other != rank:
                raise ValueError(
                    f"activations: ranks {other} and {rank} both read shard {number}; give all ranks the "
                    "same activations, which are then divided, or each rank shards of its own (of_shards)"
                )


def _check_ids(parts: Sequence[Sequence[int | str]]) -> None:
    if len({type(one) for part in parts for one in part}) > 1:
        raise TypeError("ids must be all whole numbers or all text, and the ranks have both")
    first: dict[int | str, int] = {}
    for rank, part in enumerate(parts):
        for one in part:
            if (other := first.setdefault(one, rank)) != rank:
                raise ValueError(f"ids: ranks {other} and {rank} both have sequence {one!r}")
