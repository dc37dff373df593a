"""CKA and drift by the package's own kernels on a GPU, csrc/cuda/cka.cu, by features or by samples.

Neither centered rows nor cross moments nor whole kernels of samples are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rgfast.dispatch import HandOff, Impl
from rgfast.ops.cka.call import Call
from rgfast.ops.cka.checks import check_call
from rgfast.ops.cka.launches import (
    SUMS,
    TILE_BYTES,
    by_features,
    by_samples,
    chunk,
    parts_of_samples,
    sample_tiles,
)
from rgfast.ops.cka.sums import TASKS, Sums, Wanted, mirrored, wanted_by
from rgfast.ops.device import LAUNCH, STREAM, by_itself
from rgfast.ops.moments.tiles import CLOCK, DTYPES, EXACT, MOST_BLOCKS, MOST_SIDE, card, clocks, count
from rgfast.runtime import cuda, measured
from rgfast.runtime.known_answers import KnownAnswer, register, unproven
from rgfast.runtime.waiting import numbers

__all__ = ["CKA"]

# Rows of features are summed in one go, whose error grows with their number.
_MOST_ROWS = 1 << 20
# Norms and sums in work at a time.
_WORK_BYTES = 128 << 20
# A multiprocessor's clocks for 16 entries of a layer's Gram tile that are compared with all other layers, and
# for a tile that is compared with its neighbor; seconds between launches. Computed, not measured.
_COMPARED, _KEPT, _TURN = 6.0, 600.0, 4e-6
# Traces whose squares and products stay within fp64, and the squared mean over the variance up to which the
# rounding of a mean changes a CKA by 1e-13 at most (README, "Kernels for a GPU").
_LEAST, _MOST, _MOST_OFFSET = 1e-130, 1e150, 8e16
# Below this, 1 - CKA of fp64 products has lost digits; U-centering that leaves little of a kernel raises it.
_TINY_DRIFT = 1e-8


def run(call: Call) -> Tensor:
    """What the task of that name returns. Raises ValueError for NaN or Inf, for which it is read, once."""
    _not_captured(call.device, lambda others: others(call))
    with torch.no_grad(), by_itself(call.device.type):
        value, state = _computed(call)
    finite, in_range, sharp = state.tolist()
    if not finite:
        check_call(call)
    for fine, reason in (
        (finite and in_range, "its products leave the range of fp64, or an offset leaves too few digits"),
        (sharp, f"a drift is below {_TINY_DRIFT}, where 1 - CKA has lost digits"),
    ):
        if not fine:
            raise HandOff(reason, lambda others: others(call))
    return value


def _not_captured(device: torch.device, finish: Callable[[Callable[[Call], Tensor]], Any]) -> None:
    if cuda.capturing(device):
        raise HandOff("its table and its result go through the host, which a CUDA graph does not do", finish)


def _computed(call: Call) -> tuple[Tensor, Tensor]:
    """The result, and whether data were finite, products within their range and drifts not too small."""
    wanted, options = wanted_by(call), dict(call.options)
    *lead, n, _ = call.sides[0][0].shape
    flat = [x.detach().reshape(math.prod(lead), n, x.shape[-1]) for side in call.sides for x in side]
    values, states = [], [torch.ones(3, dtype=torch.bool, device=call.device)]
    samples = _takes_samples(call)
    step = max(1, _WORK_BYTES // _bytes(flat, wanted, samples=samples))
    for start in range(0, max(1, len(flat[0])), step):
        sums, in_range = _sums([x[start : start + step] for x in flat], wanted, samples=samples)
        states.append(torch.stack([sums.finite.all(), in_range, torch.ones_like(in_range)]))
        if call.task == "alignment":
            values.append(torch.stack([sums.ratio(True), sums.ratio(False)]))
        elif call.task == "drift":
            drift, sharp = _drift(sums, options["debiased"])
            values.append(drift)
            states[-1][2] = sharp
        else:
            values.append(sums.ratio(options["debiased"]))
    value = torch.cat(values, 1 if call.task == "alignment" else 0)
    state = torch.stack(states).all(0)
    if call.task == "alignment":
        return value[None], state
    if wanted.first < wanted.layers:
        value = value[:, : wanted.first, wanted.first :]
    value = value.reshape(*lead, *value.shape[1:])
    return (value[..., 0, 0] if call.task == "cka" else value), state


def _bytes(flat: list[Tensor], wanted: Wanted, *, samples: bool) -> int:
    """In work for a position, but for Gram tiles that are compared with all others."""
    layers, n = wanted.layers, flat[0].shape[1]
    rows = layers * n + 2 * sum(x.shape[2] for x in flat)
    parts = parts_of_samples(layers, n, near=wanted.near) if samples else _tiles(flat, wanted)
    return 8 * (rows + parts + (SUMS + 8) * layers**2)


def _tiles(flat: list[Tensor], wanted: Wanted) -> int:
    """Of cross moments of all pairs, at a position."""
    return sum(count(flat[i].shape[-1], flat[j].shape[-1], same=i == j) for i, j in wanted.each())


def _sums(flat: list[Tensor], wanted: Wanted, *, samples: bool) -> tuple[Sums, Tensor]:
    """Sums of layers in units of about their size, and whether those were within the range."""
    n, pairs, device = flat[0].shape[1], wanted.each(), flat[0].device
    found = by_samples(flat, wanted) if samples else by_features(flat, pairs)
    at = numbers([i * wanted.layers + j for i, j in pairs], device)
    own = numbers([k for k, (i, j) in enumerate(pairs) if i == j], device)
    trace, size = found[:, own, 2], found[:, own, 3]
    exponent = torch.frexp(trace).exponent.long().clamp(-1000, 1000)
    unit = ((1023 - exponent) << 52).view(torch.float64)
    both = torch.full((len(found), 2, wanted.layers**2), torch.nan, dtype=torch.float64, device=device)
    both[:, :, at] = found[:, :, :2].mT
    both = both.view(len(found), 2, wanted.layers, wanted.layers)
    off, same = mirrored(both * (unit[:, None, :, None] * unit[:, None, None])).unbind(1)
    within = (trace > _LEAST) & (trace < _MOST) & (n * size <= _MOST_OFFSET * trace)
    return Sums(off, same, trace * unit, n), (within | (trace == 0)).all()


def _drift(sums: Sums, debiased: bool) -> tuple[Tensor, Tensor]:
    """1 - CKA of neighbors ``[P, L-1]``, and whether all have their digits."""
    drift = (1.0 - sums.ratio(debiased).diagonal(1, 1, 2)).clamp(min=0.0)
    whole = sums.inner(False).diagonal(0, 1, 2) / sums.own(sums.inner(debiased))
    least = _TINY_DRIFT * torch.maximum(whole[:, 1:], whole[:, :-1])
    return drift, ~(drift < least).any()


def _can_run(call: Call) -> str | None:
    if call.task not in TASKS:
        return f"only CKA and drift of linear kernels have kernels for a GPU, not {call.task!r}"
    if call.recorded():
        return "a gradient is wanted"
    options = dict(call.options)
    if options.get("groups", 1) > 1:
        return "samples are not left out by groups"
    layers = [x for side in call.sides for x in side]
    dtypes = {x.dtype for x in layers}
    if len(dtypes) > 1:
        have = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"layers must have one dtype, and these have {have}"
    n, wanted = layers[0].shape[-2], wanted_by(call)
    if n > _MOST_ROWS:
        return f"it sums up to {_MOST_ROWS} samples, not {n}"
    if wanted.pairs > MOST_SIDE or _tiles(layers, wanted) > MOST_BLOCKS:
        return f"a grid has {MOST_BLOCKS} blocks of a position at most, and {MOST_SIDE} of pairs of layers"
    return cuda.device_refusal(call.device)


def _takes_samples(call: Call) -> bool:
    """Whether samples are multiplied: up to the limit, if that takes less time or features are more.

    With more features than samples Σ K_ii M_ii is most of a squared norm, and what is left lacks digits.
    """
    layers = [x for side in call.sides for x in side]
    n, width = layers[0].shape[-2], max(x.shape[-1] for x in layers)
    if n > dict(call.options).get("sample_limit", 4096):
        return False
    features, samples = _seconds(call)
    return width > n or samples < features


def _kernels(call: Call) -> list[str]:
    name = DTYPES[call.sides[0][0].dtype]
    names = [f"rgfast_cka_{kind}" for kind in (f"centers_{name}", f"norms_{name}", "sums")]
    if not _takes_samples(call):
        return [*names, f"rgfast_cka_squares_{name}"]
    if wanted_by(call).near:
        return [*names, f"rgfast_cka_near_{name}", "rgfast_moments_gather"]
    return [*names, f"rgfast_cka_grams_{name}", "rgfast_cka_inner", "rgfast_moments_gather"]


def _seconds(call: Call) -> tuple[float, float]:
    """About how long products of features and of samples take, in turns on the multiprocessors."""
    layers = [x for side in call.sides for x in side]
    *lead, n, _ = layers[0].shape
    wanted, positions = wanted_by(call), math.prod(lead)
    architecture, multiprocessors, ratio = card(call.device)
    each = EXACT.get(architecture, 512.0 * ratio)  # 128 fp32 products a clock
    features = clocks(positions * _tiles(layers, wanted), n, multiprocessors, each)
    tiles = positions * sample_tiles(n)
    samples = sum(clocks(tiles, x.shape[-1], multiprocessors, each) for x in layers)
    if wanted.near:
        return features / CLOCK, (samples + _KEPT * tiles * len(layers) / multiprocessors) / CLOCK
    samples += _COMPARED * TILE_BYTES // 128 * tiles * len(layers) / multiprocessors
    some, side = chunk(len(layers), n)
    turns = -(-positions // some) * -(-sample_tiles(n) // side)
    return features / CLOCK, samples / CLOCK + _TURN * turns


def _cost(call: Call) -> float:
    """By launches, two passes over rows, and products."""
    layers = [x for side in call.sides for x in side]
    passes = 2 * sum(x.numel() * x.element_size() for x in layers) / STREAM
    return max(40 * LAUNCH, passes + _seconds(call)[_takes_samples(call)])


CKA = Impl(
    "cuda",
    run,
    _can_run,
    _cost,
    ("cuda",),
    cuda.missing,
    by_name_only=lambda call: measured.refusal("cka", "cuda", call.device),
    unproven=lambda call: unproven(call.device, *_kernels(call)),
)


def _answer(dtype: torch.dtype, n: int, width: int, near: bool | None) -> Callable[[torch.device], Tensor]:
    """All sums of two layers of small numbers, none rounded: by features if ``near`` is None."""

    def run(device: torch.device) -> Tensor:
        _not_captured(device, lambda _: None)
        rows = torch.arange(n, dtype=torch.float64, device=device)[:, None]
        columns = torch.arange(width, dtype=torch.float64, device=device)
        x = ((7 * rows + 3 * columns + rows * columns) % 5 - 2)[None].to(dtype)
        layers = [x, x[..., width - 7 : width - 2]]
        if near is None:
            return by_features(layers, [(0, 0), (0, 1), (1, 1)])
        return by_samples(layers, Wanted(2, 2, near))

    return run


_BY_FEATURES = (
    *(4245242.66015625 - 461727.53576660156, 461727.53576660156, 3396.1875, 52.181640625),
    *(314297.16796875 - 34194.75769042969, 34194.75769042969, 3396.1875, 52.181640625),
    *(23280.56640625 - 2532.9742431640625, 2532.9742431640625, 251.5625, 4.013671875),
)
_BY_SAMPLES = (
    *(5509385.005540371, 144712.89491128922, 3856.6328125, 16.00286865234375),
    *(1456776.1930799484, 38507.23770618439, 3856.6328125, 16.00286865234375),
    *(388059.1680049896, 10263.250207901001, 1027.890625, 4.0008544921875),
)
for _dtype, _name in DTYPES.items():
    _names = [f"rgfast_cka_{kind}_{_name}" for kind in ("squares", "centers", "norms")]
    if _dtype == torch.float64:
        _names.append("rgfast_cka_sums")
    register(KnownAnswer((*_names,), _answer(_dtype, 32, 67, None), _BY_FEATURES))
    _names = [f"rgfast_cka_grams_{_name}"]
    if _dtype == torch.float64:
        _names.append("rgfast_cka_inner")
    register(KnownAnswer((*_names,), _answer(_dtype, 128, 19, False), _BY_SAMPLES))
    register(KnownAnswer((f"rgfast_cka_near_{_name}",), _answer(_dtype, 128, 19, True), _BY_SAMPLES))
