"""Which rows of two models belong together: batches side by side, their ids, and padding of either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from rgfast.comparing.side import Read
from rgfast.comparing.spec import CompareSpec
from rgfast.probing.capture.batches import (
    as_entry,
    batch_items,
    batch_rows,
    entry_name,
    is_array,
    iterate,
    shuffles,
)
from rgfast.probing.capture.padding import is_padding_name
from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.options import POSITIONAL
from rgfast.runtime.waiting import sent

__all__ = ["Correspondence", "Ids", "Pair", "joined", "other_tokens", "pairs_of"]

ROW_WISE = (*POSITIONAL, "pooled", "flattened")
_NOTHING = object()


@dataclass(frozen=True)
class Pair:
    """A batch for each model, numbered from 0; ``alike`` says that both hold the same arrays.

    ``tokens`` says which tokens are not the same in both, and ``lengths`` which sequence is not as long; they
    are empty otherwise. ``saved`` says that the batches hold saved activations.
    """

    number: int
    a: Any
    b: Any
    alike: bool
    tokens: str = ""
    lengths: str = ""
    saved: bool = False


def pairs_of(batches: Any, batches_b: Any, ids: Any, batch_size: int) -> Iterator[Pair]:
    """The batches of both models side by side, each checked before it is given.

    Raises ValueError if one side has more batches or sequences, and what :class:`Ids` finds.
    """
    check = Ids(ids)
    if batches_b is None:
        for number, batch in enumerate(iterate(batches, batch_size)):
            yield Pair(number, *check.passed(number, batch, batch, shared=True), alike=True)
        check.finish()
        return
    if ids is None:
        _check_order(batches, batches_b)
    both = zip_longest(iterate(batches, batch_size), iterate(batches_b, batch_size), fillvalue=_NOTHING)
    for number, (a, b) in enumerate(both):
        if a is _NOTHING or b is _NOTHING:
            few, many = ("batches", "batches_b") if a is _NOTHING else ("batches_b", "batches")
            raise ValueError(f"batches_b must have as many batches as batches: {few} ended after {number}, "
                             f"and {many} goes on")  # fmt: skip
        if batch_rows(a) != batch_rows(b):
            raise ValueError(
                f"batches_b must have the sequences of batches, and batch {number} has {batch_rows(b)} there "
                f"and {batch_rows(a)} in batches"
            )
        a, b = check.passed(number, a, b)
        alike, tokens = _alike(a, b), ""
        if not alike and (key := other_tokens(a, b)) is not None:
            called = entry_name(key) if isinstance(a, Mapping) else "the tokens"
            tokens = f"{called} of batches_b differs from that of batches"
        yield Pair(number, a, b, alike, tokens)
    check.finish()


def _check_order(batches: Any, batches_b: Any) -> None:
    """Raise ValueError if sequences come in an order of chance that nothing tells."""
    for name, loader in (("batches", batches), ("batches_b", batches_b)):
        if sampler := shuffles(loader):
            raise ValueError(
                f"{name} must hold the sequences in a known order, and the loader shuffles them ({sampler}); "
                "take shuffle=False, or let the batches hold ids and give their entry's name as ids="
            )


class Ids:
    """Checks that both models get the same sequences in the same order.

    ``ids`` are the name of an entry of all batches, a pair of arrays over all sequences, or None; ``sides``
    are what messages call where both get them from.
    """

    def __init__(self, ids: Any, sides: tuple[str, str] = ("batches", "batches_b")) -> None:
        self._sides = sides
        self._name = ids if isinstance(ids, str) else None
        self._arrays = None if ids is None or isinstance(ids, str) else [_listed(each) for each in ids]
        self._seen = 0
        if self._arrays is not None:
            self._check(self._arrays[0], self._arrays[1], 0)

    def passed(self, number: int, a: Any, b: Any, *, shared: bool = False) -> tuple[Any, Any]:
        """The batches without their ids, which were compared.

        Raises ValueError that names the first sequence that is another one, a batch without the entry, and
        one with another number of ids.
        """
        first, self._seen = self._seen, self._seen + batch_rows(a)
        if self._name is None:
            return a, b
        found, rest = zip(
            *(self._taken(batch, side, number) for batch, side in zip((a, b), self._sides, strict=True)),
            strict=True,
        )
        if not shared:
            self._check(found[0], found[1], first)
        for side, each in zip(self._sides, found, strict=True):
            if len(each) != batch_rows(a):
                raise ValueError(
                    f"ids: batch {number} of {side} has {len(each)} of them for {batch_rows(a)} sequences"
                )
        return rest[0], rest[0] if a is b else rest[1]

    def finish(self) -> None:
        """Raise ValueError unless there were as many sequences as ids."""
        self.check_number(self._seen)

    def check_number(self, sequences: int) -> None:
        """Raise ValueError unless arrays of ids have ``sequences`` of them."""
        if self._arrays is not None and len(self._arrays[0]) != sequences:
            raise ValueError(
                f"ids must have one for each sequence, got {len(self._arrays[0])} for {sequences} sequences"
            )

    def _taken(self, batch: Any, side: str, number: int) -> tuple[list[Any], Any]:
        if not isinstance(batch, Mapping) or self._name not in batch:
            holds = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"ids: batch {number} of {side} has no entry {self._name!r} ({holds})")
        return _listed(batch[self._name]), {key: x for key, x in batch.items() if key != self._name}

    def _check(self, a: Sequence[Any], b: Sequence[Any], first: int) -> None:
        one, other = self._sides
        for at, (mine, theirs) in enumerate(zip(a, b, strict=False), start=first):
            if mine != theirs:
                raise ValueError(
                    f"ids: {other} must hold the sequences of {one} in their order, and sequence {at} is "
                    f"{mine!r} in {one} and {theirs!r} in {other}"
                )
        if len(a) != len(b):
            raise ValueError(
                f"ids: {other} must hold the sequences of {one}, and has {len(b)} ids for {len(a)}"
            )


def _listed(ids: Any) -> list[Any]:
    """Ids of any kind as Python's own numbers or strings (tuples, if there are several to a sequence)."""
    if isinstance(ids, Tensor):
        ids = ids.detach().cpu().numpy()
    listed = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(listed, (list, tuple)):
        raise TypeError(
            f"ids must be arrays or lists with one id for each sequence, got {type(ids).__name__}"
        )
    return [tuple(one) if isinstance(one, list) else one for one in listed]


