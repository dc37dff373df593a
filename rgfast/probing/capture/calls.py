"""From a batch of any usual form to a call of the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rgfast.probing.capture.batches import as_entry, batch_items, entry_name, is_array, only_numbers
from rgfast.probing.capture.notes import Notes
from rgfast.probing.capture.padding import Padding, is_padding_name, looks_like_padding
from rgfast.probing.offloaded import runs_on
from rgfast.runtime.waiting import sent

__all__ = ["Caller"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

# What wrappers call the model inside them.
_INSIDE = ("base_model", "module", "model", "_orig_mod")


class Caller:
    """Calls a model on a batch: what its ``forward`` takes is passed, the rest of a mapping is not.

    Of a tuple as many items are passed as ``forward`` requires, and a padding mask among the others, if
    ``forward`` takes one. A forward of one argument that takes a mapping gets it whole.
    """

    def __init__(self, model: nn.Module, padding: Padding | None = None, notes: Notes | None = None) -> None:
        self._model, self._padding, self._notes = model, padding, notes
        self._signature = inspect.signature(model.forward)
        self._inner = _inner_signature(model)
        parameters = self._signature.parameters.values()
        kinds = {p.kind: p.name for p in parameters}
        self._keywords = kinds.get(inspect.Parameter.VAR_KEYWORD)
        self._variadic = inspect.Parameter.VAR_POSITIONAL in kinds
        self._named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._ordered = [p.name for p in parameters if p.kind in _POSITIONAL]
        self._required = sum(p.kind in _POSITIONAL and p.default is p.empty for p in parameters)
        self._takes_mapping = len(self._ordered) == 1 and _may_be_mapping(
            self._signature.parameters[self._ordered[0]]
        )
        self._device = runs_on(model)
        self._masks: dict[int, str | None] = {}
        self._sources: dict[int, tuple[Tensor, Tensor]] = {}

    def source(self, value: Any) -> Any:
        """What was given for an entry of :meth:`entries`: where that is on the host, reading it waits for
        nothing. Other values are themselves."""
        return self._sources[id(value)][1] if id(value) in self._sources else value

    def forget(self) -> None:
        """Forget the sources, at the end of a forward."""
        self._sources.clear()

    def entries(self, batch: Any) -> dict[str, Any]:
        """What a batch holds, by name (``input``, ``input1``, … for what has none), on the model's device.

        Raises TypeError for a batch of plain numbers, and what :func:`as_entry` does.
        """
        held = batch_items(batch)
        if not any(map(is_array, held)) and any(map(only_numbers, held)):
            raise TypeError(f"batches must hold tensors or arrays, got a {type(batch).__name__} of numbers")
        if isinstance(batch, Mapping):
            return {str(key): self._placed(value, entry_name(key)) for key, value in batch.items()}
        whole = not isinstance(batch, (tuple, list))
        items = [batch] if whole else list(batch)
        found: dict[str, Any] = {}
        for k, item in enumerate(items):
            if isinstance(item, Mapping):
                found.update(self.entries(item))
            else:
                name = "batches" if whole else entry_name(k)
                found[_unnamed(k + 1)[k]] = self._placed(item, name)
        return found

    def bound(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], reserved: frozenset[str]
    ) -> dict[str, Any]:
        """The arguments of a forward by name; a mapping among them is taken apart.

        What a wrapper hands on as it is has the names that the model inside gives it, else ``input``,
        ``input1`` and so on.
        """
        try:
            found = dict(self._inner.bind_partial(*args, **kwargs).arguments)
        except TypeError:
            found = dict(kwargs)
        for parameter in self._inner.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                found.update(found.pop(parameter.name, {}))
            elif parameter.kind is parameter.VAR_POSITIONAL:
                values = found.pop(parameter.name, ())
                names = _unnamed(len(args))[len(args) - len(values) :]
                found.update(zip(names, values, strict=True))
                self._read_unnamed(args, names, reserved)
        for value in [v for v in found.values() if isinstance(v, Mapping)]:
            found = {**{str(key): item for key, item in value.items()}, **found}
        return found

    def __call__(self, batch: Any, entries: Mapping[str, Any], reserved: frozenset[str]) -> Any:
        """The model's output. ``reserved`` names entries that a model with ``**kwargs`` does not get either.

        Raises ValueError if a mapping holds nothing that ``forward`` takes.
        """
        if isinstance(batch, Mapping):
            return self._on_mapping(entries, reserved)
        items = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        if items and isinstance(items[0], Mapping):
            return self._on_mapping(self.entries(items[0]), reserved)
        values = [entries[name] for name in entries]
        if self._variadic:
            return self._model(*values)
        passed = max(1, self._required)
        masks = {} if "input" in reserved else self._masks_of(values, passed, reserved)
        return self._model(*values[:passed], **masks)

    def _on_mapping(self, entries: Mapping[str, Any], reserved: frozenset[str]) -> Any:
        passed = {
            key: value
            for key, value in entries.items()
            if key in self._named or (self._keywords is not None and key not in reserved)
        }
        if passed:
            return self._model(**passed)
        kind = type(self._model).__name__
        holds = ", ".join(entries) or "nothing"
        if self._takes_mapping and entries:
            try:
                return self._model(dict(entries))
            except (TypeError, AttributeError, IndexError, KeyError) as error:
                raise ValueError(
                    f"batches: {kind}.forward takes {self._ordered[0]}, and the batch holds {holds}; given "
                    f"the whole mapping it fails ({type(error).__name__}: {error})"
                ) from error
        raise ValueError(
            f"batches: {kind}.forward takes {', '.join(sorted(self._named)) or 'no named argument'}, and the "
            f"batch holds {holds}"
        )

    def _masks_of(self, values: list[Any], passed: int, reserved: frozenset[str]) -> dict[str, Any]:
        """The padding masks among the items that are not passed, by the argument that takes them.

        What an item is is decided on the first batch: later ones may have no padding, or other kinds of it.
        """
        out: dict[str, Any] = {}
        for k in range(passed, len(values)):
            if k not in self._masks:
                self._masks[k] = self._argument_for(k, values, reserved)
            if (name := self._masks[k]) is not None:
                out[name] = values[k]
        return out

    def _argument_for(self, k: int, values: list[Any], reserved: frozenset[str]) -> str | None:
        entry = f"input{k}"
        if entry in reserved or not looks_like_padding(self.source(values[k]), self.source(values[0])):
            return None
        names = [name for name in self._named if is_padding_name(name)]
        at_k = self._ordered[k] if k < len(self._ordered) else ""
        name = at_k if at_k in names else "attention_mask" if "attention_mask" in names else ""
        if not name and len(names) == 1:
            name = names[0]
        if name and (values[k].dtype == torch.bool or name.endswith("attention_mask")):
            return name
        self._read_too(k, ", and not passed to forward, which takes none")
        return None

    def _read_unnamed(self, args: tuple[Any, ...], names: list[str], reserved: frozenset[str]) -> None:
        """Have those of the last arguments read that can only be padding masks; decided when first seen."""
        for k, name in enumerate(names, start=len(args) - len(names)):
            if k and k not in self._masks:
                self._masks[k] = None
                if name not in reserved and looks_like_padding(self.source(args[k]), self.source(args[0])):
                    self._read_too(k, "")

    def _read_too(self, k: int, more: str) -> None:
        if self._padding is not None and self._notes is not None and self._padding.read_too(f"input{k}"):
            self._notes.add(
                f"item {k} of a batch was read as a padding mask (1 counts){more}; padding=None counts every "
                "position"
            )

    def _placed(self, value: Any, name: str) -> Any:
        value = as_entry(value, name)
        if not isinstance(value, Tensor) or self._device is None:
            return value
        placed = sent(value, self._device)
        if placed is not value:
            self._sources[id(placed)] = placed, value
        return placed


def _unnamed(number: int) -> list[str]:
    """The names of so many items without names."""
    return ["input" if not k else f"input{k}" for k in range(number)]


def _inner_signature(model: nn.Module) -> inspect.Signature:
    """That of ``forward``; if it hands all on (adapters, DataParallel), that of the model inside."""
    signature = inspect.signature(model.forward)
    hands_on = {p.kind for p in signature.parameters.values()} <= {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }
    children = dict(model.named_children())
    inner = next((children[name] for name in _INSIDE if name in children), None)
    return _inner_signature(inner) if hands_on and inner is not None else signature


def _may_be_mapping(parameter: inspect.Parameter) -> bool:
    """Whether an argument may stand for a whole batch; ``input`` is torch.nn's word for a tensor."""
    if parameter.annotation is not parameter.empty:
        kind = str(parameter.annotation).lower()
        return any(word in kind for word in ("dict", "mapping", "encoding", "any")) or kind == "batch"
    return parameter.name != "input"
