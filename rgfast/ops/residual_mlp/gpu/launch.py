"""Blocks as their kernels are launched: shapes, padding, packed weights, and the order of the arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgfast.ops.residual_mlp.call import Call
from rgfast.ops.residual_mlp.compiled import as_rows, readable
from rgfast.ops.residual_mlp.gpu.needs import capability, dtype_of
from rgfast.ops.residual_mlp.gpu.table import (
    BACKWARD,
    FORWARD,
    OPTIONS,
    STACK,
    WIDEST,
    WIDEST_STACK,
    Tile,
    form_of,
    group_of,
    padded,
    tile_width,
)
from rgfast.runtime.threads import no_autocast

__all__ = [
    "Ready",
    "Weights",
    "backward",
    "forward",
    "group_at",
    "on",
    "packed",
    "ready",
    "through",
    "tile_for",
]


class Weights(NamedTuple):
    """Both weights of some layers as kernels read them; low parts and scales only if there are any."""

    up: Tensor
    up_low: Tensor | None
    unit1: Tensor | None
    down: Tensor
    down_low: Tensor | None
    unit2: Tensor | None
    hidden: int
    by_unit: bool


def group_at(device: torch.device) -> str:
    """The group of tiles for a device; the interpreter, on the CPU, takes those of an H100."""
    return group_of(capability(device)) if device.type == "cuda" else "h100"


def tile_for(table: dict[Any, dict[int, Tile]], call: Call, products: str) -> Tile:
    return table[group_at(call.x.device), form_of(products)][tile_width(call.w1.size(1))]


@contextlib.contextmanager
def on(device: torch.device) -> Any:
    """Kernels go to ``device``, and torch's operators are the ones that are named."""
    with no_autocast(device.type):
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            yield


def _fits(call: Call, products: str, width: int, hidden: int) -> bool:
    """Whether kernels can read the weights where they lie."""
    plain = form_of(products) == "plain" and call.w1.shape == (hidden, width)
    dtype = dtype_of(products)
    return plain and all(
        w.dtype == dtype and w.is_contiguous() and not w.is_neg() and w.data_ptr() % 16 == 0
        for w in (call.w1, call.w2)
    )