def _alike(a: Any, b: Any) -> bool:
    """Whether two batches hold the same arrays: of mappings those by the same names, more than padding."""
    if a is b:
        return True
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        common = [key for key in a if key in b and is_array(a[key])]
        told = any(not is_padding_name(str(key)) for key in common)
        return told and all(_same(a[key], b[key]) for key in common)
    mine, theirs = batch_items(a), batch_items(b)
    same_kind = isinstance(a, Mapping) == isinstance(b, Mapping) and len(mine) == len(theirs)
    return same_kind and all(_same(x, y) for x, y in zip(mine, theirs, strict=True))


def _same(x: Any, y: Any) -> bool:
    x, y = as_entry(x, "batches"), as_entry(y, "batches_b")
    if x is y:
        return True
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return type(x) is type(y)
    if x.is_nested or y.is_nested or x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(x, sent(y, x.device))


def other_tokens(a: Any, b: Any) -> Any:
    """The key of the tokens (whole numbers ``[B, T]``) of a batch, if those of the other one are others."""
    mine, theirs = _tokens(a), _tokens(b)
    if mine is None or theirs is None or _same(mine[1], theirs[1]):
        return None
    return mine[0]


def _tokens(batch: Any) -> tuple[Any, Any] | None:
    items = batch.items() if isinstance(batch, Mapping) else enumerate(batch_items(batch))
    found = [(key, x) for key, value in items if _are_tokens(key, x := as_entry(value, "batches"))]
    named = [one for one in found if str(one[0]).endswith("input_ids")]
    return next(iter(named or found), None)


def _are_tokens(key: Any, x: Any) -> bool:
    if not isinstance(x, Tensor) or x.is_nested or x.dim() != 2 or is_padding_name(str(key)):
        return False
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


