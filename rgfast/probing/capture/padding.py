"""Which positions of a layer are padding: finding the entry that says so, and reading it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rgfast.probing.capture.batches import is_array
from rgfast.probing.capture.notes import Notes
from rgfast.probing.capture.patterns import by_layer
from rgfast.probing.unread import Unread
from rgfast.runtime.waiting import sent, waits_for
from rgfast.validation import kind_and_way

__all__ = ["Padding", "PaddingSpec", "as_keep", "check_padding", "is_padding_name", "looks_like_padding"]

# "auto", the name of an entry, None, or any of these by pattern of layer names.
PaddingSpec = str | Mapping[str, str | None] | None

_SUFFIXES = ("attention_mask", "key_padding_mask", "padding_mask", "pad_mask")
# What the word before the suffix says of the layers that a mask is of; None: it is of no layer's rows.
_ROLES: dict[str, str | None] = {
    **dict.fromkeys(("encoder", "enc", "src", "source"), "encoder"),
    **dict.fromkeys(("decoder", "dec", "tgt", "trg", "target"), "decoder"),
    **dict.fromkeys(("memory", "cross", "global", "local", "sliding", "causal"), None),
}
_TOWERS = {
    "vision": ("vision", "visual", "image", "img", "pixel", "patch", "video"),
    "audio": ("audio", "speech", "acoustic"),
    "text": ("text", "language"),
}
# Scores of this and less are as good as minus infinity.
_HIDES = -1e4
# Entries of [B, T] that are no masks, or masks that say nothing of which rows count.
_OTHER = ("label", "ids", "target", "special_tokens_mask", "token_type", "position", "segment")


def is_padding_name(name: str) -> bool:
    """Whether an entry of this name is a padding mask by custom."""
    return _word(name) is not None


def _word(name: str) -> str | None:
    """What stands before ``attention_mask`` and the like; None for other names, and if it is of no rows."""
    word = _before_suffix(name)
    return None if word is None or _ROLES.get(word, word) is None else word


def _before_suffix(name: str) -> str | None:
    for suffix in _SUFFIXES:
        if name == suffix or name.endswith(f"_{suffix}"):
            return name.removesuffix(suffix).strip("_").lower()
    return None


def _is_of_others(name: str) -> bool:
    """Whether a padding mask is of a stream that is not probed, or of no stream's rows."""
    word = _before_suffix(name)
    return word is not None and _ROLES.get(word, word) in ("encoder", "decoder", None)


def looks_like_padding(value: Any, first: Any) -> bool:
    """Whether ``value`` beside the tokens ``first`` can only be a padding mask: ``[B, T]`` of 0 and 1, or
    bool, and the tokens that count are at one end of every sequence."""
    if not (isinstance(value, Tensor) and isinstance(first, Tensor)) or value.is_nested or first.is_nested:
        return False
    if value.dim() != 2 or first.dim() not in (2, 3) or value.shape != first.shape[:2] or value.shape[1] < 2:
        return False
    if value.is_floating_point() or value.is_complex() or not value.numel():
        return False
    if not is_binary(value):
        return False
    ordered = value.to(torch.int64)
    steps = ordered.diff(dim=1)
    return bool(((steps <= 0).all(1) | (steps >= 0).all(1)).all()) and bool(ordered.any())


def is_binary(value: Tensor) -> bool:
    """Whether all values are 0 or 1."""
    return bool(((value == 0) | (value == 1)).all())


def as_keep(value: Tensor, name: str, binary: dict[str, Tensor], unread: Unread) -> Tensor:
    """``[B, T]`` bool, True for positions that count, of a mask of any usual kind.

    Whole numbers and bool: not 0 counts, but for ``…padding_mask``, where True is padding (bool only). Floats
    that are added to attention scores: 0 counts, -10,000 and less does not; floats of 0 and 1 are read as
    whole numbers, and from then on so is ``name``, which goes to ``binary``. ``[B, 1, 1, T]`` is read too;
    of ``[B, 1, Q, T]`` or ``[B, Q, T]`` a position counts if any query may attend to it.

    Raises ValueError for other kinds, naming the entry; ``unread`` says when for values on a device.
    """
    keep = _elementwise(value, name, binary, unread)
    if keep.dim() == 4 and keep.shape[1] == 1:
        keep = keep[:, 0]
    if keep.dim() == 3:
        keep = keep.any(1)
    if keep.dim() != 2:
        raise ValueError(
            f"{name} must be [B, T], [B, 1, 1, T] or [B, 1, Q, T], got shape {list(value.shape)}"
        )
    return keep


