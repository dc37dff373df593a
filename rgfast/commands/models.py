"""The model that ``rgfast probe`` is given: a folder on disk, never the name of something to download."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rgfast.stack import MaskedTokenModel

__all__ = ["Loaded", "load_model", "load_tokenizer"]

_TOKENIZERS = ("tokenizer*", "vocab*", "spiece*", "sentencepiece*", "*.model", "*.tiktoken")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode: ``tokens`` and ``floats`` name the argument of its forward that takes whole
    numbers and floats (None: it takes none), ``vocabulary`` counts its tokens."""

    folder: Path
    kind: str
    module: nn.Module
    tokens: str | None
    floats: str | None
    vocabulary: int | None
    mask_token: int | None
    longest: int | None

    def for_inputs(self, names: Iterable[str]) -> Loaded:
        """This model, or its encoder alone if ``names`` has nothing for the decoder of an encoder-decoder."""
        find_encoder: Any = getattr(self.module, "get_encoder", None)
        decodes = find_encoder is not None and hasattr(self.module, "decoder")
        if not decodes or any(name.startswith("decoder_") for name in names):
            return self
        return replace(self, module=find_encoder())


def load_model(folder: str | Path, *, allow_pickle: bool = False, seed: int = 0) -> Loaded:
    """The model in ``folder``: what ``MaskedTokenModel.save`` left, or a Hugging Face folder.

    Nothing is downloaded and no code of the folder runs. ``allow_pickle`` also takes pickled weights.
    ``seed`` draws what a folder's weights lack and no probed layer needs (the pooler of an encoder).

    Raises ValueError, naming MODEL, for whatever cannot be loaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "none (nothing is downloaded)"
        raise ValueError(f"MODEL must be a folder on disk, and {folder} is {what}")
    if (folder / "model.json").is_file():
        return _own(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"MODEL must be a folder with model.json (what MaskedTokenModel.save writes) or a Hugging Face "
            f"folder with config.json, and {folder} has neither"
        )
    config = _read(folder / "config.json")
    if str(config.get("format", "")).startswith("rgfast."):
        raise ValueError(
            f"MODEL must be a model, and {folder} holds a result of rgfast, which keeps no weights"
        )
    if "model_type" not in config:
        raise ValueError(f"MODEL: {folder / 'config.json'} is not of Hugging Face (it has no model_type)")
    return _hugging_face(folder, allow_pickle, seed)


def load_tokenizer(model: Loaded) -> Any:
    """The tokenizer in the model's folder, padding on the right. Raises ValueError where there is none."""
    if model.kind == "rgfast":
        raise ValueError(
            f"text needs a tokenizer, and a MaskedTokenModel as in {model.folder} has none; use --inputs"
        )
    # transformers makes an empty tokenizer, to which every word is unknown, where there are no files of one.
    if not any(path for pattern in _TOKENIZERS for path in model.folder.glob(pattern)):
        raise ValueError(f"text needs the folder's tokenizer, and {model.folder} has none")
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(
            model.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # as many types as there are kinds of tokenizers
        told = f"{model.folder} has none that loads ({_first_line(error)})"
        raise ValueError(f"text needs the folder's tokenizer, and {told}") from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"MODEL: {path} is not JSON ({_first_line(error)})") from error
    if not isinstance(found, dict):
        raise ValueError(f"MODEL: {path} must hold a JSON object, got {type(found).__name__}")
    return found


def _own(folder: Path) -> Loaded:
    _read(folder / "model.json")
    try:
        model = MaskedTokenModel.load(folder)
    except (ValueError, TypeError, AttributeError, OSError, SafetensorError) as error:
        raise ValueError(f"MODEL: {folder} cannot be loaded: {_first_line(error)}") from error
    return Loaded(
        folder, "rgfast", model.eval(), "tokens", "x", model.states + 1, model.mask_token, model.length
    )


def _hugging_face(folder: Path, allow_pickle: bool, seed: int) -> Loaded:
    safe = any(folder.glob("*.safetensors"))
    if not safe and not allow_pickle:
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        found = f"only pickled ones ({', '.join(pickled)}), which can run any code: --allow-pickle takes them"
        raise ValueError(
            f"MODEL must have weights in safetensors, and {folder} has {found if pickled else 'none'}"
        )
    library = _transformers()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model, info = library.AutoModel.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=safe,
                output_loading_info=True,
            )
    except Exception as error:  # each kind of model fails in its own way
        raise ValueError(f"MODEL: transformers cannot load {folder}: {_first_line(error)}") from error
    unused: tuple[str, ...] = ("pooler.",)
    if _encoder_alone(model, info["missing_keys"]):
        model, unused = model.get_encoder(), (*unused, "decoder.")
    lacking = sorted(name for name in info["missing_keys"] if not name.startswith(unused))
    if lacking or info["mismatched_keys"]:
        names = ", ".join([*lacking, *(str(key) for key in info["mismatched_keys"])][:3])
        raise ValueError(f"MODEL: the weights in {folder} do not fit its config.json (wanting {names})")
    model.config.use_cache = False
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    main = str(model.main_input_name)
    takes_tokens = main == "input_ids"
    return Loaded(
        folder,
        "transformers",
        model.eval(),
        "input_ids" if takes_tokens else None,
        "inputs_embeds" if takes_tokens else main,
        getattr(text, "vocab_size", None) if takes_tokens else None,
        None,
        getattr(text, "max_position_embeddings", None),
    )


def _encoder_alone(model: Any, missing: Iterable[str]) -> bool:
    """Whether a folder's weights lack a whole decoder, as T5EncoderModel's do (embeddings are tied)."""
    own = {name for name in model.state_dict() if name.startswith("decoder.") and "embed" not in name}
    return bool(own) and own <= set(missing)


def _transformers() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(
            f"MODEL: a Hugging Face folder needs transformers (pip install transformers): {error}"
        ) from error
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
