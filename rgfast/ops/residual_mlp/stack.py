"""The public residual stack: blocks one after the other, each layer's stream handed out while it is hot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgfast.dispatch import Impl, ImplName, Op, register
from rgfast.ops.residual_mlp.api import OP as BLOCK
from rgfast.ops.residual_mlp.api import Activation, Norm, validated
from rgfast.ops.residual_mlp.call import Call, Consumer, StackCall
from rgfast.ops.residual_mlp.impl import native, triton
from rgfast.validation import check_positive_int

__all__ = ["OP", "Consumer", "PerLayer", "default_tile", "residual_stack"]

Array = Tensor | np.ndarray[Any, Any]
PerLayer = Array | Sequence[Array | None]

# What the stream of one tile may take unless told otherwise: a consumer finds it in cache. A GPU needs more
# rows at once to be busy.
_TILE_BYTES, _TILE_BYTES_ON_A_GPU = 4 << 20, 128 << 20
_TILE_ROWS = 128


def residual_stack(
    x: Array,
    w1: PerLayer,
    b1: PerLayer | None,
    w2: PerLayer,
    b2: PerLayer | None,
    *,
    norm: Norm | None = "layer",
    norm_weight: PerLayer | None = None,
    norm_bias: PerLayer | None = None,
    activation: Activation = "gelu",
    residual_scale: float = 1.0,
    eps: float = 1e-5,
    consumer: Consumer | None = None,
    tile: int | None = None,
    impl: ImplName = "auto",
) -> Tensor:
    """The stream after the last of L residual blocks, shaped like ``x``; block l is ``residual_mlp``.

    Without gradients rows pass all layers a tile at a time where that pays, and no layer's output is stored
    as a whole. ``consumer`` is how to see them all the same.

    Args:
        x: the residual stream, ``[n, ..., D]``, or ``[D]`` without a consumer.
        w1: L times ``[H_l, D]``; b1: L times ``[H_l]`` (or None), or None. A sequence, or a tensor with a
            leading dimension of L; so are all parameters here.
        w2: L times ``[D, H_l]``; b2: L times ``[D]`` (or None), or None.
        norm_weight, norm_bias: L times ``[D]`` (or None), or None.
        norm, activation, residual_scale, eps: as in :func:`rgfast.residual_mlp`, the same for all blocks.
        consumer: called as ``consumer(first, states)`` for every tile in order: ``states`` is
            ``[L + 1, r, ..., D]``, the input and the output of every layer for the entries ``first`` to
            ``first + r - 1`` of ``x``, without gradients. Its memory is used again for the next tile: copy
            what is to be kept. What it raises is passed on.
        tile: entries of ``x`` (along n) that a consumer sees at once; by default about 4 MiB of them (on a
            GPU 128 MiB) and at least 128 rows.
        impl: which implementation runs; a named one never falls back. ``"reference"`` takes the blocks one by
            one; with ``"auto"`` it is taken where a graph is traced or a gradient wanted, and each block is
            then routed by itself.

    Precision, dtypes and devices are those of :func:`rgfast.residual_mlp` applied L times; the stream is
    rounded to ``x``'s dtype after every block. For fp32 without gradients the bits are those of the blocks
    too, with a consumer and without, as far as these run on our own products (``impl="native"``).

    Raises:
        TypeError: an argument is of the wrong kind (see :func:`rgfast.residual_mlp`), ``consumer`` cannot be
            called, or ``tile`` is no whole number.
        ValueError: the parameters are not as many as ``w1``, ``w1`` holds none, ``x`` has fewer than two
            dimensions with a consumer, ``tile`` is below 1, or what :func:`rgfast.residual_mlp` refuses.
        ImplUnavailable: the named ``impl`` cannot run this input; the message says why.

    >>> import rgfast, torch
    >>> x, w1, w2 = torch.randn(100, 8), torch.randn(3, 32, 8), torch.zeros(3, 8, 32)
    >>> norms = torch.zeros(4)
    >>> def add(first, states):
    ...     norms.add_(states.square().sum((1, 2)))
    >>> bool((rgfast.residual_stack(x, w1, None, w2, None, consumer=add) == x).all())
    True
    >>> bool((norms == norms[0]).all())
    True
    """
    given = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "norm_weight": norm_weight, "norm_bias": norm_bias}
    layers = _layers(x, given, (norm, activation, residual_scale, eps, "features"))
    stream = layers[0].x
    if consumer is not None:
        if not callable(consumer):
            raise TypeError(f"consumer must be callable or None, got {type(consumer).__name__}")
        if stream.dim() < 2:
            raise ValueError(
                f"x must have at least 2 dimensions with a consumer, got shape {tuple(stream.shape)}"
            )
    if tile is not None:
        check_positive_int(tile, "tile")
    elif consumer is not None:
        tile = default_tile(stream, len(layers))
    y: Tensor = OP(impl, StackCall(layers, consumer, tile or 1))
    return y


def default_tile(x: Tensor, depth: int) -> int:
    """How many entries of ``x`` a consumer sees at once unless told otherwise."""
    rows = max(1, x[:1].numel() // x.size(-1))
    entry = (depth + 1) * max(1, x[:1].numel()) * x.element_size()
    most = _TILE_BYTES if x.device.type == "cpu" else _TILE_BYTES_ON_A_GPU
    return max(1, -(-_TILE_ROWS // rows), most // entry)


def _layers(x: Any, given: dict[str, Any], options: tuple[Any, ...]) -> tuple[Call, ...]:
    """What every block is called with; the ``x`` of all is that of the first."""
    depth = len(_each(given["w1"], "w1", None))
    if depth == 0:
        raise ValueError("w1 must hold at least one layer, got none")
    each = {name: _each(value, name, depth) for name, value in given.items()}
    found = []
    for layer, (up, up_bias, down, down_bias, weight, bias) in enumerate(zip(*each.values(), strict=True)):
        block = validated((x, up, up_bias, down, down_bias, weight, bias, *options), f"[{layer}]")
        found.append(block)
        x = block.x
    return tuple(found)


def _each(value: Any, name: str, depth: int | None) -> list[Any]:
    if value is None and depth is not None and not name.startswith("w"):
        return [None] * depth
    if isinstance(value, (Tensor, np.ndarray)):
        if value.ndim < 1:
            raise ValueError(f"{name} must have a leading dimension of layers, got shape ()")
        items = list(value.unbind(0) if isinstance(value, Tensor) else value)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        items = list(value)
    else:
        raise TypeError(
            f"{name} must be a tensor with a leading dimension of layers or a sequence, "
            f"got {type(value).__name__}"
        )
    if depth is not None and len(items) != depth:
        raise ValueError(f"{name} must hold {depth} layers like w1, got {len(items)}")
    return items


def _one_by_one(call: StackCall, impl: str) -> Tensor:
    """Each block by itself."""
    layers, consumer, tile = call

    def run(x: Tensor) -> list[Tensor]:
        stream = [x]
        for block in layers:
            stream.append(BLOCK(impl, block._replace(x=stream[-1])))
            if consumer is None:
                del stream[0]
        return stream

    x = layers[0].x
    if consumer is None:
        return run(x)[-1]
    parts = []
    for first in range(0, x.size(0), tile):
        stream = run(x[first : first + tile])
        consumer(first, torch.stack([t.detach() for t in stream]))
        parts.append(stream[-1])
    return torch.cat(parts) if parts else x.clone()


OP = Op(
    "residual_stack",
    [
        native.STACK,
        triton.STACK,
        Impl(
            "blocks",
            lambda call: _one_by_one(call, "auto"),
            cost=lambda call: sum(BLOCK.cost(block) for block in call.layers),
            route=True,
        ),
        Impl(
            "reference",
            lambda call: _one_by_one(call, "reference"),
            cost=lambda call: sum(BLOCK.impls["reference"].cost(block) for block in call.layers),
            by_name_only=lambda call: "each block is routed by itself",
        ),
    ],
)
register(OP, residual_stack)
