"""Two sets of saved activations: whether they are of the same sequences, and batches of both side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from rgfast.comparing.pairing import Ids, Pair, other_tokens
from rgfast.comparing.side import renamed
from rgfast.comparing.spec import CompareSpec
from rgfast.probing.sources.activations import Activations
from rgfast.probing.sources.replay import LAYOUT, SavedActivations, padding_of

__all__ = ["as_saved"]

Saved = tuple[SavedActivations, SavedActivations, CompareSpec, Iterator[Pair], tuple[str, ...]]


def as_saved(a: Any, b: Any, batches: Any, batches_b: Any, spec: CompareSpec) -> Saved:
    """What stands for two models in a comparison of activations, how to read them, their batches, and notes.

    Raises TypeError or ValueError for a model beside activations, for options that activations do not have,
    and for other sequences, naming the first.
    """
    if not (isinstance(a, Activations) and isinstance(b, Activations)):
        kinds = f"{type(a).__name__} and {type(b).__name__}"
        raise TypeError(
            f"a and b must both be models or both be Activations, got {kinds}; save the layers of the model, "
            "too (rgfast.probe with keep= does)"
        )
    for name, given in (("batches", batches), ("batches_b", batches_b)):
        if given is not None:
            raise TypeError(
                f"{name} must be left out, since the activations are the batches, got {type(given).__name__}"
            )
    read = zip((a, b), spec.padding, spec.axes, spec.output, strict=True)
    padding = tuple(padding_of(acts, how, axes=axes, output=output) for acts, how, axes, output in read)
    with renamed({"layers": "layers_a"}):
        first = SavedActivations(a, spec.layers[0])
    with renamed({"layers": "layers_b"}):
        alike = b is a and spec.layers[0] == spec.layers[1]
        second = first if alike else SavedActivations(b, spec.layers[1])
    ids, notes = _matched(a, b, spec.ids)
    pairs = _pairs(first, second, spec.batch_size, ids, _other_lengths(a, b))
    return first, second, replace(spec, axes=(LAYOUT, LAYOUT), padding=padding), pairs, notes


def _matched(a: Activations, b: Activations, ids: Any) -> tuple[Ids, tuple[str, ...]]:
    """The check of ids that ``ids`` or the activations give, and what is to be said of it.

    Raises ValueError unless there are as many sequences on both sides and, if all are known, the same.
    """
    if isinstance(ids, str):
        for side, acts in (("a", a), ("b", b)):
            if ids not in acts.entries:
                there = ", ".join(acts.entries) or "there is none"
                raise ValueError(f"ids: {side} has no entry {ids!r} ({there})")
    lacking = [side for side, acts in (("a", a), ("b", b)) if acts.ids is None]
    if ids is None and not lacking:
        ids = a.ids, b.ids
    check = Ids(ids, ("a", "b"))
    if len(a) != len(b):
        raise ValueError(f"b must hold the sequences of a, and has {len(b)} sequences for {len(a)}")
    check.check_number(len(a))
    if ids is not None or a is b:
        return check, ()
    sides = f"{lacking[0]} has no ids" if len(lacking) == 1 else "a and b have no ids"
    return check, (f"{sides}, so that the order of the sequences was taken on trust",)


def _other_lengths(a: Activations, b: Activations) -> str:
    """The first sequence that is not as long on both sides, in words. Sequences that are padded where they
    are stored are all equally long."""
    if not (a.is_ragged and b.is_ragged):
        return ""
    mine, theirs = a.lengths, b.lengths
    differ = (mine != theirs).nonzero()[0]
    if not len(differ):
        return ""
    at = int(differ[0])
    called = "" if a.ids is None else f" ({a.ids[at]!r})"
    return f"sequence {at}{called} has {mine[at]} positions in a and {theirs[at]} in b"


def _pairs(a: SavedActivations, b: SavedActivations, size: int, ids: Ids, lengths: str) -> Iterator[Pair]:
    """The batches of both sides, of the same sequences."""
    played = ((x, x) for x in a.batches(size)) if a is b else _cut_alike(a.batches(size), b.batches(size))
    for number, (one, other) in enumerate(played):
        one, other = ids.passed(number, one, other)
        key = other_tokens(one, other)
        tokens = "" if key is None else f"{key} of b differs from that of a"
        yield Pair(number, one, other, alike=True, tokens=tokens, lengths=lengths, saved=True)


_Batch = dict[str, Tensor]


def _cut_alike(a: Iterator[_Batch], b: Iterator[_Batch]) -> Iterator[tuple[_Batch, _Batch]]:
    """The batches of two sources of equally many sequences, cut where either is."""
    one: _Batch = {}
    other: _Batch = {}
    while True:
        one, other = one or next(a, {}), other or next(b, {})
        if not one or not other:
            return
        size = min(_rows(one), _rows(other))
        yield _some(one, slice(size)), _some(other, slice(size))
        one, other = (_some(x, slice(size, None)) if _rows(x) > size else {} for x in (one, other))


def _rows(batch: _Batch) -> int:
    return len(next(iter(batch.values())))


def _some(batch: _Batch, part: slice) -> _Batch:
    return {name: x[part] for name, x in batch.items()}
