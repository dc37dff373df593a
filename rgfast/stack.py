"""The MLP residual stack, its mixing across positions, and the masked-token model around it.

Every block adds to a residual stream ``[B, T, D]``:

    x <- x + MLP_T(norm(x))     across positions, T -> hT -> T      (``mixing="mixer"`` only)
    x <- x + MLP_D(norm(x))     across features,  D -> hD -> D

with ``MLP(z) = W2 act(W1 z + b1) + b2``. With ``mixing="flat"`` the second one acts on all T·D numbers of a
sequence at once; a model with ``mixing="window"`` concatenates the embeddings of the ±w neighbours at its
input, and its stack is then position-wise. W1 ~ N(0, 1/fan_in); W2 ~ N(0, w2_scale²/fan_in), and the default
``w2_scale=0`` starts the stack as the identity.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.modules import module as _EVERYWHERE
from torch.utils.hooks import RemovableHandle

from rgfast.files import write_bytes, write_text
from rgfast.ops.residual_mlp import residual_mlp, residual_stack
from rgfast.ops.residual_mlp.api import ACTIVATIONS as ACTIVATIONS
from rgfast.ops.residual_mlp.api import NORMS as NORMS
from rgfast.ops.residual_mlp.api import Across
from rgfast.ops.residual_mlp.api import Activation as Activation
from rgfast.ops.residual_mlp.stack import Consumer, default_tile
from rgfast.validation import check_choice, check_positive_int

__all__ = ["MaskedTokenModel", "ResidualStack"]

Mixing = Literal["mixer", "flat", "none"]
ModelMixing = Literal["mixer", "flat", "window", "none"]
Norm = Literal["layer", "rms"] | None

MIXINGS = ("mixer", "flat", "none")
MODEL_MIXINGS = ("mixer", "flat", "window", "none")
EPS = 1e-5


def _normal(
    shape: tuple[int, ...],
    std: float,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> nn.Parameter:
    # Drawn in fp32 on the generator's device, so that a seed means one network in every dtype, everywhere.
    source = torch.device("cpu") if generator is None else generator.device
    drawn = torch.randn(shape, dtype=torch.float32, device=source, generator=generator).mul_(std)
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device).copy_(drawn))


class _Normalisation(nn.Module):
    """LayerNorm, RMSNorm or nothing over the last dimension, with learned weight (and bias for LayerNorm)."""

    def __init__(
        self, width: int, norm: Norm, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.norm = norm
        one, zero = (torch.full((width,), v, dtype=dtype, device=device) for v in (1.0, 0.0))
        self.weight = nn.Parameter(one) if norm else None
        self.bias = nn.Parameter(zero) if norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, EPS)
        if self.norm == "rms":
            return F.rms_norm(x, x.shape[-1:], self.weight, EPS)
        return x


class _MLP(nn.Module):
    """Parameters of one two-layer MLP ``size -> hidden -> size`` and of the norm before it."""

    def __init__(
        self,
        size: int,
        hidden: int,
        normalised: int,
        norm: Norm,
        activation: Activation,
        w2_scale: float,
        generator: torch.Generator | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.norm = _Normalisation(normalised, norm, dtype, device)
        self.w1 = _normal((hidden, size), 1 / math.sqrt(size), generator, dtype, device)
        self.b1 = nn.Parameter(torch.zeros(hidden, dtype=dtype, device=device))
        # Drawn even when scaled to zero, so that every w2_scale sees the same later draws.
        self.w2 = _normal((size, hidden), w2_scale / math.sqrt(hidden), generator, dtype, device)
        self.b2 = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))


class FeatureMLP(_MLP):
    """x + MLP_D(norm(x)) on the last dimension: the op ``residual_mlp``."""

    across: Across = "features"

    def forward(self, x: Tensor) -> Tensor:
        return residual_mlp(
            x,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            norm=self.norm.norm,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            activation=self.activation,
            eps=EPS,
            across=self.across,
        )


class PositionMLP(FeatureMLP):
    """x + MLP_T(norm(x)) across positions: the norm is over features, the MLP over T."""

    across: Across = "positions"


class FlatMLP(FeatureMLP):
    """x + MLP(norm(x)) on all positions and features of a sequence as one vector of T·D."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).reshape(x.shape)


class Block(nn.Module):
    """One layer of the stack: mixing across positions (where there is any), then the feature MLP."""

    def __init__(self, mix: PositionMLP | None, mlp: FeatureMLP) -> None:
        super().__init__()
        self.mix = mix
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        if self.mix is not None:
            x = self.mix(x)
        return self.mlp(x)  # type: ignore[no-any-return]


