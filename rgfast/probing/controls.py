"""Controls of a probe: the same model with random weights, or the same model on shuffled tokens."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rgfast.probing.capture.batches import batch_rows
from rgfast.probing.capture.calls import Caller
from rgfast.probing.capture.entries import MaskSpec
from rgfast.probing.capture.layers import check_model
from rgfast.probing.capture.padding import PaddingSpec, as_keep, is_padding_name, looks_like_padding
from rgfast.probing.distributed import unwrapped
from rgfast.probing.sharding import block_of, gathered, is_sharded, local, reshard, whole
from rgfast.probing.unread import Unread
from rgfast.validation import as_tensor

__all__ = ["random_twin", "random_weights", "shuffled"]

# What names of whole numbers ``[B, T]`` beside the tokens hold.
_NO_TOKENS = ("mask", "type", "position", "label", "segment", "target")
_PARTS = ("encoder", "decoder")


@contextmanager
def random_weights(model: nn.Module, seed: int) -> Iterator[nn.Module]:
    """``model`` with weights drawn anew: :func:`random_twin`, but of a sharded model, which cannot be copied,
    the model itself, whose weights are back when the context is left.

    Every rank draws the weights of one module at a time, those of one process, and keeps its part: a module
    with a ``reset_parameters`` of its own, or a block of a Hugging Face model, is whole on every rank
    meanwhile. All ranks call this together.
    Raises what :func:`random_twin` does.
    """
    check_model(model)
    model = unwrapped(model)
    if not is_sharded(model):
        yield random_twin(model, seed)
        return
    _check_weights(model)
    reshard(model)
    kept = [(part, part.clone()) for part in (local(p.detach()) for p in model.parameters())]
    try:
        _draw(model, seed)
        _check_drawn(model)
        yield model
    finally:
        reshard(model)
        with torch.no_grad():
            for part, before in kept:
                part.copy_(before)


def random_twin(model: nn.Module, seed: int) -> nn.Module:
    """A copy of ``model`` with weights drawn anew; buffers stay.

    Every module's own ``reset_parameters`` draws them, and then ``_init_weights`` of Hugging Face models, as
    when such a model is made from its configuration. ``model`` and torch's generators are as before. Parts
    are reset before what holds them: a model with a ``reset_parameters`` of its own has the last word.

    Raises TypeError for what is no module, ValueError for parameters that nothing draws (naming them),
    weights that are offloaded or quantized, a model without parameters, and one that cannot be copied.
    """
    check_model(model)
    model = unwrapped(model)
    _check_weights(model)
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"control='random_weights' needs a copy of {type(model).__name__}, and copying it failed: {error}"
        ) from error
    _draw(twin, seed)
    _check_drawn(twin)
    return twin


def _draw(model: nn.Module, seed: int) -> None:
    """Draw the model's weights anew; what nothing draws is NaN."""
    kept = {name: value.clone() for name, value in model.named_buffers()}
    devices = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        for parameter in model.parameters():
            parameter.fill_(math.nan)
        for module in reversed(list(model.modules())):
            if (reset := _reset_of(module)) is not None:
                with gathered(module.modules()):
                    reset()
        for owner, module in _configured(model):
            # Some models draw the weights of a module's parts, too, as GPT-2 does those of its projections.
            with gathered(block_of(module)):
                owner._init_weights(module)
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])


def _reset_of(module: nn.Module) -> Any:
    """The method that draws a module's weights; torch's attention and transformer have a private one."""
    for name in ("reset_parameters", "_reset_parameters"):
        method = getattr(module, name, None)
        if callable(method):
            needed = [p for p in inspect.signature(method).parameters.values() if p.default is p.empty]
            if not any(
                p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in needed
            ):
                return method
    return None


