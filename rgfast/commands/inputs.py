"""What ``rgfast probe`` feeds the model: texts, or arrays of a file, as one mapping of whole tensors."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgfast.commands.models import Loaded, load_tokenizer
from rgfast.masking import balanced_mask
from rgfast.probing.capture.calls import Caller

__all__ = ["Inputs", "default_length", "hide", "read_arrays", "read_text", "try_one"]

HIDDEN = "hidden_tokens"
_LENGTH = 128


@dataclass(frozen=True)
class Inputs:
    """Whole arrays by name, all with one row a sequence. ``main`` is the entry that the model reads,
    ``mask`` the one that says which tokens were hidden, ``fixed`` which tokens must not be, ``named`` those
    that select rows."""

    batch: dict[str, Tensor]
    main: str
    mask: str | None = None
    fixed: Tensor | None = None
    mask_token: int | None = None
    named: frozenset[str] = frozenset()

    def share(self, rank: int, ranks: int) -> Inputs:
        """The sequences of one rank: the first ones rank 0's, and so on."""
        count = len(self.batch[self.main])
        part = slice(count * rank // ranks, count * (rank + 1) // ranks)
        return replace(self, batch={name: value[part] for name, value in self.batch.items()})


def read_text(path: str | Path, model: Loaded, *, limit: int | None, length: int | None) -> Inputs:
    """The paragraphs of a UTF-8 file (its lines, where no line is empty) as padded tokens.

    Each is cut to ``length`` tokens (default: 128, or what the model takes where that is less).

    Raises ValueError where there is no text, no tokenizer, or tokens that the model does not know.
    """
    path = Path(path)
    try:
        whole = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"text must be in UTF-8, and {path} is not ({error})") from error
    texts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", whole.strip())]
    if len(texts) == 1:
        texts = [" ".join(line.split()) for line in whole.splitlines()]
    texts = [text for text in texts if text][:limit]
    if len(texts) < 2:
        raise ValueError(
            f"text must hold at least 2 paragraphs (or lines, without empty ones between), and {path} holds "
            f"{len(texts)}"
        )
    tokenizer = load_tokenizer(model)
    most = min(tokenizer.model_max_length, model.longest or tokenizer.model_max_length)
    if length is not None and length > most:
        raise ValueError(f"length must be at most {most}, what the model takes, got {length}")
    least = tokenizer.num_special_tokens_to_add() + 1
    if length is not None and length < least:
        raise ValueError(
            f"length must be at least {least}, a token beside those that the tokenizer adds, got {length}"
        )
    try:
        found = tokenizer(
            texts,
            padding=tokenizer.pad_token_id is not None,
            truncation=True,
            max_length=min(_LENGTH, most) if length is None else length,
            return_attention_mask=True,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
    except Exception as error:  # a tokenizer's own, of any type
        raise ValueError(f"text: the tokenizer of {model.folder} fails on {path}: {error}") from error
    if not found["input_ids"].numel():
        raise ValueError(f"text must hold tokens, and the tokenizer of {model.folder} finds none in {path}")
    batch = {name: value for name, value in found.items() if name != "special_tokens_mask"}
    inputs = Inputs(batch, "input_ids", None, found["special_tokens_mask"] != 0, tokenizer.mask_token_id)
    return _checked(inputs, model.for_inputs(batch), str(path))


def default_length(model: Loaded) -> int:
    """How many tokens a text is cut to by default. Raises ValueError if there is no tokenizer."""
    most = int(load_tokenizer(model).model_max_length)
    return min(_LENGTH, most, model.longest or most)


def read_arrays(path: str | Path, model: Loaded, *, limit: int | None) -> Inputs:
    """The array of an ``.npy`` file, or the arrays of an ``.npz`` file by name.

    A single array is the model's tokens (whole numbers ``[n, T]``) or its floats (``[n, T, D]`` or
    ``[n, D]``, for a MaskedTokenModel the stream that enters its stack). Nothing is unpickled.

    Raises ValueError for whatever is not such a file, and for names that the model's forward does not have.
    """
    path = Path(path)
    arrays = _load(path)
    if not arrays:
        raise ValueError(f"inputs must hold at least one array, and {path} holds none")
    model = model.for_inputs(arrays)
    taken = _arguments(model)
    if len(arrays) == 1 and not set(arrays) & taken:
        (value,) = arrays.values()
        name = {"i": model.tokens, "u": model.tokens, "f": model.floats}.get(value.dtype.kind)
        if name is None:
            raise ValueError(
                f"inputs must be whole numbers or floats, as {type(model.module).__name__} takes them, and "
                f"{path} holds {value.dtype}"
            )
        arrays = {name: value}
    if model.tokens is not None and model.tokens in arrays:
        main = model.tokens
    else:
        main = next((name for name in arrays if name in taken), "")
    if not main:
        raise ValueError(
            f"inputs: {type(model.module).__name__} takes {', '.join(sorted(taken))}, and {path} holds "
            f"{', '.join(arrays)}"
        )
    batch = {name: _tensor(name, value, limit) for name, value in arrays.items()}
    lengths = {name: len(value) for name, value in batch.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"inputs must have as many rows in every array, got {lengths}")
    if lengths[main] < 2:
        raise ValueError(f"inputs must hold at least 2 sequences, and {path} holds {lengths[main]}")
    return _checked(Inputs(batch, main, mask_token=model.mask_token), model, str(path))


def hide(inputs: Inputs, model: Loaded, asked: str | None, seed: int) -> Inputs:
    """``inputs`` with a mask of hidden tokens, as ``asked``.

    None takes the positions that hold the model's mask token, where there are any; ``"none"`` has no mask; a
    number between 0 and 1 hides that share of every position; else the name of a bool array ``[n, T]``.

    Raises ValueError for anything else, and where there is no mask token to hide with.
    """
    tokens = inputs.batch[inputs.main]
    entries = sorted(name for name in inputs.batch if inputs.batch[name].dtype == torch.bool)
    if asked in inputs.batch:
        mask = inputs.batch[asked]
        if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
            kind = str(mask.dtype).removeprefix("torch.")
            raise ValueError(
                f"mask must be a bool array {list(tokens.shape[:2])}, "
                f"and {asked} is {kind} {list(mask.shape)}"
            )
        return _only_taken(replace(inputs, mask=asked), model)
    inputs = _only_taken(inputs, model)
    if asked == "none":
        return inputs
    inputs = _with_special_tokens(inputs, model)
    mask_token = inputs.mask_token if inputs.main == model.tokens else None
    if asked is None:
        if mask_token is None or not bool((tokens == mask_token).any()):
            return inputs
        return _with_mask(inputs, tokens == mask_token, tokens)
    try:
        rate = float(asked)
    except ValueError:
        rate = -1.0
    if not 0 < rate < 1:
        names = f" ({', '.join(entries)})" if entries else ""
        raise ValueError(
            f"mask must be a share between 0 and 1, none, or the name of a bool array in the inputs{names}, "
            f"got {asked!r}"
        )
    if mask_token is None:
        raise ValueError("mask: a share needs a model with a mask token, and there is none to hide with")
    n, length = tokens.shape
    hidden = balanced_mask(n, length, rate, torch.Generator().manual_seed(seed))
    if "attention_mask" in inputs.batch:
        hidden &= inputs.batch["attention_mask"] != 0
    if inputs.fixed is not None:
        hidden &= ~inputs.fixed
    return _with_mask(inputs, hidden, tokens.masked_fill(hidden, mask_token))


def try_one(inputs: Inputs, module: torch.nn.Module) -> None:
    """Run the first two sequences. Raises ValueError with the model's own words where it refuses them."""
    caller = Caller(module)
    some = {name: value[:2] for name, value in inputs.batch.items()}
    entries = caller.entries(some)
    reserved = inputs.named | ({inputs.mask} if inputs.mask is not None else set())
    try:
        with torch.no_grad():
            caller(some, entries, reserved)
    except Exception as error:  # the model's own, of any type
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.batch.items())
        raise ValueError(
            f"inputs: the model does not take {shapes}: {type(error).__name__}: {error}"
        ) from error


