"""What every entry of a batch means: an argument of the model, padding, a mask, a target."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from rgfast.probing.capture.activations import Activation
from rgfast.probing.capture.batches import as_entry, batch_rows, only_numbers
from rgfast.probing.capture.calls import Caller
from rgfast.probing.capture.layers import Tap
from rgfast.probing.capture.notes import Notes
from rgfast.probing.capture.padding import Padding, PaddingSpec
from rgfast.probing.capture.placed import summed_here
from rgfast.probing.capture.positions import Origin, from_first_token
from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.capture.selections import Selection
from rgfast.probing.sharding import whole
from rgfast.probing.targets import Target
from rgfast.probing.unread import Unread
from rgfast.runtime.waiting import sent
from rgfast.validation import as_tensor

__all__ = ["Entries", "MaskSpec"]

MaskSpec = str | Any | None  # a name, or a callable that takes the entries


class Entries:
    """The entries of the forward that is running, by name, and how a batch becomes a call of the model."""

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[Tap],
        *,
        mask: MaskSpec,
        padding: PaddingSpec,
        origin: Origin,
        targets: Sequence[Target],
        selections: Sequence[Selection] = (),
        notes: Notes,
        unread: Unread,
    ) -> None:
        self._model, self._mask, self._origin, self._targets = model, mask, origin, targets
        self._selections, self._notes, self._unread = selections, notes, unread
        self._names = [tap.name for tap in taps]
        modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
        self._padding = Padding(padding, self._names, modules, notes, unread)
        self._caller = Caller(model, self._padding, notes)
        named = [mask, *(target.entry for target in targets), *(chosen.entry for chosen in selections)]
        self._reserved = frozenset(name for name in named if isinstance(name, str))
        self._noted: dict[str, Any] = {}
        self._now: dict[str, Any] = {}
        self._places: list[tuple[str | None, bool]] | None = None

    @property
    def now(self) -> Mapping[str, Any]:
        """The entries of the forward that is running."""
        return self._now

    def note(self, entries: Mapping[str, Any]) -> None:
        """Keep entries that the model itself does not take, for the next forward."""
        for name, value in entries.items():
            listed = isinstance(value, (list, tuple)) and only_numbers(value)
            self._noted[name] = as_tensor(value, name) if listed else as_entry(value, name)

    def run(self, batch: Any) -> Any:
        """The output of the model on a batch; an empty batch gives None."""
        if not batch_rows(batch):
            return None
        entries = self._caller.entries(batch)
        self.note(entries)
        return self._caller(batch, entries, self._reserved)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward on these arguments begins: they are entries too.

        Raises ValueError if it goes on from an earlier forward, as those of ``generate()`` do.
        """
        bound = self._caller.bound(args, kwargs, self._reserved)
        if _is_generating(self._model) or _cached(bound):
            raise ValueError(
                "generate() cannot be probed: its forwards go over the same sequences again, or take one "
                "token at a time from a cache; generate outside the probe, then run the model once on prompt "
                "and generated tokens together"
            )
        given = {**bound, **self._noted}
        self._now = {name: whole(x) if isinstance(x, Tensor) else x for name, x in given.items()}
        self._noted = {}

    def batch(self, activations: Sequence[Activation | None], taps: Sequence[int], seen: int) -> RowBatch:
        """The batch after ``seen`` sequences, whose layers, of the taps ``taps[l]``, put out ``activations``.

        Raises ValueError if a mask, a target or a selection of rows does not fit, or an entry is missing.
        """
        given = {name: self._caller.source(value) for name, value in self._now.items()}
        by_tap = self._padding.entries(given, self._reserved)
        names = [by_tap[tap] for tap in taps]
        longest = max(a.rows.shape[1] for a in activations if a is not None)
        # A nested tensor ends with the longest sequence, the mask that it comes from with the last column.
        for name, a in zip(names, activations, strict=True):
            if name is not None and a is not None and a.keep is not None and not given[name].is_nested:
                longest = max(longest, given[name].shape[-1])
        activations = [None if a is None else a.longer(longest) for a in activations]
        rows = [None if a is None else a.rows for a in activations]
        first = next(x for x in rows if x is not None)
        own = [None if a is None or a.keep is None else sent(a.keep, first.device) for a in activations]
        # What a nested tensor leaves out is what its model's mask left out.
        of_mask = [None if keep is not None else name for name, keep in zip(names, own, strict=True)]
        keeps = [
            mine if mine is not None else found
            for mine, found in zip(own, self._padding.keeps(of_mask, given, rows), strict=True)
        ]
        self._padding.note_unread(names, given, longest, self._reserved)
        keys = [
            (name, keep is not None, 0 if x is None else x.shape[1])
            for name, keep, x in zip(names, own, rows, strict=True)
        ]
        batch, length = first.shape[:2]
        if self._selections:
            self._check_alike(rows, taps)
        found = RowBatch(
            rows,
            keeps,
            _masked(self._mask, self._now if callable(self._mask) else given, first),
            [
                sent(target.rows(self._now, given, seen, batch, length, self._unread), first.device)
                for target in self._targets
            ],
            chosen=[
                x if isinstance(x, str) else sent(x, first.device)
                for x in (s.rows(self._now, given, seen, batch, length) for s in self._selections)
            ],
            places=[keys.index(key) for key in keys],
            padded=any(name is not None for name in names) or any(keep is not None for keep in own),
            notes=tuple(self._notes),
        )
        found = summed_here(found)
        return from_first_token(found) if self._origin == "token" else found

    def _check_alike(self, rows: Sequence[Tensor | None], taps: Sequence[int]) -> None:
        """Raise ValueError if layers differ in their positions, of which rows are selected."""
        lengths = {x.shape[1]: self._names[tap] for x, tap in zip(rows, taps, strict=True) if x is not None}
        if len(lengths) > 1:
            told = ", ".join(f"{name} has {length}" for length, name in lengths.items())
            raise ValueError(
                f"{self._selections[0].said} selects rows by position, and the layers differ in their "
                f"positions: {told}; probe layers of one number of positions with rows="
            )

    def end(self) -> None:
        """The forward is over."""
        self._now = {}
        self._caller.forget()


def _masked(mask: MaskSpec, entries: Mapping[str, Any], rows: Tensor) -> Tensor | None:
    """Which tokens were hidden, ``[B, T]`` bool; None if there is no mask."""
    if mask is None:
        return None
    if isinstance(mask, str):
        if mask not in entries:
            raise ValueError(f"mask: there is no entry {mask!r} in the batch ({', '.join(entries)})")
        masked = entries[mask]
    else:
        masked = mask(entries)
    masked = as_tensor(masked, "mask")
    if masked.dtype != torch.bool or masked.shape != rows.shape[:2]:
        raise ValueError(
            f"mask must be bool {list(rows.shape[:2])}, got {str(masked.dtype).removeprefix('torch.')} "
            f"{list(masked.shape)}"
        )
    return sent(masked, rows.device)


def _is_generating(model: nn.Module) -> bool:
    """Whether a method ``generate`` of the model, or of what wraps it, is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate":
            owner = frame.f_locals.get("self")
            if owner is model or (isinstance(owner, nn.Module) and any(m is model for m in owner.modules())):
                return True
        frame = frame.f_back
    return False


def _cached(entries: Mapping[str, Any]) -> bool:
    """Whether a forward starts from keys and values of earlier tokens."""
    past = entries.get("past_key_values")
    if past is None:
        return False
    length = getattr(past, "get_seq_length", None)
    return bool(length()) if length is not None else bool(isinstance(past, (tuple, list)) and past)