def _elementwise(value: Tensor, name: str, binary: dict[str, Tensor], unread: Unread) -> Tensor:
    hides = name.endswith(_SUFFIXES[1:])  # True is padding, as in torch.nn
    if value.dtype == torch.bool:
        return ~value if hides else value
    if not value.is_floating_point():
        if hides:
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(f"{name} must be bool (True is padding) or a float mask to be added, got {kind}")
        return value != 0
    ones, added = (value == 0) | (value == 1), (value == 0) | (value <= _HIDES)
    counts = torch.zeros((), dtype=torch.bool, device=value.device)  # whether 1 counts rather than 0
    if not hides:
        before = sent(binary.get(name, counts), value.device)
        counts = ones.all() & (before | value.any())
        binary[name] = before | counts
    wrong = (~added).flatten()
    odd = value.flatten().index_select(0, wrong.to(torch.uint8).argmax(0, keepdim=True))
    found = torch.stack([(wrong.any() & ~counts).to(torch.float64), odd[0].to(torch.float64)])

    def said(found: Tensor) -> str:
        bad, odd = found.tolist()
        if not bad:
            return ""
        return f"{name} must hold 0 (counts) and {_HIDES:g} or less (padding), or 0 and 1, got {odd:g}"

    unread.check(found, said)
    return torch.where(counts, value == 1, value == 0)