def _configured(model: nn.Module) -> Iterator[tuple[Any, nn.Module]]:
    """Parts of Hugging Face models, inner ones first, each after the innermost model that it belongs to."""
    owners: dict[str, Any] = {}
    for name, module in model.named_modules():
        parent = owners.get(name.rpartition(".")[0]) if name else None
        own = callable(getattr(module, "_init_weights", None)) and hasattr(module, "config")
        owners[name] = module if own else parent
    for name, module in reversed(list(model.named_modules())):
        if owners[name] is not None:
            # What marks weights that came from a checkpoint, which are not to be drawn.
            for value in (module, *module.parameters(recurse=False)):
                if getattr(value, "_is_hf_initialized", False):
                    value._is_hf_initialized = False
            yield owners[name], module


def _check_weights(model: nn.Module) -> None:
    if not any(True for _ in model.parameters()):
        raise ValueError(
            f"control='random_weights' needs a model with parameters, and {type(model).__name__} has none"
        )
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("control='random_weights' needs weights in memory, and some are offloaded (meta)")
    whole = [
        (name, p) for name, p in model.named_parameters() if not (p.is_floating_point() or p.is_complex())
    ]
    packed = {name: type(module).__name__ for name, module in model.named_modules() if _is_quantized(module)}
    packed |= {name: str(p.dtype).removeprefix("torch.") for name, p in whole}
    if packed:
        raise ValueError(
            f"control='random_weights' needs floating weights, and these are quantized: {_listed(packed)}"
        )


def _check_drawn(twin: nn.Module) -> None:
    """Raise ValueError if a weight is left that nothing has drawn."""
    lacking = {}
    for name, module in twin.named_modules():
        for p in module.parameters(recurse=False):
            if bool(whole(p).isnan().any()):
                lacking[name or "the model itself"] = type(module).__name__
    if lacking:
        raise ValueError(
            "control='random_weights' needs a method reset_parameters() that draws every parameter of a "
            f"module, and nothing draws those of {_listed(lacking)}; give them one, or probe a model that "
            "was never trained instead"
        )


def _listed(found: Mapping[str, str]) -> str:
    words = [f"{name} ({kind})" for name, kind in list(found.items())[:5]]
    return ", ".join(words) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))


def shuffled(
    batches: Iterable[Any],
    model: nn.Module,
    *,
    seed: int,
    rank: int,
    mask: MaskSpec,
    padding: PaddingSpec,
    reserved: frozenset[str],
) -> Iterator[Any]:
    """The batches, with the tokens of each permuted across its sequences and positions.

    Padding and what ``mask`` hides stay where they are. The permutation is a function of ``seed``, ``rank``
    and the number of the batch alone.

    Raises ValueError for a batch without tokens (whole numbers ``[B, T]``), or with several that might be.
    """
    check_model(model)
    shuffler = _Shuffler(unwrapped(model), mask, padding, reserved)
    for number, batch in enumerate(batches):
        words = np.random.SeedSequence([seed, rank, number]).generate_state(2)
        generator = torch.Generator("cpu").manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        yield shuffler(batch, generator) if batch_rows(batch) else batch


