"""CKA, drift and HSIC by the package's own kernels on a GPU, csrc/cuda/cka*, by features or by samples.

Neither centered rows nor cross moments nor whole kernels of samples are stored.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgfast.dispatch import HandOff, Impl
from rgfast.ops.cka import batched
from rgfast.ops.cka.answers import ANSWERS
from rgfast.ops.cka.call import Call, Side
from rgfast.ops.cka.checks import check_call
from rgfast.ops.cka.launches import (
    SUMS,
    TILE_BYTES,
    Batches,
    Layers,
    chunk,
    finish,
    numbers_of_sums,
    sample_tiles,
)
from rgfast.ops.cka.sums import TASKS, Wanted, wanted_by
from rgfast.ops.device import LAUNCH, STREAM, by_itself
from rgfast.ops.moments.tiles import CLOCK, DTYPES, EXACT, MOST_BLOCKS, MOST_SIDE, card, clocks, count
from rgfast.runtime import cuda, measured
from rgfast.runtime.known_answers import register, unproven
from rgfast.runtime.waiting import numbers

__all__ = ["CKA"]

# Rows of features are summed in one go, whose error grows with their number.
_MOST_ROWS = 1 << 20
# Norms and sums in work at a time.
_WORK_BYTES = 128 << 20
# A multiprocessor's clocks for 16 entries of a layer's Gram tile that are compared with all other layers, and
# for a tile that is compared with its neighbor; seconds between launches. Computed, not measured.
_COMPARED, _KEPT, _TURN = 6.0, 600.0, 4e-6
# For so many positions the way is chosen.
_POSITIONS = 16
# Of csrc/cuda/cka_math.cuh: what is wrong with sums if a trace is not finite.
_NOT_FINITE = 1


def run(call: Call) -> Tensor:
    """What the task of that name returns. Raises ValueError for NaN or Inf, for which it is read, once.

    Positions whose products leave the range of fp64, and those with drifts that 1 - CKA has no digits for,
    are computed again by torch's batched products, on the device; HSIC and batches of samples that leave the
    range are handed to another implementation.
    """
    _not_captured(call.device, lambda others: others(call))
    groups = _groups(call)
    if groups > 1 and not _worth_sharing(call):
        flat = call._replace(first=tuple(_flat(call)))
        return torch.cat([run(_without(flat, g)) for g in range(-1, groups)])
    with torch.no_grad(), by_itself(call.device.type):
        value, faults = _computed(call)
        found = faults.cpu()
        if bool(found.any()):
            _mend(call, value, found)
    if call.task == "alignment":
        return value
    lead = call.sides[0][0].shape[:-2]
    return value.reshape(lead if call.task == "cka" else (*lead, *value.shape[1:]))


def _not_captured(device: torch.device, finish: Callable[[Callable[[Call], Tensor]], Any]) -> None:
    if cuda.capturing(device):
        raise HandOff("its table and its result go through the host, which a CUDA graph does not do", finish)


def _groups(call: Call) -> int:
    return int(dict(call.options).get("groups", 1))


def _without(call: Call, group: int) -> Call:
    """The call without samples group, group + groups, ..., or of all if there is no such group."""
    layers, groups = call.sides[0], _groups(call)
    if group >= 0:
        layers = tuple(batched.without(x, group, groups) for x in layers)
    options = {**dict(call.options), "groups": 1}
    return call._replace(first=layers, options=tuple(options.items()))


class _Size(NamedTuple):
    """Batches of samples that have the same size: how many there are, and their samples if not all."""

    n: int
    number: int
    weight: float
    at: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """``x[P, n, d]`` with batches as positions of their own."""
        if self.at is not None:
            x = x.index_select(1, self.at)
        return x.reshape(-1, self.n, x.shape[2])


def _sizes(call: Call) -> list[_Size]:
    """Whose inner products are added up at a position: of all samples, or of batches of one or two sizes."""
    n, options = call.sides[0][0].shape[-2], dict(call.options)
    bounds = options.get("bounds", (0, n))
    batches = list(pairwise(bounds))
    counts = Counter(stop - start for start, stop in batches)
    found = []
    for size, many in sorted(counts.items()):
        weight = 1.0
        if call.task in ("minibatch", "hsic_sums") or (call.task == "hsic" and options["debiased"]):
            weight /= size * (size - 3)
        elif call.task == "hsic":
            weight /= max(size - 1, 1) ** 2
        at = None
        if len(counts) > 1:
            starts = numbers([start for start, stop in batches if stop - start == size], call.device)
            at = (starts[:, None] + torch.arange(size, dtype=torch.int64, device=call.device)).flatten()
        found.append(_Size(size, many, weight, at))
    return found


def _computed(call: Call) -> tuple[Tensor, Tensor]:
    """The result of flattened positions, and what is wrong with each and its variants ``[P, V]``."""
    wanted, groups, sizes = wanted_by(call), _groups(call), _sizes(call)
    flat = _flat(call)
    positions, variants, samples = len(flat[0]), _variants(groups), _takes_samples(call)
    shape = _shape(call.task, wanted, positions, variants)
    value = torch.empty(shape, dtype=torch.float64, device=call.device)
    faults = torch.empty((positions, variants), dtype=torch.int64, device=call.device)
    step = max(1, _WORK_BYTES // sum(_bytes(flat, wanted, size, groups, samples=samples) for size in sizes))
    for start in range(0, positions, step):
        some = [x[start : start + step] for x in flat] if step < positions else flat
        batches = []
        for size in sizes:
            layers = Layers([size.of(x) for x in some], wanted, samples=samples, groups=groups)
            batches.append(Batches(layers, layers.sums(), size.number, size.weight))
        finish(call.task, batches, start, value, faults, debiased=dict(call.options).get("debiased", True))
    return value, faults


def _flat(call: Call) -> list[Tensor]:
    n = call.sides[0][0].shape[-2]
    positions = math.prod(call.sides[0][0].shape[:-2])
    return [x.detach().reshape(positions, n, x.shape[-1]) for side in call.sides for x in side]


def _variants(groups: int) -> int:
    return 1 + (groups if groups > 1 else 0)


def _shape(task: str, wanted: Wanted, positions: int, variants: int) -> tuple[int, ...]:
    layers, first = wanted.layers, wanted.first
    if task == "alignment":
        return variants, 2, positions, layers, layers
    if task == "drift":
        return positions, layers - 1
    if task == "hsic":
        return (positions,)
    if task == "hsic_sums":
        return positions, layers, layers + 2
    return positions, first, layers - first if first < layers else layers


def _bytes(flat: list[Tensor], wanted: Wanted, size: _Size, groups: int, *, samples: bool) -> int:
    """In work for a position, but for Gram tiles that are compared with all others."""
    layers, width, variants = wanted.layers, sum(x.shape[2] for x in flat), _variants(groups)
    rows = layers * size.n + 2 * width + (variants - 1) * (layers * size.n + width)
    if samples:
        parts = numbers_of_sums(layers, size.n, groups, near=wanted.near)
    else:
        parts = variants * _tiles(flat, wanted)
    copied = size.n * width * flat[0].element_size() if size.number > 1 or size.at is not None else 0
    return size.number * (8 * (rows + parts + variants * SUMS * wanted.pairs) + copied)


def _tiles(flat: list[Tensor], wanted: Wanted) -> int:
    """Of cross moments of all pairs, at a position."""
    return sum(count(flat[i].shape[-1], flat[j].shape[-1], same=i == j) for i, j in wanted.each())


def _mend(call: Call, value: Tensor, faults: Tensor) -> None:
    """Compute again, in place, what kernels have no digits for. Raises ValueError for NaN or Inf."""
    if bool((faults & _NOT_FINITE).any()):
        check_call(call)
    along = 2 if call.task == "alignment" else 0
    whole = faults[:, 0] != 0
    if bool(whole.any()):
        if call.task not in TASKS:
            reason = "its products leave the range of fp64, or an offset leaves too few digits"
            raise HandOff(reason, lambda others: others(call))
        at, part = _some(call, whole)
        shape = *value.shape[:along], len(at), *value.shape[along + 1 :]
        value.index_copy_(along, at, batched.run(part).reshape(shape))
    for variant in range(1, faults.shape[1]):
        moved = (faults[:, variant] != 0) & ~whole
        if bool(moved.any()):
            at, part = _some(call, moved)
            value[variant].index_copy_(1, at, run(_without(part, variant - 1))[0])


def _some(call: Call, chosen: Tensor) -> tuple[Tensor, Call]:
    """Where positions are ``chosen``, and the call of these alone."""
    at = numbers(chosen.nonzero()[:, 0].tolist(), call.device)
    flat = iter([x.index_select(0, at) for x in _flat(call)])

    def side(given: Side) -> Side:
        return next(flat) if isinstance(given, Tensor) else tuple(next(flat) for _ in given)

    second = call.second
    return at, call._replace(first=side(call.first), second=None if second is None else side(second))


def _can_run(call: Call) -> str | None:
    if call.task not in (*TASKS, "hsic", "minibatch", "hsic_sums"):
        return f"only measures of linear kernels have kernels for a GPU, not {call.task!r}"
    if call.recorded():
        return "a gradient is wanted"
    layers = [x for side in call.sides for x in side]
    dtypes = {x.dtype for x in layers}
    if len(dtypes) > 1:
        have = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"layers must have one dtype, and these have {have}"
    n, wanted = layers[0].shape[-2], wanted_by(call)
    if n > _MOST_ROWS:
        return f"it sums up to {_MOST_ROWS} samples, not {n}"
    if max(wanted.pairs, _variants(_groups(call))) > MOST_SIDE or _tiles(layers, wanted) > MOST_BLOCKS:
        return (
            f"a grid has {MOST_BLOCKS} blocks of a position at most, and {MOST_SIDE} of pairs of layers or "
            "of groups"
        )
    return cuda.device_refusal(call.device)


def _takes_samples(call: Call) -> bool:
    """Whether samples are multiplied: up to the limit, if that takes less time or features are more.

    With more features than samples Σ K_ii M_ii is most of a squared norm, and what is left lacks digits. How
    many positions there are does not decide: a position has the same bits in any call.
    """
    width, (_, n) = max(x.shape[-1] for side in call.sides for x in side), _problem(call)
    if n > dict(call.options).get("sample_limit", 4096):
        return False
    features, samples = _seconds(call, _groups(call), _POSITIONS)
    return width > n or samples < features


def _problem(call: Call) -> tuple[int, int]:
    """Batches of samples at a position, which are positions of their own, and samples of the largest."""
    n = call.sides[0][0].shape[-2]
    bounds = dict(call.options).get("bounds", (0, n))
    return len(bounds) - 1, max(stop - start for start, stop in pairwise(bounds))


def _kernels(call: Call) -> list[str]:
    name, groups = DTYPES[call.sides[0][0].dtype], _groups(call) > 1
    kinds = [f"centers_{name}", f"norms_{name}", "sums", "finish"]
    if groups:
        kinds += [f"group_sums_{name}", f"group_products_{name}"]
        kinds.append(f"left_out_{name}")
    # Of groups some may be left out one by one, each in the way that its samples ask for.
    if groups or not _takes_samples(call):
        kinds.append(f"squares_{name}")
    if groups or _takes_samples(call):
        kinds += [f"near_{name}"] if wanted_by(call).near else [f"grams_{name}", "inner"]
        kinds.append("collect")
    return [f"rgfast_cka_{kind}" for kind in kinds]


def _seconds(call: Call, groups: int, positions: int) -> tuple[float, float]:
    """About how long products of features and of samples take at so many positions, in turns on the
    multiprocessors."""
    layers = [x for side in call.sides for x in side]
    wanted, (batches, n) = wanted_by(call), _problem(call)
    positions *= batches
    architecture, multiprocessors, ratio = card(call.device)
    each = EXACT.get(architecture, 512.0 * ratio)  # 128 fp32 products a clock
    # Those of each group are multiplied once more.
    rows = n + (groups * -(-n // groups // 16) * 16 if groups > 1 else 0)
    features = clocks(positions * _tiles(layers, wanted), rows, multiprocessors, each)
    tiles = positions * sample_tiles(n, groups)
    samples = sum(clocks(tiles, x.shape[-1], multiprocessors, each) for x in layers)
    if wanted.near:
        return features / CLOCK, (samples + _KEPT * tiles * len(layers) / multiprocessors) / CLOCK
    samples += _COMPARED * TILE_BYTES // 128 * tiles * len(layers) / multiprocessors
    some, side = chunk(len(layers), n, groups)
    turns = -(-positions // some) * -(-sample_tiles(n, groups) // side)
    return features / CLOCK, samples / CLOCK + _TURN * turns * (1 if groups == 1 else 2)


def _worth_sharing(call: Call) -> bool:
    """Whether all variants without a group at once take less time than one by one, and not much memory."""
    groups, samples, flat = _groups(call), _takes_samples(call), _flat(call)
    (size,) = _sizes(call)
    if _bytes(flat, wanted_by(call), size, groups, samples=samples) > _WORK_BYTES:
        return False
    alone = _seconds(call, 1, _POSITIONS)[samples] + 20 * LAUNCH
    return _seconds(call, groups, _POSITIONS)[samples] < (1 + groups) * alone


def _cost(call: Call) -> float:
    """By launches, passes over rows, and products."""
    layers, groups = [x for side in call.sides for x in side], _groups(call)
    passes = (2 if groups == 1 else 4) * sum(x.numel() * x.element_size() for x in layers) / STREAM
    products = _seconds(call, groups, math.prod(layers[0].shape[:-2]))
    return max(20 * LAUNCH, passes + products[_takes_samples(call)])


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

register(*ANSWERS)