class Padding:
    """Says for every layer which entry tells its padding, and reads it.

    Args:
        padding: ``"auto"``, an entry's name, None (every position counts), or these by layer pattern.
        names: the dotted names of the layers.
        modules: the names of all modules of the model.
        notes: takes what has to be said.
        unread: takes checks of values on a device.

    Raises ValueError for a pattern that no layer matches.
    """

    def __init__(
        self,
        padding: PaddingSpec,
        names: Sequence[str],
        modules: Iterable[str],
        notes: Notes,
        unread: Unread,
    ) -> None:
        self._names, self._notes, self._unread = [name.lower() for name in names], notes, unread
        self._by_layer: list[str | None] = [x for _, x in by_layer("padding", padding, names, "auto")]
        self._parts = {part for name in modules for part in name.lower().split(".")}
        self._searches = "auto" in self._by_layer
        self._binary: dict[str, Tensor] = {}
        self._extra: set[str] = set()

    def read_too(self, name: str) -> bool:
        """Read an entry as a padding mask, whatever its name; False if none is looked for."""
        self._extra.add(name)
        return self._searches

    def entries(self, entries: Mapping[str, Any], reserved: frozenset[str]) -> list[str | None]:
        """The name of the entry that tells each layer's padding, None for none.

        Entries in ``reserved`` mean something else. Raises ValueError if one that was named is not there.
        """
        found: list[str | None] = []
        candidates = {
            name: word
            for name, value in entries.items()
            if isinstance(value, Tensor) and name not in reserved
            for word in ["" if name in self._extra else _word(name)]
            if word is not None
        }
        for layer, asked in enumerate(self._by_layer):
            if asked == "auto":
                asked = self._auto(layer, candidates, entries)
            elif asked is not None and asked not in entries:
                raise ValueError(f"padding: there is no entry {asked!r} in the batch ({', '.join(entries)})")
            found.append(asked)
        return found

    def keeps(
        self, names: Sequence[str | None], entries: Mapping[str, Any], rows: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """``[B, T_l]`` bool of every layer's ``rows[l]`` ``[B, T_l, d_l]``, on the device of the first ones;
        None if every position counts.

        Raises ValueError if a mask does not fit the layer that it is of.
        """
        read: dict[str, tuple[Tensor, Tensor | None]] = {}
        out: list[Tensor | None] = []
        device = next(x.device for x in rows if x is not None)
        for layer, (name, x) in enumerate(zip(names, rows, strict=True)):
            if name is None or x is None:
                out.append(None)
                continue
            if name not in read:
                keep = as_keep(entries[name], name, self._binary, self._unread)
                every = not waits_for(keep.device) and bool(keep.all())
                read[name] = keep, None if every else sent(keep, device)
            keep, counted = read[name]
            out.append(counted if self._fits(keep, name, layer, x) else None)
        return out

    def _fits(self, keep: Tensor, name: str, layer: int, x: Tensor) -> bool:
        """Whether a mask is of a layer's rows, rather than of those that each was reduced from."""
        if keep.shape == x.shape[:2]:
            return True
        if x.shape[1] == 1 and len(keep) == len(x):
            return False
        raise ValueError(
            f"{name} must be {list(x.shape[:2])}, as layer {self._names[layer]!r} is, got shape "
            f"{list(keep.shape)}; padding={{{self._names[layer]!r}: None}} says that all its positions count"
        )

    def note_unread(
        self,
        names: Sequence[str | None],
        entries: Mapping[str, Any],
        length: int,
        reserved: frozenset[str],
    ) -> None:
        """Say which entries look like masks and were not read as padding."""
        read = {id(entries[name]) for name in names if name is not None}  # an item of a tuple has two names
        if not self._searches:
            return
        for name, value in entries.items():
            if id(value) in read or name in reserved or any(word in name.lower() for word in _OTHER):
                continue
            if not isinstance(value, Tensor) or value.is_nested or value.dim() != 2:
                continue
            if value.shape[1] < 2 or value.shape[1] != length or _is_of_others(name):
                continue
            called = "mask" in name.lower()
            if value.dtype != torch.bool and not called:
                continue
            note = (
                f"the entry {name!r} was not read as padding, so all positions count; padding={name!r} "
                "leaves out those where it is 0 or False"
            )
            # Whole numbers on a device are taken for 0 and 1, which looking at them would wait for.
            if value.dtype == torch.bool or waits_for(value.device) or is_binary(value):
                self._notes.add(note)

    def _auto(self, layer: int, candidates: Mapping[str, str], entries: Mapping[str, Any]) -> str | None:
        role, towers = self._role(layer)
        generic: str | None = None
        for name, word in candidates.items():
            asked = _ROLES.get(word, word) or ""
            tower = next((t for t, words in _TOWERS.items() if word in words), "")
            if word == "":
                generic = name
            elif tower:
                if tower in towers or (tower == "text" and not towers and role != "decoder"):
                    return name
            elif asked in ("encoder", "decoder"):
                other = "decoder" if asked == "encoder" else "encoder"
                if role == asked or (role != other and not self._has(other)):
                    return name
            elif any(word in part for part in self._names[layer].split(".")):
                return name
        if generic is None:
            return None
        tokens = any(isinstance(v, Tensor) and v.dim() == 2 and "ids" in k for k, v in entries.items())
        if towers & {"vision", "audio"} and tokens:
            tower = " and ".join(sorted(towers & {"vision", "audio"}))
            self._notes.add(f"all positions of {tower} layers count: {generic} is of the text")
            return None
        if role == "decoder" and self._has("encoder"):
            self._notes.add(
                f"all positions of decoder layers count: {generic} is of the encoder, and there is no "
                f"decoder_attention_mask; padding={{'*decoder*': NAME}} names another"
            )
            return None
        return generic

    def _role(self, layer: int) -> tuple[str, set[str]]:
        """Whether a layer is in an encoder or a decoder, and of which towers its name speaks."""
        parts = self._names[layer].split(":")[0].split(".")
        role = next((r for part in parts for r in ("encoder", "decoder") if part.startswith(r)), "")
        towers = {t for t, words in _TOWERS.items() if any(w in part for part in parts for w in words)}
        return role, towers

    def _has(self, role: str) -> bool:
        """Whether the model has an encoder, or a decoder, that is a stack."""
        return any(part.startswith(role) for part in self._parts)


def check_padding(padding: Any) -> None:
    """Raise TypeError unless ``padding`` is a :data:`PaddingSpec`."""
    values = list(padding.values()) if isinstance(padding, Mapping) else [padding]
    for value in values:
        if is_array(value):
            raise TypeError(
                "padding must be 'auto', the name of a batch entry, None, or these by layer pattern, got "
                f"{kind_and_way(value)}; let the batches hold the mask and give its entry's name"
            )
        if value is not None and not isinstance(value, str):
            raise TypeError(
                "padding must be 'auto', the name of a batch entry, None, or these by layer pattern, got "
                f"{value!r}"
            )
