"""Which rows a view of ``rows=`` pools: a mask, labels of a class, each sequence's first or last token."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgfast.probing.capture.padding import is_padding_name
from rgfast.probing.options import VIEWS
from rgfast.validation import as_tensor, kind_and_way

__all__ = ["ENDS", "RowsSpec", "Selection", "SelectionSpec", "make_selections"]

_Source = Tensor | NDArray[Any] | str | Callable[[Mapping[str, Any]], Any]
SelectionSpec = _Source | tuple[Any, Any]
RowsSpec = SelectionSpec | Mapping[str, SelectionSpec] | None

# Words for one row of each sequence.
ENDS = ("first", "last")
_ALONE = "rows"  # the view of a selection without a name


class Selection:
    """Which rows one view of ``rows=`` has: a batch entry, a function of the entries or an array over all
    sequences, of bool or of whole numbers and the ``labels`` that count; or one of :data:`ENDS`.

    Raises TypeError for other kinds, ValueError for arrays that say nothing about rows.
    """

    def __init__(self, name: str, source: Any, said: str) -> None:
        self.name, self._said = name, said
        self._labels: tuple[int, ...] = ()
        if isinstance(source, tuple):
            source, self._labels = _pair(source, said)
        if isinstance(source, (np.ndarray, list)):
            source = as_tensor(source, said)
        if not (isinstance(source, (str, Tensor)) or callable(source)):
            raise TypeError(
                f"{said} must be an array, the name of a batch entry, 'first', 'last', a callable or a pair "
                f"(one of these, label), got {kind_and_way(source)}"
            )
        if isinstance(source, Tensor):
            self._check_kind(source)
            if source.dim() not in (1, 2):
                raise ValueError(
                    f"{said} must be [n, T] or [n] for n sequences, got shape {tuple(source.shape)}"
                )
        if self._labels and isinstance(source, str) and source in ENDS:
            raise ValueError(f"{said} asks for a label, and {source!r} is each sequence's {source} token")
        self._source = source

    @property
    def in_order(self) -> bool:
        """Whether it is an array over all sequences, in the order in which batches bring them."""
        return isinstance(self._source, Tensor)

    @property
    def entry(self) -> str | None:
        """The batch entry that means this alone: not the model's tokens or padding, which may be asked for
        too."""
        source = self._source
        if not isinstance(source, str) or source in ENDS:
            return None
        return None if source.endswith(("input", "input_ids")) or is_padding_name(source) else source

    @property
    def said(self) -> str:
        """What messages call it."""
        return self._said

    def to_json(self) -> Any:
        """What it is read from, in words, and its labels."""
        source = self._source
        what = source if isinstance(source, str) else "an array" if self.in_order else "a function"
        return [what, list(self._labels)] if self._labels else what

    def rows(
        self, entries: Mapping[str, Any], given: Mapping[str, Any], start: int, batch: int, length: int
    ) -> Tensor | str:
        """``[B, T]`` bool for the sequences ``start`` … ``start + batch``, or one of :data:`ENDS`.

        A function gets ``entries``; others are taken from what was ``given`` for them. Raises ValueError for
        a missing entry, TypeError for another dtype and ValueError for a shape that does not fit.
        """
        if isinstance(self._source, str) and self._source in ENDS:
            return self._source
        found = self._batch(entries if callable(self._source) else given, start, batch)
        if found.dim() == 1 and len(found) == batch:
            found = found[:, None].expand(-1, length)
        if tuple(found.shape) != (batch, length):
            raise ValueError(
                f"{self._said} must be [{batch}, {length}] or [{batch}] for this batch, got shape "
                f"{tuple(found.shape)}"
            )
        if not self._labels:
            return found
        chosen = found == self._labels[0]
        for label in self._labels[1:]:
            chosen = chosen | (found == label)
        return chosen

    def _batch(self, entries: Mapping[str, Any], start: int, batch: int) -> Tensor:
        if isinstance(self._source, Tensor):
            if start + batch > len(self._source):
                raise ValueError(
                    f"{self._said} must have a row for every sequence, got {len(self._source)} rows and "
                    f"sequence number {start + batch - 1}"
                )
            return self._source[start : start + batch]
        if isinstance(self._source, str):
            if self._source not in entries:
                raise ValueError(
                    f"{self._said}: there is no entry {self._source!r} in the batch ({', '.join(entries)})"
                )
            found = entries[self._source]
        else:
            found = self._source(entries)
        found = as_tensor(found, self._said)
        self._check_kind(found)
        return found

    def _check_kind(self, found: Tensor) -> None:
        if found.is_nested or found.layout != torch.strided:
            what = "a nested tensor" if found.is_nested else str(found.layout)
            raise TypeError(f"{self._said} must be dense, got {what}")
        kind = str(found.dtype).removeprefix("torch.")
        whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
        if self._labels and not whole:
            raise TypeError(f"{self._said} asks for a label, so it must hold whole numbers, got {kind}")
        if not self._labels and found.dtype != torch.bool:
            more = "; labels are asked for as a pair (labels, 3) or (labels, [3, 4])" if whole else ""
            raise TypeError(f"{self._said} must be bool, True for the rows of the view, got {kind}{more}")


def _pair(pair: tuple[Any, ...], said: str) -> tuple[Any, tuple[int, ...]]:
    """The selection of a pair, and its labels."""
    if len(pair) != 2 or isinstance(pair[0], tuple):
        raise TypeError(f"{said} must be a pair (selection, label), got a tuple of {len(pair)}")
    asked = pair[1]
    several = asked.tolist() if isinstance(asked, (np.ndarray, Tensor)) else asked
    several = list(several) if isinstance(several, (list, tuple, set, frozenset, range)) else [several]
    try:
        labels = tuple(operator.index(label) for label in several if not isinstance(label, bool))
    except TypeError:
        labels = ()
    if not labels or len(labels) < len(several):
        raise TypeError(f"{said} must have a whole number or a list of them as its label, got {asked!r}")
    return pair[0], labels


def make_selections(rows: RowsSpec) -> list[Selection]:
    """The selections by name, a single one by the name ``"rows"``.

    Raises TypeError or ValueError for names that cannot be those of views, and for no selection at all.
    """
    if rows is None:
        return []
    if not isinstance(rows, Mapping):
        return [Selection(_ALONE, rows, "rows")]
    if not rows:
        raise ValueError("rows must hold at least one selection, got an empty mapping")
    for name in rows:
        if not isinstance(name, str) or not name.strip():
            raise TypeError(f"rows must have names of views, texts that are not empty, got {name!r}")
        if name in VIEWS:
            raise ValueError(f"rows must have names that no other view has, got {name!r}")
    return [Selection(name, source, f"rows[{name!r}]") for name, source in rows.items()]
