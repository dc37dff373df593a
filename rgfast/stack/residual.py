"""The stack of blocks, and its stream handed out by tiles."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _EVERYWHERE
from torch.utils.hooks import RemovableHandle

from rgfast.ops.residual_mlp import residual_stack
from rgfast.ops.residual_mlp.api import ACTIVATIONS, NORMS, Activation
from rgfast.ops.residual_mlp.stack import Consumer, default_tile
from rgfast.stack.blocks import (
    EPS,
    Block,
    FeatureMLP,
    FlatMLP,
    Initialization,
    Norm,
    Normalization,
    PositionMLP,
)
from rgfast.validation import check_choice, check_positive_int

__all__ = ["INITIALIZATIONS", "MIXINGS", "Mixing", "ResidualStack"]

Mixing = Literal["mixer", "flat", "none"]

MIXINGS = ("mixer", "flat", "none")
INITIALIZATIONS = ("normal", "torch")


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
            Read by ``initialization="normal"`` alone.
        generator: draws the weights, in fp32 on its device; the CPU's global generator if None.
        dtype, device: of the parameters; PyTorch's defaults if None, as for ``torch.nn.Linear``.
        initialization: ``"normal"`` (W1 with standard deviation 1/sqrt(fan_in), W2 as ``w2_scale`` says, no
            biases) or ``"torch"``, as ``torch.nn.Linear`` starts: every weight and bias uniform within
            ±1/sqrt(fan_in).

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
        initialization: Initialization = "normal",
    ) -> None:
        super().__init__()
        check_positive_int(width, "width")
        check_positive_int(depth, "depth")
        hidden = 4 * width if hidden is None else hidden
        check_positive_int(hidden, "hidden")
        check_choice(mixing, "mixing", MIXINGS)
        check_choice(norm, "norm", NORMS)
        check_choice(activation, "activation", ACTIVATIONS)
        check_choice(initialization, "initialization", INITIALIZATIONS)
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

        rest = (norm, activation, w2_scale, generator, dtype, device, initialization)

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
        as take about 4 MiB, on a GPU 128 MiB, at least 128 rows): ``states`` is ``[depth + 1, r, ..., D]``,
        the input and the output of every block for the samples ``first`` to ``first + r - 1``, without
        gradients. It is overwritten by the next tile, so that no layer's output is ever stored for more
        samples than these.

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
            if type(block.mlp.norm) is not Normalization:
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