def _with_special_tokens(inputs: Inputs, model: Loaded) -> Inputs:
    """The inputs with what a Hugging Face folder's tokenizer, if there is one, says of special tokens."""
    if model.kind == "rgfast" or inputs.main != model.tokens or inputs.mask_token is not None:
        return inputs
    try:
        tokenizer = load_tokenizer(model)
    except ValueError:
        return inputs
    special = torch.tensor(tokenizer.all_special_ids, dtype=torch.int64, device="cpu")
    fixed = torch.isin(inputs.batch[inputs.main], special)
    return replace(inputs, fixed=fixed, mask_token=tokenizer.mask_token_id)


def _with_mask(inputs: Inputs, hidden: Tensor, tokens: Tensor) -> Inputs:
    return replace(inputs, batch={**inputs.batch, inputs.main: tokens, HIDDEN: hidden}, mask=HIDDEN)


def _only_taken(inputs: Inputs, model: Loaded) -> Inputs:
    """The inputs, if the model or the probe has a use for every array of them."""
    known = _arguments(model) | {"attention_mask", inputs.mask} | inputs.named
    unknown = [name for name in inputs.batch if name not in known]
    if unknown:
        raise ValueError(
            f"inputs: {type(model.module).__name__} has no use for {', '.join(unknown)} (it takes "
            f"{', '.join(sorted(_arguments(model)))}; --mask may name a bool array, --rows any)"
        )
    return inputs


