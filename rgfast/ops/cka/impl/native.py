"""CKA and drift through the compiled kernels: which route, which precision, how many positions at a time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from rgfast.dispatch import HandOff, Impl
from rgfast.ops.cka.call import Call
from rgfast.ops.cka.checks import check_call
from rgfast.runtime import native

__all__ = ["CKA", "run"]

# Below this, 1 − CKA of fp64 products has lost three of the digits that ½‖K̂_l − K̂_{l+1}‖² still has.
_TINY_DRIFT = 1e-8

# Panels of the positions in one call; more would only leave the caches.
_WORK_BYTES = 48 << 20
# So small that fp64 products cost nothing.
_TRIVIAL_FLOPS = 1e7
# HSIC(K, K) below this fraction of (tr K)²/n is rounding, not variance.
_NO_VARIANCE = 1e-13
# U-centring cancels: fp32 products do not do where less than this is left of ‖K‖². In feature space the
# diagonal that it takes off is a part of what was summed in fp32.
_CANCELS = {"samples": 0.05, "features": 0.5}
# Groups of samples begin with a tile of their own, of so many.
_GROUP_UNIT = 64
# fp32 products err by 1e-9 to 2e-7 in a CKA: a drift below this is read again with fp64 products.
_SMALL_DRIFT = 1e-3


@dataclass(frozen=True)
class _Wanted:
    """The pairs that a task needs, (i, i) of every layer first, and where each goes in its result."""

    pairs: list[tuple[int, int]]
    sides: tuple[Tensor, Tensor]  # [pairs]
    where: Tensor | None  # [L, L']
    cost_of_samples: float  # products for n samples: n² times this
    cost_of_features: float  # n times this


@lru_cache(maxsize=64)
def _wanted(task: str, first: tuple[int, ...], second: tuple[int, ...] | None) -> _Wanted:
    widths = first + (second or ())
    count, near = len(first), range(len(first))
    pairs = [(i, i) for i in range(len(widths))]
    where = None
    if task == "drift":
        pairs += [(i, i + 1) for i in near[:-1]]
    elif second is not None:
        pairs += [(i, count + j) for i in near for j in range(len(second))]
        where = torch.arange(len(widths), len(pairs), dtype=torch.int64, device="cpu").reshape(count, -1)
    else:
        pairs += [(i, j) for i in near for j in near[i + 1 :]]
        place = {pair: p for p, pair in enumerate(pairs)}
        where = torch.tensor(
            [[place[min(i, j), max(i, j)] for j in near] for i in near], dtype=torch.int64, device="cpu"
        )
    left, right = (
        torch.tensor([pair[side] for pair in pairs], dtype=torch.int64, device="cpu") for side in (0, 1)
    )
    features = sum(float(widths[i]) * widths[j] * (1 if i == j else 2) for i, j in pairs)
    return _Wanted(pairs, (left, right), where, sum(widths) + 2.0 * len(pairs), features)


def _can_run(call: Call) -> str | None:
    if call.task not in ("cka", "matrix", "drift", "alignment"):
        return f"only CKA and drift of linear kernels have compiled kernels, not {call.task!r}"
    return "a gradient is wanted" if call.recorded() else None


def run(call: Call) -> Tensor:
    """What the task of that name returns.

    Raises ValueError for NaN or Inf, and hands fp64 data whose products leave the range to another
    implementation, as well as drifts that 1 − CKA of fp64 products has no digits for.
    """
    options = dict(call.options)
    precision = options.get("precision")
    if call.task == "alignment":
        found = _alignment(call.sides[0], **options)
    else:
        found = _task(call.task, call.sides, **options)
    if found is None:
        check_call(call)
        raise HandOff("its products leave the range of fp64", lambda others: others(call))
    if call.task == "drift" and precision != "single" and bool((found < _TINY_DRIFT).any()):
        reason = f"a drift is below {_TINY_DRIFT}, where 1 - CKA has lost digits"
        raise HandOff(reason, lambda others: _refined(found, call, others))
    return found


def _refined(drift: Tensor, call: Call, others: Callable[[Call], Tensor]) -> Tensor:
    for step, both in enumerate(pairwise(call.first)):
        tiny = drift[..., step] < _TINY_DRIFT
        if bool(tiny.any()):
            part = call._replace(first=tuple(x[tiny] for x in both))
            drift[..., step][tiny] = others(part)[..., 0]
    return drift


def _task(
    task: str,
    sides: tuple[tuple[Tensor, ...], ...],
    *,
    debiased: bool,
    sample_limit: int = 4096,
    precision: str | None = None,
) -> Tensor | None:
    """None where NaN, Inf or an overflow was met."""
    xs, ys = sides[0], sides[1] if len(sides) > 1 else ()
    lead = xs[0].shape[:-2]
    positions = math.prod(lead)
    flat = [x.detach().reshape(positions, *x.shape[-2:]) for x in (*xs, *ys)]
    widths = tuple(x.shape[-1] for x in flat)
    wanted = _wanted(task, widths[: len(xs)], widths[len(xs) :] if ys else None)
    values = _cosines(flat, wanted, debiased, sample_limit, precision)
    if values is None:
        return None
    if wanted.where is None:
        drift = 1.0 - values[:, len(flat) :]
        if precision is None and flat[0].dtype != torch.float64:
            drift = _read_again(flat, drift, debiased)
        drift = drift if debiased else drift.clamp(min=0.0)
        return drift.reshape(*lead, len(flat) - 1)
    matrix = values[:, wanted.where].reshape(*lead, *wanted.where.shape)
    return matrix[..., 0, 0] if task == "cka" else matrix


def _alignment(layers: Sequence[Tensor], adjacent: bool, groups: int) -> Tensor | None:
    """Debiased and biased CKA ``[V, 2, P, L, L]`` of ``layers[l][P, n, d]`` from the same products, or None.

    Positions with close neighbours have their neighbours read again with fp64 products. V is 1, or with
    ``groups`` 1 + groups: of all samples, then without samples g, g + groups, ... for every g.
    """
    flat = [x.detach() for x in layers]
    if groups == 1:
        found = _aligned(flat, adjacent, 1)
        return None if found is None else found[None]
    shared = _aligned(flat, adjacent, groups) if _worth_sharing(flat, adjacent, groups) else None
    if shared is not None:
        return shared
    group = torch.arange(flat[0].shape[1], dtype=torch.int64, device="cpu") % groups
    parts = [_aligned(flat, adjacent, 1)]
    parts += [_aligned([x[:, group != g] for x in flat], adjacent, 1) for g in range(groups)]
    return None if any(part is None for part in parts) else torch.stack([p for p in parts if p is not None])


def _costs(n: int, wanted: _Wanted, sample_limit: int, groups: int = 1) -> tuple[float, float]:
    """Products over samples, and over features, of n samples and of all variants without a group."""
    slots = n if groups == 1 else groups * -(-n // groups // _GROUP_UNIT) * _GROUP_UNIT
    by_samples = slots * slots * wanted.cost_of_samples if n <= sample_limit else math.inf
    # Every group's products are squared once more.
    return by_samples, (n + 2 * (groups if groups > 1 else 0)) * wanted.cost_of_features


def _worth_sharing(layers: list[Tensor], adjacent: bool, groups: int) -> bool:
    """Whether products for all variants at once are fewer than those of one after the other."""
    wanted = _wanted("drift" if adjacent else "matrix", tuple(x.shape[2] for x in layers), None)
    n = layers[0].shape[1]
    alone = sum(min(_costs(k, wanted, 4096)) for k in (n, *[n - n // groups] * groups))
    return min(_costs(n, wanted, 4096, groups)) < alone


def _aligned(flat: list[Tensor], adjacent: bool, groups: int) -> Tensor | None:
    """``[2, P, L, L]``, or ``[1 + groups, 2, P, L, L]``; None, too, where shared products lose digits."""
    widths = tuple(x.shape[2] for x in flat)
    near, wanted = _wanted("drift", widths, None), _wanted("drift" if adjacent else "matrix", widths, None)
    found = _inner_products(flat, wanted, 4096, None, guarded=True, groups=groups)
    if found is None:
        return None
    out = torch.full(
        (2, *found.trace.shape[:-1], len(flat), len(flat)), torch.nan, dtype=torch.float64, device="cpu"
    )

    def put(found: _Products, wanted: _Wanted, at: Tensor | slice) -> None:
        left, right = wanted.sides
        for matrix, inner in zip(out, (found.u_centered, found.centered), strict=True):
            values = matrix[at]
            values[..., left, right] = values[..., right, left] = _ratio(inner, found, wanted)
            matrix[at] = values

    put(found, wanted, slice(None))
    if flat[0].dtype != torch.float64:
        drift = 1.0 - out[1].diagonal(1, -2, -1)
        close = (drift < _SMALL_DRIFT).reshape(len(drift), -1).any(1).nonzero()[:, 0]
        if len(close):
            some = flat if len(close) == len(flat[0]) else [x[close] for x in flat]
            again = _inner_products(some, near, 4096, "double", guarded=False, groups=groups)
            if again is not None:
                put(again, near, close)
    return out if groups == 1 else out.permute(2, 0, 1, 3, 4)


def _read_again(layers: list[Tensor], drift: Tensor, debiased: bool) -> Tensor:
    for step in range(drift.shape[1]):
        small = (drift[:, step] < _SMALL_DRIFT).nonzero()[:, 0]
        if len(small):
            both = [layers[i] if len(small) == len(drift) else layers[i][small] for i in (step, step + 1)]
            wanted = _wanted("drift", (both[0].shape[2], both[1].shape[2]), None)
            again = _cosines(both, wanted, debiased, 4096, "double")
            if again is not None:
                drift[small, step] = 1.0 - again[:, 2]
    return drift


def _cosines(
    layers: list[Tensor], wanted: _Wanted, debiased: bool, sample_limit: int, precision: str | None
) -> Tensor | None:
    """CKA ``[P, pairs]``, NaN beside layers without variance."""
    found = _inner_products(layers, wanted, sample_limit, precision, guarded=debiased)
    if found is None:
        return None
    return _ratio(found.u_centered if debiased else found.centered, found, wanted)


def _ratio(inner: Tensor, found: _Products, wanted: _Wanted) -> Tensor:
    own = inner[..., : found.trace.shape[-1]]
    own = torch.where(own > _NO_VARIANCE * found.trace.square() / found.samples, own, torch.nan)
    left, right = wanted.sides
    # The root of the product, not the product of roots: identical layers then have a CKA of exactly 1.
    return inner / (own[..., left] * own[..., right]).sqrt()


def _inner_products(
    layers: list[Tensor],
    wanted: _Wanted,
    sample_limit: int,
    precision: str | None,
    *,
    guarded: bool,
    groups: int = 1,
) -> _Products | None:
    """Inner products of centred and of U-centred kernels.

    ``guarded`` computes again in fp64 what U-centring of fp32 products blurs. None for ``groups`` where they
    are blurred or far from centred.
    """
    by_samples, by_features = _costs(layers[0].shape[1], wanted, sample_limit, groups)
    features = by_features < by_samples
    if precision is None:
        trivial = len(layers[0]) * min(by_samples, by_features) < _TRIVIAL_FLOPS
        precision = "double" if trivial or any(x.dtype == torch.float64 for x in layers) else "single"
    else:
        # fp64 data may leave the range of fp32, and asks for more anyhow.
        precision = "double" if any(x.dtype == torch.float64 for x in layers) else precision
    found = _products(layers, wanted.pairs, features, precision == "single", groups)
    if found is None or (groups > 1 and not found.centred_enough([x.shape[2] for x in layers])):
        return None
    if not guarded or precision == "double":
        return found
    own = found.u_centered[..., : len(layers)]
    floor = _CANCELS["features" if features else "samples"] * found.centered[..., : len(layers)]
    blurred = (own > _NO_VARIANCE * found.trace.square() / found.samples) & (own < floor)
    again = blurred.reshape(len(blurred), -1).any(1).nonzero()[:, 0]
    if len(again):
        if groups > 1:
            return None
        exact = _products([x[again] for x in layers], wanted.pairs, features, False)
        if exact is None:
            return None
        for held, better in zip(found.parts(), exact.parts(), strict=True):
            held[again] = better
    return found


@dataclass(frozen=True)
class _Products:
    """Of P positions: inner products ``[P, pairs]``, traces and sums of kernels ``[P, L]`` of ``samples``.

    With groups all are ``[P, V, ...]``, and ``samples`` is ``[V, 1]``.
    """

    centered: Tensor
    u_centered: Tensor
    trace: Tensor
    grand: Tensor
    samples: Tensor | int

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.centered, self.u_centered, self.trace, self.grand

    def centred_enough(self, widths: Sequence[int]) -> bool:
        """Whether rows without a group are about as well centred and scaled as all are."""
        level = self.trace / (self.samples * torch.tensor(widths, dtype=torch.int64, device="cpu"))
        fair = (self.grand <= 0.1 * self.trace * self.samples) & (level > 1e-6) & (level < 1e6)
        return bool((fair | (self.trace == 0)).all())


def _products(
    layers: list[Tensor], pairs: list[tuple[int, int]], features: bool, single: bool, groups: int = 1
) -> _Products | None:
    module, threads = native.load(), native.threads()
    positions, n = layers[0].shape[:2]
    lead = (positions,) if groups == 1 else (positions, 1 + groups)
    samples: Tensor | int = n
    if groups > 1:
        left = [n, *(n - len(range(g, n, groups)) for g in range(groups))]
        samples = torch.tensor(left, dtype=torch.int64, device="cpu")[:, None]
    shapes = [(*lead, len(pairs))] * 2 + [(*lead, len(layers))] * 2
    out = [torch.empty(shape, dtype=torch.float64, device="cpu") for shape in shapes]
    bytes_each = n * sum(x.shape[2] for x in layers) * (4 if single else 8)
    step = max(1, _WORK_BYTES // bytes_each)
    for start in range(0, positions, step):
        part = slice(start, min(start + step, positions))
        held = [_readable(x if step >= positions else x[part]) for x in layers]
        tensors = [native.tensor(x) for x in held]
        options = (tensors, pairs, features, single, groups, threads)
        space = _workspace(module.cka_workspace(*options))
        flat = (*(x[part].view(-1) for x in out), space)
        if module.cka_products(*options, *(native.tensor(x) for x in flat)):
            return None
    centered, u_centered, trace, grand = out
    return _Products(centered, u_centered, trace, grand, samples)


_kept = threading.local()
_KEPT_BYTES = 64 << 20


def _workspace(needed: int) -> Tensor:
    # Kept from call to call, one for each Python thread: touching fresh pages costs a small problem as much
    # as its arithmetic.
    held = getattr(_kept, "space", None)
    if isinstance(held, Tensor) and 8 * held.numel() >= needed:
        return held
    space = torch.empty(needed // 8, dtype=torch.float64, device="cpu")
    if needed <= _KEPT_BYTES:
        _kept.space = space
    return space


def _readable(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.float64):
        x = x.to(torch.float32)
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


# A call, and products a second of one thread of an AVX-512 core, packing included (README, "Against others").
_CALL, _PRODUCTS = 8e-5, 60e9

CKA = Impl(
    "native",
    run,
    _can_run,
    lambda call: _CALL + call.multiplications() / _PRODUCTS,
    ("cpu",),
    native.unavailable_reason,
    isa=native.active_isa,
)