class _Shuffler:
    def __init__(
        self, model: nn.Module, mask: MaskSpec, padding: PaddingSpec, reserved: frozenset[str]
    ) -> None:
        self._caller, self._mask, self._padding, self._reserved = Caller(model), mask, padding, reserved
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        ordered = [p for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
        self._first = ordered[0].name if ordered else ""
        self._required = max(1, sum(p.default is p.empty for p in ordered))
        self._binary: dict[str, Tensor] = {}
        self._unread = Unread()

    def __call__(self, batch: Any, generator: torch.Generator) -> Any:
        entries = self._caller.entries(batch)
        if isinstance(batch, Mapping):
            return {**entries, **self._permuted(entries, self._named(entries), generator)}
        items = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        if items and isinstance(items[0], Mapping):
            first = self._caller.entries(items[0])
            new = self._permuted(entries, self._named(first), generator)
            return [{**first, **new}, *items[1:]]
        names = list(entries)
        tokens = [name for name in names[: self._required] if _may_be_tokens(entries[name])]
        if not tokens or tokens[0] != names[0]:
            raise ValueError(_refused(entries[names[0]], names[0]))
        new = self._permuted(entries, tokens, generator)
        found = [new.get(name, entries[name]) for name in names]
        return tuple(found) if isinstance(batch, (tuple, list)) else found[0]

    def _named(self, entries: Mapping[str, Any]) -> list[str]:
        """Which entries of a mapping are the tokens."""
        found = [
            name
            for name, value in entries.items()
            if _may_be_tokens(value)
            and name not in self._reserved
            and not is_padding_name(name)
            and not any(word in name.lower() for word in _NO_TOKENS)
        ]
        called = [name for name in found if name.endswith("input_ids")] or [
            name for name in found if name == self._first
        ]
        if called or len(found) == 1:
            return called or found
        if found:
            raise ValueError(
                f"control='shuffled_tokens' takes one entry of tokens, named input_ids or as forward's first "
                f"argument, and the batch has {', '.join(found)}"
            )
        name = self._first if self._first in entries else next(iter(entries))
        raise ValueError(_refused(entries[name], name))

    def _permuted(
        self, entries: Mapping[str, Any], names: list[str], generator: torch.Generator
    ) -> dict[str, Tensor]:
        found = {}
        for name in names:
            tokens = entries[name]
            moves = self._moves(entries, name).cpu()
            own = tokens.cpu()
            flat = own[moves]
            changed = own.clone()
            changed[moves] = flat[
                torch.randperm(len(flat), generator=generator, dtype=torch.int64, device="cpu")
            ]
            found[name] = changed.to(tokens.device)
        return found

    def _moves(self, entries: Mapping[str, Any], name: str) -> Tensor:
        """``[B, T]`` bool: where a token may move, which is neither padding nor hidden."""
        tokens = entries[name]
        moves = torch.ones(tokens.shape, dtype=torch.bool, device="cpu")
        for entry in self._padding_of(entries, name):
            keep = as_keep(entries[entry], entry, self._binary, self._unread).cpu()
            self._unread.look()
            if keep.shape == moves.shape:
                moves &= keep
        if self._mask is not None:
            hidden = self._mask(entries) if callable(self._mask) else entries.get(self._mask)
            if hidden is not None:
                hidden = as_tensor(hidden, "mask").cpu()
                if hidden.shape == moves.shape and hidden.dtype == torch.bool:
                    moves &= ~hidden
        return moves

    def _padding_of(self, entries: Mapping[str, Any], name: str) -> list[str]:
        """The entries that say which of the tokens ``name`` are padding."""
        asked = list(self._padding.values()) if isinstance(self._padding, Mapping) else [self._padding]
        found = [entry for entry in asked if entry is not None and entry in entries]
        if self._padding == "auto" or isinstance(self._padding, Mapping):
            for entry, value in entries.items():
                if entry == name or entry in self._reserved or not isinstance(value, Tensor):
                    continue
                if _part(entry) not in ("", _part(name)):
                    continue
                unnamed = entry.startswith("input") and entry[5:].isdigit()
                if is_padding_name(entry) or (unnamed and looks_like_padding(value, entries[name])):
                    found.append(entry)
        return list(dict.fromkeys(found))


def _part(name: str) -> str:
    """Whether an entry is of an encoder or a decoder, as its name says."""
    return next((part for part in _PARTS if name.startswith(part)), "")


def _may_be_tokens(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.is_nested or value.dim() != 2:
        return False
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _refused(value: Any, name: str) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        shape = "nested" if value.is_nested else list(value.shape)
        what = f"{name} is {kind} {shape}"
    else:
        what = f"{name} is a {type(value).__name__}"
    return f"control='shuffled_tokens' takes tokens (whole numbers [B, T]), and {what}"
