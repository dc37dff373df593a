"""The masked-token model around a stack: embeddings, the stack, a linear head, and its two files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rgfast.files import write_bytes, write_text
from rgfast.ops.residual_mlp.api import Activation
from rgfast.stack.blocks import Initialization, Norm, Normalization, normal_parameter, uniform_parameter
from rgfast.stack.residual import Mixing, ResidualStack
from rgfast.validation import check_choice, check_positive_int

__all__ = ["MODEL_MIXINGS", "POSITIONS", "MaskedTokenModel", "ModelMixing", "Positions"]

ModelMixing = Literal["mixer", "flat", "window", "none"]

Positions = Literal["learned", "none"]

MODEL_MIXINGS = ("mixer", "flat", "window", "none")
POSITIONS = ("learned", "none")


class MaskedTokenModel(nn.Module):
    """Token and position embeddings, a :class:`ResidualStack`, and a linear head over the vocabulary.

    Args:
        states: V, size of the vocabulary; token V is MASK.
        length: T, positions.
        width, depth, hidden, norm, activation, w2_scale: as in :class:`ResidualStack`.
        mixing: as there, or ``"window"``: the embeddings of positions t - w … t + w side by side (zeros past
            the ends) are the stream of width (2w + 1) · ``width`` at t, and the stack is position-wise.
        window: w, for ``mixing="window"`` alone.
        token_std, position_std: standard deviations of the embeddings at the start.
        final_norm: whether the stack's output is normalised before the head.
        generator, dtype, device: as in :class:`ResidualStack`.
        initialization: as there. With ``"torch"`` token embedding and head start as ``torch.nn.Linear``
            does, the former as such a layer on one-hot tokens (fan_in V + 1).
        positions: ``"learned"``, or ``"none"``: nothing tells positions apart, and ``position_embedding`` is
            one row, the bias of the linear layer on one-hot tokens (zero at the start with ``"normal"``).

    ``forward(tokens)`` maps int64 ``[B, T]`` in ``0..V`` to logits ``[B, T, V]``; ``embed(tokens)`` is the
    stream that enters the stack. ``save(folder)`` and ``load(folder)`` use safetensors and JSON.

    Raises:
        ValueError: for an unknown or out-of-range option, or tokens of another shape.

    >>> model = MaskedTokenModel(states=4, length=3, width=8, depth=2)
    >>> model(torch.tensor([[0, 4, 2]])).shape
    torch.Size([1, 3, 4])
    """

    def __init__(
        self,
        states: int,
        length: int,
        width: int,
        depth: int,
        hidden: int | None = None,
        mixing: ModelMixing = "mixer",
        norm: Norm = "layer",
        activation: Activation = "gelu",
        w2_scale: float = 0.0,
        window: int = 2,
        token_std: float = 1.0,
        position_std: float = 0.3,
        final_norm: bool = True,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        initialization: Initialization = "normal",
        positions: Positions = "learned",
    ) -> None:
        super().__init__()
        check_positive_int(states, "states")
        check_positive_int(length, "length")
        self.config: dict[str, Any] = {
            "states": states,
            "length": length,
            "width": width,
            "depth": depth,
            "hidden": hidden,
            "mixing": mixing,
            "norm": norm,
            "activation": activation,
            "w2_scale": w2_scale,
            "window": window,
            "token_std": token_std,
            "position_std": position_std,
            "final_norm": final_norm,
            "initialization": initialization,
            "positions": positions,
        }
        check_choice(mixing, "mixing", MODEL_MIXINGS)
        check_choice(positions, "positions", POSITIONS)
        check_positive_int(window, "window")
        self.window = window if mixing == "window" else 0
        stream = (2 * self.window + 1) * width
        if hidden is not None:
            hidden = (2 * self.window + 1) * hidden
        stacked: Mixing = "none" if mixing == "window" else mixing
        self.stack = ResidualStack(
            stream,
            depth,
            hidden,
            stacked,
            length,
            norm,
            activation,
            w2_scale,
            generator,
            dtype=dtype,
            device=device,
            initialization=initialization,
        )
        self.states, self.length = states, length
        rest = (generator, dtype, device)
        rows, std = (length, position_std) if positions == "learned" else (1, 0.0)
        if initialization == "torch":
            self.token_embedding = uniform_parameter((states + 1, width), states + 1, *rest)
        else:
            self.token_embedding = normal_parameter((states + 1, width), token_std, *rest)
        if initialization == "torch" and positions == "none":
            self.position_embedding = uniform_parameter((1, width), states + 1, *rest)
        else:
            self.position_embedding = normal_parameter((rows, width), std, *rest)
        self.final_norm = Normalization(stream, (norm or "layer") if final_norm else None, dtype, device)
        self.head = nn.Linear(stream, states, dtype=dtype, device="meta")  # draws nothing
        if initialization == "torch":
            self.head.weight = uniform_parameter((states, stream), stream, *rest)
            self.head.bias = uniform_parameter((states,), stream, *rest)
        else:
            self.head.weight = normal_parameter((states, stream), 1 / math.sqrt(stream), *rest)
            self.head.bias = nn.Parameter(torch.zeros(states, dtype=dtype, device=device))

    def reset_parameters(self) -> None:
        """Draw embeddings and head as at the start, with torch's global generator; the stack is its own."""
        shared = self.config["positions"] == "none"
        with torch.no_grad():
            self.position_embedding.normal_(std=0.0 if shared else self.config["position_std"])
            if self.config["initialization"] == "torch":
                bound = 1 / math.sqrt(self.states + 1)
                self.token_embedding.uniform_(-bound, bound)
                if shared:
                    self.position_embedding.uniform_(-bound, bound)
                bound = 1 / math.sqrt(self.head.in_features)
                self.head.weight.uniform_(-bound, bound)
                self.head.bias.uniform_(-bound, bound)
                return
            self.token_embedding.normal_(std=self.config["token_std"])
            self.head.weight.normal_(std=1 / math.sqrt(self.head.in_features))
            self.head.bias.zero_()

    @property
    def mask_token(self) -> int:
        """The token that stands for a hidden one: V."""
        return self.states

    def embed(self, tokens: Tensor) -> Tensor:
        """The residual stream before the first block, ``[B, T, D]``."""
        if tokens.dim() != 2 or tokens.shape[1] != self.length:
            raise ValueError(f"tokens must be [B, {self.length}], got shape {tuple(tokens.shape)}")
        x = F.embedding(tokens, self.token_embedding) + self.position_embedding
        if self.window == 0:
            return x
        padded = F.pad(x, (0, 0, self.window, self.window))
        return padded.unfold(1, 2 * self.window + 1, 1).transpose(-1, -2).flatten(-2)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.final_norm(self.stack(self.embed(tokens))))
        return logits

    def logits_at(self, tokens: Tensor, where: Tensor | tuple[Tensor, ...]) -> Tensor:
        """The logits of the positions ``where``, ``[k, V]``: bool ``[B, T]``, row by row, or their rows and
        columns, ``[k]`` each.

        Without mixing across positions (``"none"``, ``"window"``) only these are computed.
        """
        if not self.stack.positions_are_independent:
            mixed: Tensor = self(tokens)[where]
            return mixed
        logits: Tensor = self.head(self.final_norm(self.stack(self.embed(tokens)[where])))
        return logits

    def save(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``model.json`` into ``folder`` (made where missing).

        Raises OSError, naming the file, if one cannot be written; the old one is then as it was.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        write_bytes(folder / "model.safetensors", save(state))
        text = json.dumps({"format": "rgfast.MaskedTokenModel/1", **self.config}, indent=2) + "\n"
        write_text(folder / "model.json", text)

    @classmethod
    def load(cls, folder: str | Path) -> MaskedTokenModel:
        """The model that :meth:`save` wrote into ``folder``, on the CPU in the dtype it was saved in.

        Raises ValueError if a file is damaged, or ``model.json`` is of another format or does not fit the
        weights.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / 'model.json'} is damaged: {error}") from error
        form = config.pop("format", None) if isinstance(config, dict) else None
        if form != "rgfast.MaskedTokenModel/1":
            raise ValueError(
                f"{folder / 'model.json'}: format must be 'rgfast.MaskedTokenModel/1', got {form!r}"
            )
        model = cls(**config, dtype=torch.float32, device="cpu")
        try:
            weights = load_file(folder / "model.safetensors")
        except SafetensorError as error:
            raise ValueError(f"{folder / 'model.safetensors'} is damaged: {error}") from error
        state = {name: value.clone() for name, value in weights.items()}
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{folder / 'model.safetensors'} does not fit model.json: {error}") from error
        return model
