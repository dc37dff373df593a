"""What does not depend on the order of the samples once per layer; then every order by torch's routines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgfast.dispatch import Impl
from rgfast.ops.device import by_itself, cache_bytes
from rgfast.ops.similarity import slabs
from rgfast.ops.similarity.call import Call
from rgfast.ops.similarity.factors import factor, products, rotations
from rgfast.ops.similarity.kernels import alignments, gram, rank_matrix, stacked
from rgfast.ops.similarity.neighbors import neighbors, overlaps
from rgfast.ops.similarity.rows import widened
from rgfast.runtime.waiting import waits_for

__all__ = ["SIMILARITY"]

# What prepared layers of the first side may take together; there is always one, and one of the second side.
_PREPARED_BYTES = 1 << 30
# The same for CKA on a GPU, where few samples are no reason to hold more than others may need.
_PREPARED_ON_DEVICE = 32 << 20
# CKA by n×n kernels up to this many samples: beyond, features are no more than a few times slower.
_MOST_SAMPLES = 8192
# A reordered entry of a kernel costs as much as so many products. On a GPU it is a sector of the second-level
# cache, or of memory where the kernel is larger than that; computed by an H100's rates.
_REORDERED, _FROM_CACHE, _FROM_MEMORY = 24, 360, 530


class _Prepared(NamedTuple):
    """How a measure is computed: prepare many, prepare one, compare them in every order."""

    first: Callable[[Iterable[Tensor]], Any]
    second: Callable[[Tensor], Any]
    compare: Callable[[Any, Any, Tensor], Tensor]
    layer_bytes: int
    bytes_at_a_time: int = _PREPARED_BYTES
    given: bool = False  # whether it takes rows as they are, not widened


def _run(call: Call) -> Tensor:
    lead, n = call.first[0].shape[:-2], call.first[0].shape[-2]
    first, second = ([x.reshape(-1, *x.shape[-2:]) for x in side] for side in (call.first, call.second))
    shape = (len(call.orders), len(first[0]), len(first), len(second))
    out = torch.empty(shape, dtype=torch.float64, device=call.device)
    orders = call.orders.to(call.device)
    with torch.no_grad(), by_itself(call.device.type):
        how = _prepared(call, n)
        step = max(1, how.bytes_at_a_time // how.layer_bytes)
        read = torch.Tensor.detach if how.given else widened
        for e in range(shape[1]):
            for start in range(0, len(first), step):
                left = how.first(read(x[e]) for x in first[start : start + step])
                for j, y in enumerate(second):
                    found = how.compare(left, how.second(read(y[e])), orders)
                    out[:, e, start : start + step, j] = found
    return out.reshape(len(orders), *lead, *shape[2:])


def _prepared(call: Call, n: int) -> _Prepared:
    options = dict(call.options)
    widest = max(x.shape[-1] for x in call.first)
    if call.measure == "mutual_knn":
        k, metric = options["k"], options["metric"]
        here = torch.arange(n, dtype=torch.int64, device=call.device)

        def both(layers: Iterable[Tensor]) -> tuple[Tensor, int]:
            near = [neighbors(x, k, metric).ordered(here) for x in layers]
            return torch.cat(near, 1), len(near)

        return _Prepared(
            both,
            lambda y: neighbors(y, k, metric),
            lambda left, right, orders: overlaps(left[0], left[1], right, orders),
            8 * n * k,
        )
    if call.measure == "rsa":
        return _Prepared(
            lambda layers: stacked((rank_matrix(x) for x in layers), n), rank_matrix, alignments, 2 * n * n
        )
    if call.measure == "procrustes":
        return _Prepared(
            lambda layers: [factor(x, "procrustes") for x in layers],
            lambda y: factor(y, "procrustes"),
            rotations,
            8 * n * min(n, widest),
        )
    debiased, on_device = options["debiased"], waits_for(call.device)
    if n > _MOST_SAMPLES or _features_pay(call, n):
        return _Prepared(
            lambda layers: [factor(x, "cka", debiased) for x in layers],
            lambda y: factor(y, "cka", debiased),
            lambda left, right, orders: (slabs.products if on_device else products)(
                left, right, orders, debiased
            ),
            8 * n * widest,
            _PREPARED_ON_DEVICE if on_device else _PREPARED_BYTES,
        )
    if on_device:
        return _Prepared(
            slabs.rows,
            lambda y: slabs.kernel(y, debiased),
            lambda left, right, orders: slabs.alignments(left, right, orders, debiased),
            8 * n,
            _PREPARED_ON_DEVICE,
            given=True,
        )
    return _Prepared(
        lambda layers: stacked((gram(x, debiased) for x in layers), n),
        lambda y: gram(y, debiased),
        alignments,
        4 * n * n,
    )


def _features_pay(call: Call, n: int) -> bool:
    """Whether products by features take fewer multiplications than kernels that are reordered."""
    widths = sum(x.shape[-1] for x in call.first)
    wide = max(x.shape[-1] for x in (*call.first, *call.second))
    mean = sum(y.shape[-1] for y in call.second) / len(call.second)
    reordered = _REORDERED
    if waits_for(call.device):
        reordered = _FROM_CACHE if 8 * n * n <= cache_bytes(call.device) else _FROM_MEMORY
    return wide <= n and widths * mean < n * (len(call.first) + reordered) / 2


def _cost(call: Call) -> float:
    return 1e-4 + call.multiplications() / 20e9


SIMILARITY = Impl("library", _run, cost=_cost)