class ResidualStack(nn.Module):
    """A pure MLP residual stack: maps a residual stream to one of the same shape.

    Args:
        width: D, features of the stream.
        depth: L, number of blocks (at least 1).
        hidden: hidden units of the feature MLP, default ``4 * width``. The mixing MLP has the same ratio.
        mixing: ``"mixer"`` (an MLP across positions before each feature MLP), ``"flat"`` (one MLP on all T·D
            numbers of a sequence, its hidden units times T) or ``"none"`` (every position for itself).
        length: T, positions of the stream; needed by ``"mixer"`` and ``"flat"``.
        norm: ``"layer"``, ``"rms"`` or None, before each MLP (pre-norm), eps 1e-5.
        activation: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"relu"``, ``"silu"`` or ``"tanh"``.
        w2_scale: standard deviation of W2 in units of 1/sqrt(fan_in); 0 starts the stack as the identity.
        generator: draws the weights, in fp32 on its device; the CPU's global generator if None.
        dtype, device: of the parameters; PyTorch's defaults if None, as for ``torch.nn.Linear``.

    Shapes: input and output ``[..., T, D]``, or ``[..., D]`` for ``"none"``; computes in the dtype
    of its parameters. ``stack.blocks[l]`` is layer l; its output is the stream after layer l + 1.

    Raises:
        ValueError: for a width, depth, hidden or length below 1, an unknown option, a mixing that needs
            ``length`` without it, or an input of another shape.

    >>> import torch
    >>> stack = ResidualStack(width=8, depth=2, mixing="none")
    >>> x = torch.randn(3, 5, 8)
    >>> bool((stack(x) == x).all())       # W2 starts at zero
    True
    """

    def __init__(
        self,
        width: int,
        depth: int,
        hidden: int | None = None,
        mixing: Mixing = "mixer",
        length: int | None = None,
        norm: Norm = "layer",
        activation: Activation = "gelu",
        w2_scale: float = 0.0,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_positive_int(width, "width")
        check_positive_int(depth, "depth")
        hidden = 4 * width if hidden is None else hidden
        check_positive_int(hidden, "hidden")
        check_choice(mixing, "mixing", MIXINGS)
        check_choice(norm, "norm", NORMS)
        check_choice(activation, "activation", ACTIVATIONS)
        if length is not None:
            check_positive_int(length, "length")
        if mixing != "none" and length is None:
            raise ValueError(
                f"length must be given with mixing={mixing!r} (the number of positions), got None"
            )
        if not math.isfinite(w2_scale) or w2_scale < 0:
            raise ValueError(f"w2_scale must be a finite number >= 0, got {w2_scale}")
        self.width, self.depth, self.hidden, self.length = width, depth, hidden, length
        self.mixing, self.norm, self.activation, self.w2_scale = mixing, norm, activation, w2_scale

        rest = (norm, activation, w2_scale, generator, dtype, device)

        def block() -> Block:
            mix: PositionMLP | None = None
            if mixing == "flat" and length is not None:
                flat = length * width
                mlp = FlatMLP(flat, length * hidden, flat, *rest)
                return Block(None, mlp)
            if mixing == "mixer" and length is not None:
                mixing_hidden = max(1, round(hidden * length / width))
                mix = PositionMLP(length, mixing_hidden, width, *rest)
            return Block(mix, FeatureMLP(width, hidden, width, *rest))

        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self._consumers: OrderedDict[int, tuple[Consumer, int | None]] = OrderedDict()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 1 or x.shape[-1] != self.width:
            raise ValueError(f"x must end in width {self.width}, got shape {tuple(x.shape)}")
        if self.mixing != "none" and (x.dim() < 2 or x.shape[-2] != self.length):
            raise ValueError(f"x must be [..., {self.length}, {self.width}], got shape {tuple(x.shape)}")
        if self._consumers:
            return self._watched(x)
        if not torch.is_grad_enabled() and self._is_plain():
            return self._in_one_call(x)
        for block in self.blocks:
            x = block(x)
        return x

    @property
    def stream_layers(self) -> tuple[str, ...]:
        """The layers of the residual stream by name: the input of the first block, every block's output."""
        return ("blocks.0:input", *(f"blocks.{k}" for k in range(self.depth)))

    @property
    def positions_are_independent(self) -> bool:
        """Whether every position goes its own way through the stack."""
        return self.mixing == "none"

    def stream_tiles(self, consumer: Consumer, tile: int | None = None) -> RemovableHandle:
        """A handle whose ``remove()`` ends it: until then every forward hands its stream to ``consumer``.

        ``consumer(first, states)`` is called for every tile of ``tile`` samples in order (by default as many
        as take about 4 MiB, at least 128 rows): ``states`` is ``[depth + 1, r, ..., D]``, the input and the
        output of every block for the samples ``first`` to ``first + r - 1``, without gradients. It is
        overwritten by the next tile, so that no layer's output is ever stored for more samples than these.

        Raises RuntimeError where a consumer is there already, ValueError for a ``tile`` below 1.

        >>> import torch
        >>> stack, seen = ResidualStack(width=8, depth=2, mixing="none"), []
        >>> def consumer(first, states):
        ...     seen.append((first, tuple(states.shape)))
        >>> handle = stack.stream_tiles(consumer, tile=40)
        >>> _ = stack(torch.randn(100, 5, 8))
        >>> handle.remove()
        >>> seen
        [(0, (3, 40, 5, 8)), (40, (3, 40, 5, 8)), (80, (3, 20, 5, 8))]
        """
        if self._consumers:
            raise RuntimeError("this stack is watched already; remove() the handle of the other consumer")
        if tile is not None:
            check_positive_int(tile, "tile")
        handle = RemovableHandle(self._consumers)
        self._consumers[handle.id] = (consumer, tile)
        return handle

    watch = stream_tiles

    def _watched(self, x: Tensor) -> Tensor:
        consumer, tile = next(iter(self._consumers.values()))
        single = x.dim() == (1 if self.mixing == "none" else 2)
        if single:
            x = x[None]
        shape = x.shape[1:]
        if self._is_plain():

            def given(first: int, states: Tensor) -> None:
                consumer(first, states.view(*states.shape[:2], *shape))

            y = self._in_one_call(x, given, tile)
        else:
            tile = tile or default_tile(x, self.depth)
            parts = []
            for first in range(0, len(x), tile):
                stream = [x[first : first + tile]]
                for block in self.blocks:
                    stream.append(block(stream[-1]))
                consumer(first, torch.stack([t.detach() for t in stream]))
                parts.append(stream[-1])
            y = torch.cat(parts) if parts else x.clone()
        return y[0] if single else y

    def _is_plain(self) -> bool:
        """Whether no block was replaced or hooked since it was made: then the op may run them all."""
        if self.mixing == "mixer" or torch.compiler.is_compiling():
            return False
        if _EVERYWHERE._global_forward_hooks or _EVERYWHERE._global_forward_pre_hooks:
            return False
        kind = FlatMLP if self.mixing == "flat" else FeatureMLP
        for block in self.blocks:
            if type(block) is not Block or type(block.mlp) is not kind:
                return False
            if type(block.mlp.norm) is not _Normalisation:
                return False
            for module in (block, block.mlp, block.mlp.norm):
                if module._forward_hooks or module._forward_pre_hooks:
                    return False
        return True

    def _in_one_call(self, x: Tensor, consumer: Consumer | None = None, tile: int | None = None) -> Tensor:
        mlps: list[Any] = [block.mlp for block in self.blocks]
        y = residual_stack(
            x.flatten(-2) if self.mixing == "flat" else x,
            [mlp.w1 for mlp in mlps],
            [mlp.b1 for mlp in mlps],
            [mlp.w2 for mlp in mlps],
            [mlp.b2 for mlp in mlps],
            norm=self.norm,
            norm_weight=[mlp.norm.weight for mlp in mlps],
            norm_bias=[mlp.norm.bias for mlp in mlps],
            activation=self.activation,
            eps=EPS,
            consumer=consumer,
            tile=tile,
        )
        return y.view(x.shape)

    def extra_repr(self) -> str:
        return (
            f"width={self.width}, depth={self.depth}, hidden={self.hidden}, mixing={self.mixing!r}, "
            f"length={self.length}, norm={self.norm!r}, activation={self.activation!r}"
        )


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
        }
        check_choice(mixing, "mixing", MODEL_MIXINGS)
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
        )
        self.states, self.length = states, length
        self.token_embedding = _normal((states + 1, width), token_std, generator, dtype, device)
        self.position_embedding = _normal((length, width), position_std, generator, dtype, device)
        self.final_norm = _Normalisation(stream, (norm or "layer") if final_norm else None, dtype, device)
        self.head = nn.Linear(stream, states, dtype=dtype, device="meta")  # draws nothing
        self.head.weight = _normal((states, stream), 1 / math.sqrt(stream), generator, dtype, device)
        self.head.bias = nn.Parameter(torch.zeros(states, dtype=dtype, device=device))

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
        return self.head(self.final_norm(self.stack(self.embed(tokens))))  # type: ignore[no-any-return]

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