def packed(layers: Sequence[Call], products: str, units: int) -> Weights:
    """The weights of ``layers``, which are of one shape, padded to whole tiles of ``units`` hidden units."""
    first, depth, form = layers[0], len(layers), form_of(products)
    features, width = first.w1.size(1), padded(first.w1.size(1))
    hidden = -(-first.w1.size(0) // units) * units
    if depth == 1 and _fits(first, products, width, hidden):
        return Weights(first.w1, None, None, first.w2, None, None, hidden, False)
    from rgfast.ops.residual_mlp.gpu import forward as kernels

    up, down = (_stacked([getattr(layer, name) for layer in layers]) for name in ("w1", "w2"))
    shape, device = (depth, hidden, width), up.device
    operand = dtype_of(products) if form == "plain" else torch.float16

    def empty() -> Tensor:
        return torch.empty(shape, dtype=operand, device=device)

    def scales() -> Tensor | None:
        return None if form == "plain" else torch.empty(shape[:2], dtype=torch.float32, device=device)

    high, low = (empty(), empty()), (empty(), empty()) if form == "split" else (None, None)
    made = Weights(high[0], low[0], scales(), high[1], low[1], scales(), hidden, True)
    at_once = min(units, 32)
    kernels.pack[(hidden // at_once, depth)](
        up, *up.stride(), down, *down.stride(), *made[:6],
        D=features, H=first.w1.size(0), D_PADDED=width, H_PADDED=hidden,
        UNITS=at_once, PRODUCTS=form, **OPTIONS,
    )  # fmt: skip
    return made


def _operands(weights: Weights, tile: Tile) -> list[Any]:
    """Both parts of both weights: descriptors of a tile of them, if it is copied by those, or pointers."""
    parts = [weights.up, weights.up_low, weights.down, weights.down_low]
    if not tile.tma:
        return parts
    from triton.tools.tensor_descriptor import TensorDescriptor

    up = [tile.units, weights.up.size(-1) // tile.halves]
    down = up if weights.by_unit else up[::-1]
    flat = [None if t is None else t.view(-1, t.size(-1)) for t in parts]
    boxes = zip(flat, (up, up, down, down), strict=True)
    return [None if t is None else TensorDescriptor.from_tensor(t, box) for t, box in boxes]


def _stacked(tensors: list[Tensor]) -> Tensor:
    """Parameters of all layers ``[layers, ...]``: one as it lies, several copied together."""
    tensors = [t.resolve_neg() for t in tensors]
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _vectors(layers: Sequence[Call], name: str) -> Tensor | None:
    """One of the vectors of all layers, or None; a layer that has none where others do gets its neutral."""
    given: list[Tensor | None] = [getattr(layer, name) for layer in layers]
    present = [t for t in given if t is not None]
    if not present:
        return None
    if len(present) < len(given):
        neutral = torch.full_like(present[0], 1.0 if name == "norm_weight" else 0.0)
        present = [neutral if t is None else t for t in given]
    return _stacked(present).contiguous()


class Ready(NamedTuple):
    """Some layers of one shape as the forward kernel takes their parameters, and what it is compiled for."""

    first: Call
    depth: int
    products: str
    tile: Tile
    weights: Weights
    b1: Tensor | None
    b2: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None


def ready(layers: Sequence[Call], products: str) -> Ready:
    """Blocks of one shape on top of each other, made ready for any rows."""
    first, depth = layers[0], len(layers)
    most = WIDEST if depth == 1 else WIDEST_STACK
    if first.w1.size(1) > most:
        kernel = "the fused kernel" if depth == 1 else "several layers in one kernel"
        raise ValueError(f"x must have at most {most} features for {kernel}, got {first.w1.size(1)}")
    tile = tile_for(FORWARD if depth == 1 else STACK, first, products)
    with on(first.x.device):
        weights = packed(layers, products, tile.units)
        vectors = (_vectors(layers, name) for name in ("b1", "b2", "norm_weight", "norm_bias"))
        return Ready(first, depth, products, tile, weights, *vectors)


def forward(layers: Sequence[Call], products: str) -> Tensor:
    """The output of blocks of one shape on top of each other."""
    x = layers[0].x
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        through(ready(layers, products), x, y, every_layer=False)
    return y


def through(given: Ready, x: Tensor, y: Tensor, *, every_layer: bool) -> None:
    """Takes rows through blocks into ``y``, contiguous: like ``x``, or of all layers if ``every_layer``."""
    from rgfast.ops.residual_mlp.gpu import forward as kernels

    first, depth, products, tile, weights, b1, b2, norm_weight, norm_bias = given
    hidden, features = first.w1.shape
    rows, width = x.numel() // features, padded(features)
    up, up_low, down, down_low = _operands(weights, tile)
    with on(x.device):
        source, stride = as_rows(x)
        kernels.block[(-(-rows // tile.rows),)](
            source, stride, y, up, up_low, weights.unit1, b1, down, down_low, weights.unit2, b2,
            norm_weight, norm_bias,
            rows, first.eps, first.residual_scale,
            D=features, H=hidden, HALF=width // tile.halves, HALVES=tile.halves, H_PADDED=weights.hidden,
            LAYERS=depth, EVERY_LAYER=every_layer, W2_BY_UNIT=weights.by_unit,
            NORM=first.norm or "none", ACTIVATION=first.activation, PRODUCTS=form_of(products),
            BM=tile.rows, BH=tile.units, STAGES=tile.stages, TMA=tile.tma, num_warps=tile.warps,
            **OPTIONS,
        )  # fmt: skip


def backward(dy: Tensor, call: Call, products: str, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of the wanted tensors, in the order of ``call.tensors``; nothing is added atomically.

    A kernel forms the gradient of the rows and leaves what the library multiplies for the weights'.
    """
    from rgfast.ops.residual_mlp.gpu import backward as kernels

    x, (hidden, features), dtype = call.x, call.w1.shape, dtype_of(products)
    rows = x.numel() // features
    want = [each and t is not None for each, t in zip(wanted, call.tensors, strict=True)]
    if rows == 0:
        return tuple(
            torch.zeros_like(t, memory_format=torch.contiguous_format) if each and t is not None else None
            for each, t in zip(want, call.tensors, strict=True)
        )
    tile, width = tile_for(BACKWARD, call, products), padded(features)
    programs = -(-rows // tile.rows)

    def empty(needed: bool, *shape: int, dtype: torch.dtype = dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=x.device) if needed else None

    dx = empty(want[0], *x.shape, dtype=x.dtype)
    normed, act = empty(want[1], rows, features), empty(want[3], rows, hidden)
    slopes = empty(want[1] or want[2], rows, hidden)
    sums = empty(want[5] or want[6], programs, 2, features, dtype=torch.float32)
    with on(x.device):
        weights = packed([call], products, tile.units)
        source, stride = as_rows(x)
        dy = readable(dy).view(rows, features)
        b1, norm_weight, norm_bias = (_vectors([call], name) for name in ("b1", "norm_weight", "norm_bias"))
        if any(t is not None for t in (dx, normed, act, slopes, sums)):
            kernels.gradient[(programs,)](
                source, stride, dy, dx, normed, act, slopes, sums,
                weights.up, weights.up_low, weights.unit1, b1,
                weights.down, weights.down_low, weights.unit2, norm_weight, norm_bias,
                rows, call.eps, call.residual_scale,
                D=features, H=hidden, HALF=width // tile.halves, HALVES=tile.halves,
                H_PADDED=weights.hidden, W2_BY_UNIT=weights.by_unit,
                NORM=call.norm or "none", ACTIVATION=call.activation, PRODUCTS=form_of(products),
                BM=tile.rows, BH=tile.units, STAGES=tile.stages, num_warps=tile.warps, **OPTIONS,
            )  # fmt: skip
        found: list[Tensor | None] = [dx] + [None] * 6
        if normed is not None and slopes is not None:
            found[1] = torch.mm(slopes.t(), normed)
        if want[2] and slopes is not None:
            found[2] = slopes.sum(0, dtype=torch.float32)
        if act is not None:
            found[3] = torch.mm(dy.t().to(dtype), act) * call.residual_scale
        if want[4]:
            found[4] = dy.sum(0, dtype=torch.float32) * call.residual_scale
        if sums is not None:
            both = sums.sum(0, dtype=torch.float64)
            found[5], found[6] = (both[0] if want[5] else None), (both[1] if want[6] else None)
    return tuple(
        None if g is None or t is None else g.to(t.dtype) for g, t in zip(found, call.tensors, strict=True)
    )