class Correspondence:
    """Whether row r of one model's layers belongs to row r of the other's, so that they can be compared row
    by row; else sequences are compared by their means.

    Decided on the first batch: if not, ``why`` says so in words, naming layers.

    Raises ValueError if ``views`` that need it were asked for, and for a later batch that contradicts it.
    """

    def __init__(self, a: Read, b: Read, pair: Pair, spec: CompareSpec) -> None:
        self._asked = [("views", view) for view in spec.views or () if view in ROW_WISE]
        self._asked += [("rows", chosen.name) for chosen in spec.selections]
        self._from_first_token = spec.origin == "token"
        self.why = self._why_not(a, b, pair)
        self.aligned = not self.why
        if self.why and self._asked:
            option, view = self._asked[0]
            without = "" if not spec.selections else " without rows="
            raise ValueError(
                f"{option}: {view!r} compares row by row, and {self.why}; take views=['mean_pooled']{without}"
            )

    def check(self, a: Read, b: Read, pair: Pair) -> None:
        """Raise ValueError if the rows of this batch do not correspond, and those of the first one did."""
        if self.aligned and (why := self._why_not(a, b, pair)):
            raise ValueError(
                f"batches: rows of the first batch correspond, and in batch {pair.number} {why}; take "
                "views=['mean_pooled']"
            )

    def _why_not(self, a: Read, b: Read, pair: Pair) -> str:
        if pair.lengths:
            return pair.lengths
        lengths = {f"a.{name}": x.shape[1] for name, x in zip(a.names, a.rows.present, strict=True)}
        lengths |= {f"b.{name}": x.shape[1] for name, x in zip(b.names, b.rows.present, strict=True)}
        first = next(iter(lengths))
        odd = next((name for name, length in lengths.items() if length != lengths[first]), None)
        if odd is not None:
            return f"layer {odd} has {lengths[odd]} positions where {first} has {lengths[first]}"
        if lengths[first] == 1:  # a row for each sequence
            return ""
        for side, found in (("a", a), ("b", b)):
            if other := next((k for k, place in enumerate(found.rows.places) if place), None):
                names = f"{side}.{found.names[0]} and {side}.{found.names[other]}"
                return f"layers {names} have their rows at other places (another entry tells their padding)"
        if self._from_first_token and not _alike_keeps(a.rows.keeps[0], b.rows.keeps[0]):
            return "sequences begin at other tokens for each model, since other rows are padding"
        if pair.saved and not _alike_keeps(a.rows.keeps[0], b.rows.keeps[0]):
            return "other positions of the sequences are padding in b than in a"
        if pair.tokens:
            return f"the models have other tokens: {pair.tokens}"
        if not pair.alike and not self._asked:
            return "batches_b holds other inputs than batches"
        return ""


def _alike_keeps(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether the same rows count for both models."""
    if a is not None and b is not None:
        return torch.equal(a, sent(b, a.device))
    return all(keep is None or bool(keep.all()) for keep in (a, b))


def joined(a: RowBatch, b: RowBatch, *, aligned: bool) -> RowBatch:
    """The rows of both models as those of one with the layers of both, those of a first.

    If rows correspond, those that are padding in either do not count.

    Raises ValueError if there are other numbers of sequences.
    """
    if a.sequences != b.sequences:
        raise ValueError(
            f"batches_b must have the sequences of batches, and the layers of b have {b.sequences} for "
            f"{a.sequences}"
        )
    keeps = [*a.keeps, *(None if keep is None else sent(keep, a.first.device) for keep in b.keeps)]
    if aligned:
        keeps = [_both(keeps)] * len(keeps)
    return replace(
        a,
        layers=[*a.layers, *b.layers],
        keeps=keeps,
        places=[0] * len(keeps),
        padded=a.padded or b.padded,
        notes=(*_of_side(a, "a"), *_of_side(b, "b")),
    )


def _of_side(batch: RowBatch, side: str) -> Iterator[str]:
    for note in batch.notes:
        yield f"{side}: {note}"


def _both(keeps: Sequence[Tensor | None]) -> Tensor | None:
    """The rows that count in all layers."""
    found: Tensor | None = None
    for keep in {id(keep): keep for keep in keeps if keep is not None}.values():
        found = keep if found is None else found & keep
    return found