def _arguments(model: Loaded) -> set[str]:
    """The arguments of the model's forward by name, and what stands for the stream of our own."""
    parameters = inspect.signature(model.module.forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named | ({model.floats} if model.kind == "rgfast" and model.floats else set())


def _load(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"inputs must be an .npy or .npz file, got {path}")
    try:
        with path.open("rb") as opened:
            start = opened.read(2)
            opened.seek(0)
            found: dict[str, Any] | None = None
            if start == b"PK":
                with np.load(opened, allow_pickle=False) as file:
                    found = {name: file[name] for name in file.files}
            elif start == b"\x93N":
                found = {"": np.load(path, mmap_mode="r", allow_pickle=False)}
    except MemoryError as error:
        raise ValueError(f"inputs must fit into memory, and {path} does not ({error})") from error
    except Exception as error:  # of any type: numpy's parser of headers has its own, zipfile and zlib theirs
        if isinstance(error, OSError) and error.filename is not None:
            raise
        pickled = "pickle" in str(error) or "Python objects" in str(error)
        what = "holds pickled objects, which are not read" if pickled else f"is damaged ({error})"
        raise ValueError(f"inputs must be arrays of numbers, and {path} {what}") from error
    if found is None:
        raise ValueError(f"inputs must be an .npy or .npz file, and {path} is of another kind or empty")
    other = [name for name, value in found.items() if not isinstance(value, np.ndarray)]
    if other:
        raise ValueError(
            f"inputs must be arrays of numbers, and {path} holds files that are none ({', '.join(other)})"
        )
    return found


def _tensor(name: str, value: np.ndarray[Any, Any], limit: int | None) -> Tensor:
    if value.dtype.kind not in "iufb":
        raise ValueError(f"inputs: {name} must be whole numbers, floats or bool, got dtype {value.dtype}")
    if value.ndim == 0:
        raise ValueError(f"inputs: {name} must have one row a sequence, got a single number")
    kinds = {"i": np.int64, "u": np.int64, "b": np.bool_}
    part = value[:limit]
    kind = kinds.get(part.dtype.kind, np.float64 if part.dtype.itemsize > 4 else np.float32)
    return torch.from_numpy(np.array(part, dtype=kind, order="C"))


def _checked(inputs: Inputs, model: Loaded, source: str) -> Inputs:
    """``inputs`` with floats in the model's precision; ValueError for tokens or numbers it cannot take."""
    main = inputs.batch[inputs.main]
    if inputs.main == model.tokens:
        if main.dtype != torch.int64 or main.dim() != 2:
            kind = str(main.dtype).removeprefix("torch.")
            raise ValueError(
                f"inputs: {inputs.main} must be whole numbers [n, T], got {kind} {list(main.shape)}"
            )
        low, high = (int(main.min()), int(main.max())) if main.numel() else (0, 0)
        if model.vocabulary is not None and not 0 <= low <= high < model.vocabulary:
            raise ValueError(
                f"inputs: tokens must lie in 0..{model.vocabulary - 1}, and {source} has {low} to {high}"
            )
    first = next(iter(model.module.parameters()), None)
    batch = {}
    for name, value in inputs.batch.items():
        if value.is_floating_point():
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise ValueError(
                    f"inputs: {name} must be finite, and {source} has {bad} NaN or infinite values"
                )
            value = value if first is None else value.to(first.dtype)
        batch[name] = value
    return replace(inputs, batch=batch)
