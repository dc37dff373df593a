"""Linear and RBF CKA, HSIC and kernel drift in plain fp64 PyTorch.

Every function takes representations ``[..., n, d]`` (n samples, d features; leading dimensions are batch).
Sources: HSIC_0, Gretton et al. 2005; HSIC_1, Song et al. 2012, eq. 5; CKA, Kornblith et al. 2019. With
centred columns the row sums of K = x xᵀ vanish, so those of K without its diagonal are −a, a_i = ‖x_i‖², and

    n(n−3) HSIC_1(K, L) = Σ_{i≠j} K_ij L_ij − 2 aᵀb/(n−2) + (Σa)(Σb)/((n−1)(n−2)).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# A slab of Grams of this many rows is alive at a time, so that no n×n kernel per layer ever is.
SLAB_ROWS = 128
# HSIC(K, K) below this fraction of ‖K‖² is rounding, not variance.
NO_VARIANCE = 1e-13


def run(task: str, *args: Any, **kwargs: Any) -> Any:
    """The reference for one of the room's public functions, by name."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        return _TASKS[task](*args, **kwargs)


def power_of_two(x: Tensor) -> Tensor:
    """Exponents e ``[..., 1, 1]`` such that 2^-e x has its largest magnitude in [1/2, 1); 0 where x is 0."""
    return torch.frexp(x.detach().abs().amax((-2, -1), keepdim=True))[1].clamp(-1000, 1000).to(torch.int64)


def scaled(x: Tensor, exponent: Tensor) -> Tensor:
    """2^exponent x without rounding (fp64), for exponents within ±1000."""
    return x * ((exponent + 1023) << 52).view(torch.float64)


def centered(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 ``x`` without its column means, times 2^-e, and e: its products neither over- nor underflow.

    The first row is taken off before the mean is formed: equal rows become exact zeros, and an offset common
    to all rows costs no digits.
    """
    x = x.to(torch.float64)
    first = power_of_two(x)
    x = scaled(x, -first)
    x = x - x[..., :1, :].detach()
    x = x - x.mean(-2, keepdim=True)
    x = x - x.mean(-2, keepdim=True).detach()
    second = power_of_two(x)
    return scaled(x, -second), first + second


def _without_diagonal(slab: Tensor, rows: slice) -> Tensor:
    own = torch.zeros(slab.shape[-2:], dtype=torch.bool, device=slab.device)
    own[:, rows].fill_diagonal_(True)
    return slab.masked_fill(own, 0.0)


def _u_terms(off: Tensor, q: Tensor, sa: Tensor, sb: Tensor, n: int) -> Tensor:
    return off - 2.0 * q / (n - 2) + sa * sb / ((n - 1) * (n - 2))


def inner(
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    pairs: Sequence[tuple[int, int]],
    debiased: bool,
    sample_limit: int = 4096,
) -> Tensor:
    """⟨K_i, L_j⟩ ``[pairs, ...]`` of the (U-)centred kernels of centred fp64 ``xs[i]`` and ``ys[j]``.

    In feature space, ‖xᵀy‖², where d d' <= n² or n > ``sample_limit``; else over slabs of Gram rows.
    """
    n = xs[0].shape[-2]
    shape = xs[0].shape[:-2]
    a = [x.square().sum(-1) for x in xs]
    b = [y.square().sum(-1) for y in ys]
    products: dict[int, Tensor] = {}
    wide = []
    for p, (i, j) in enumerate(pairs):
        if n <= sample_limit and xs[i].shape[-1] * ys[j].shape[-1] > n * n:
            wide.append(p)
        else:
            products[p] = (xs[i].mT @ ys[j]).square().sum((-2, -1))
            if debiased:
                products[p] = products[p] - (a[i] * b[j]).sum(-1)
    for start in range(0, n if wide else 0, SLAB_ROWS):
        rows = slice(start, min(start + SLAB_ROWS, n))
        left: dict[int, Tensor] = {}
        right: dict[int, Tensor] = {}
        for p in wide:
            i, j = pairs[p]
            for side, tensors, index in ((left, xs, i), (right, ys, j)):
                if index not in side:
                    slab = tensors[index][..., rows, :] @ tensors[index].mT
                    side[index] = _without_diagonal(slab, rows) if debiased else slab
            part = (left[i] * right[j]).sum((-2, -1))
            products[p] = products[p] + part if p in products else part
    out = []
    for p, (i, j) in enumerate(pairs):
        value = products[p]
        if debiased:
            value = _u_terms(value, (a[i] * b[j]).sum(-1), a[i].sum(-1), b[j].sum(-1), n)
        out.append(value)
    return torch.stack(out) if out else torch.empty((0, *shape), dtype=torch.float64, device=xs[0].device)


def self_inner(xs: Sequence[Tensor], debiased: bool, sample_limit: int = 4096) -> tuple[Tensor, Tensor]:
    """⟨K_i, K_i⟩ ``[L, ...]`` with 1 in place of layers without variance, and where they have some."""
    own = inner(xs, xs, [(i, i) for i in range(len(xs))], debiased, sample_limit)
    return with_variance(xs, own)


def with_variance(xs: Sequence[Tensor], own: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """⟨K_i, K_i⟩ ``[L, ...]``, 1 for layers without variance; and which have some."""
    floor = torch.stack([x.detach().square().sum((-2, -1)).square() for x in xs]) / xs[0].shape[-2]
    varies = own > NO_VARIANCE * weight * floor
    return torch.where(varies, own, 1.0), varies


def _ratio(cross: Tensor, own_x: Tensor, own_y: Tensor, defined: Tensor) -> Tensor:
    return torch.where(defined, cross / (own_x.sqrt() * own_y.sqrt()), torch.nan)


def matrix(
    layers: Sequence[Tensor],
    other: Sequence[Tensor] | None,
    *,
    debiased: bool,
    sample_limit: int = 4096,
    bounds: Sequence[int] | None = None,
) -> Tensor:
    """Linear CKA ``[..., L, L']`` of every pair of layers, within ``layers`` or with ``other``.

    With ``bounds`` the three inner products are sums over the batches that those sample indices delimit, each
    divided by its n(n−3) (Nguyen et al. 2021).
    """
    xs = [centered(x)[0] for x in layers]
    ys = xs if other is None else [centered(y)[0] for y in other]
    pairs = [(i, j) for i in range(len(xs)) for j in range(i if other is None else 0, len(ys))]
    own_pairs = [[(i, i) for i in range(len(z))] for z in (xs, ys)]
    batches = [(0, xs[0].shape[-2])] if bounds is None else list(pairwise(bounds))
    cross = own_x = own_y = torch.zeros((), dtype=torch.float64, device=xs[0].device)
    for start, stop in batches:
        xb, yb = ([_recentered(z[..., start:stop, :]) for z in side] for side in (xs, ys))
        weight = 1.0 if bounds is None else 1.0 / ((stop - start) * (stop - start - 3))
        cross = cross + weight * inner(xb, yb, pairs, debiased, sample_limit)
        own_x = own_x + weight * inner(xb, xb, own_pairs[0], debiased, sample_limit)
        own_y = (
            own_x if other is None else own_y + weight * inner(yb, yb, own_pairs[1], debiased, sample_limit)
        )
    weight = 1.0 if bounds is None else 1.0 / xs[0].shape[-2] ** 2
    own_x, varies_x = with_variance(xs, own_x, weight)
    own_y, varies_y = (own_x, varies_x) if other is None else with_variance(ys, own_y, weight)
    where = torch.empty(len(xs), len(ys), dtype=torch.int64, device="cpu")
    for p, (i, j) in enumerate(pairs):
        where[i, j] = p
        if other is None:
            where[j, i] = p
    cross = cross[where.to(cross.device)]
    values = _ratio(cross, own_x[:, None], own_y[None], varies_x[:, None] & varies_y[None])
    return values.movedim((0, 1), (-2, -1))


def _recentered(x: Tensor) -> Tensor:
    x = x - x[..., :1, :].detach()
    return x - x.mean(-2, keepdim=True)


def pair(x: Tensor, y: Tensor, *, debiased: bool) -> Tensor:
    """Linear CKA ``[...]`` of ``x[..., n, d]`` and ``y[..., n, d']``."""
    return matrix([x], [y], debiased=debiased)[..., 0, 0]


def _padded(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def difference(x: Tensor, y: Tensor, debiased: bool) -> Tensor:
    """‖K − L‖² ``[...]`` of the (U-)centred kernels of centred ``x`` and ``y``, without cancellation.

    With D = x − y and S = x + y (zero-padded to one width) K − L = (D Sᵀ + S Dᵀ)/2, so that a small change of
    the representation is seen before it is squared.
    """
    n, width = x.shape[-2], max(x.shape[-1], y.shape[-1])
    x, y = _padded(x, width), _padded(y, width)
    d, s = x - y, x + y
    diagonal = (d * s).sum(-1)
    if width <= n:
        mixed = s.mT @ d
        norm = ((d.mT @ d) * (s.mT @ s)).sum((-2, -1)) + (mixed * mixed.mT).sum((-2, -1))
        off = norm / 2 - diagonal.square().sum(-1) if debiased else norm / 2
    else:
        off = torch.zeros_like(diagonal[..., 0])
        for start in range(0, n, SLAB_ROWS):
            rows = slice(start, min(start + SLAB_ROWS, n))
            slab = (d[..., rows, :] @ s.mT + s[..., rows, :] @ d.mT) / 2
            slab = _without_diagonal(slab, rows) if debiased else slab
            off = off + slab.square().sum((-2, -1))
    if not debiased:
        return off.clamp(min=0.0)
    total = diagonal.sum(-1)
    return _u_terms(off, diagonal.square().sum(-1), total, total, n).clamp(min=0.0)


def drift(layers: Sequence[Tensor], *, debiased: bool) -> Tensor:
    """1 − CKA ``[..., L-1]`` of neighbouring layers as ½‖K̂_l − K̂_{l+1}‖², K̂ of unit norm."""
    xs = [centered(x)[0] for x in layers]
    own, varies = self_inner(xs, debiased)
    unit = [x / own[i].sqrt().sqrt()[..., None, None] for i, x in enumerate(xs)]
    steps = [
        torch.where(varies[i] & varies[i + 1], difference(unit[i], unit[i + 1], debiased) / 2, torch.nan)
        for i in range(len(xs) - 1)
    ]
    return _stacked(steps, xs[0])


def alignment(layers: Sequence[Tensor], *, adjacent: bool, groups: int = 1) -> Tensor:
    """Debiased and biased CKA ``[V, 2, ..., L, L]``, of neighbours alone (NaN elsewhere) if ``adjacent``.

    V is 1, or 1 + ``groups``: of all samples, then without samples g, g + groups, ... for every g.
    """
    group = torch.arange(layers[0].shape[-2], dtype=torch.int64, device=layers[0].device) % groups
    rest = [[x[..., group != g, :] for x in layers] for g in range(groups if groups > 1 else 0)]
    return torch.stack([_alignment(part, adjacent) for part in (layers, *rest)])


def _alignment(layers: Sequence[Tensor], adjacent: bool) -> Tensor:
    out = torch.stack([matrix(layers, None, debiased=debiased) for debiased in (True, False)])
    near = torch.arange(len(layers), dtype=torch.int64, device=out.device)
    far = (near[:, None] - near).abs() > 1
    for values, debiased in zip(out, (True, False), strict=True):
        close = 1.0 - drift(layers, debiased=debiased)
        values.diagonal(1, -2, -1).copy_(close)
        values.diagonal(-1, -2, -1).copy_(close)
    return out.masked_fill(far, torch.nan) if adjacent else out


def change(layers: Sequence[Tensor]) -> Tensor:
    """‖K_{l+1} − K_l‖/‖K_l‖ ``[..., L-1]`` of centred kernels: a drift that sees scale."""
    both = [centered(x) for x in layers]
    steps = []
    for (x, ex), (y, ey) in pairwise(both):
        exponent = torch.maximum(ex, ey)
        x, y = scaled(x, (ex - exponent).clamp(min=-1000)), scaled(y, (ey - exponent).clamp(min=-1000))
        own = inner([x], [x], [(0, 0)], False)[0]
        varies = own > 0
        moved = difference(x, y, False) / torch.where(varies, own, 1.0)
        # The square root has no derivative at 0, where nothing moves.
        some = varies & (moved > 0)
        root = torch.where(some, torch.where(some, moved, 1.0).sqrt(), 0.0)
        steps.append(torch.where(varies, root, torch.nan))
    return _stacked(steps, both[0][0])


def _stacked(steps: Sequence[Tensor], like: Tensor) -> Tensor:
    if not steps:
        return like.new_empty((*like.shape[:-2], 0))
    return torch.stack(list(steps), dim=-1)


def hsic(x: Tensor, y: Tensor, *, debiased: bool) -> Tensor:
    """HSIC ``[...]`` of linear kernels: HSIC_1, or ⟨K_c, L_c⟩/(n−1)²."""
    n = x.shape[-2]
    (x, ex), (y, ey) = centered(x), centered(y)
    value = inner([x], [y], [(0, 0)], debiased)[0]
    value = value / (n * (n - 3)) if debiased else value / max(n - 1, 1) ** 2
    exponent = (ex + ey)[..., 0, 0]
    # Two factors each: 2^(2e) may leave the range where 2^e does not.
    return scaled(scaled(value, exponent.clamp(-1000, 1000)), exponent.clamp(-1000, 1000))


def hsic_sums(layers: Sequence[Tensor]) -> Tensor:
    """HSIC_1 in units of 2^(2e), the square of its scale, and e: ``[..., L, L + 2]`` side by side."""
    both = [centered(x) for x in layers]
    xs = [x for x, _ in both]
    n = xs[0].shape[-2]
    pairs = [(i, j) for i in range(len(xs)) for j in range(len(xs))]
    values = torch.stack(list(inner(xs, xs, pairs, True)), -1)
    values = values.reshape(*values.shape[:-1], len(xs), len(xs))
    trace = torch.stack([x.square().sum((-2, -1)) for x in xs], -1)
    exponent = torch.stack([e[..., 0, 0] for _, e in both], -1)
    floor = trace.square() / (n * n * (n - 3))
    return torch.cat([values / (n * (n - 3)), floor[..., None], exponent.to(floor.dtype)[..., None]], -1)


def squared_distances(x: Tensor) -> Tensor:
    """‖x_i − x_j‖² ``[..., n, n]`` of centred ``x``."""
    a = x.square().sum(-1)
    return (a[..., :, None] + a[..., None, :] - 2.0 * (x @ x.mT)).clamp(min=0.0)


def rbf_kernel(x: Tensor, *, threshold: float, bandwidth: float | None) -> tuple[Tensor, Tensor]:
    """exp(−‖x_i − x_j‖²/(2σ²)) ``[..., n, n]``, σ = ``bandwidth`` or σ² = threshold² · median ‖x_i − x_j‖².

    The median runs over all n² ordered pairs, as in the notebook of Kornblith et al. Also where ``[...]`` σ >
    0 or all rows are equal, so that the kernel means something.
    """
    x, exponent = centered(x)
    squared = squared_distances(x)
    n = x.shape[-2]
    if bandwidth is None:
        flat = squared.detach().flatten(-2).sort(-1).values
        median = (flat[..., (n * n - 1) // 2] + flat[..., n * n // 2]) / 2
        scale = (threshold**2 * median)[..., None, None]
    else:
        width = torch.full((), bandwidth, dtype=torch.float64, device=x.device)
        scale = scaled(width, -exponent.clamp(-500, 500)).square()
    meant = (scale > 0) | (squared.detach() == 0).all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.exp(-squared / (2.0 * torch.where(scale > 0, scale, 1.0))), meant[..., 0, 0]


def centered_kernel(k: Tensor, debiased: bool) -> Tensor:
    """``k[..., n, n]`` doubly centred, or U-centred with a zero diagonal."""
    n = k.shape[-1]
    if not debiased:
        return k - k.mean(-1, keepdim=True) - k.mean(-2, keepdim=True) + k.mean((-2, -1), keepdim=True)
    diagonal = torch.eye(n, dtype=torch.bool, device=k.device)
    k = k.masked_fill(diagonal, 0.0)
    rows, columns = k.sum(-1, keepdim=True), k.sum(-2, keepdim=True)
    k = k - rows / (n - 2) - columns / (n - 2) + k.sum((-2, -1), keepdim=True) / ((n - 1) * (n - 2))
    return k.masked_fill(diagonal, 0.0)


def rbf(
    x: Tensor, y: Tensor, *, debiased: bool, threshold: float, bandwidth: float | None, normalized: bool
) -> Tensor:
    """CKA, or HSIC where not ``normalized``, ``[...]`` of RBF kernels."""
    n = x.shape[-2]
    (k, meant_k), (m, meant_m) = (rbf_kernel(z, threshold=threshold, bandwidth=bandwidth) for z in (x, y))
    k, m = centered_kernel(k, debiased), centered_kernel(m, debiased)
    meant = meant_k & meant_m
    cross = (k * m).sum((-2, -1))
    if not normalized:
        cross = cross / (n * (n - 3)) if debiased else cross / max(n - 1, 1) ** 2
        return torch.where(meant, cross, torch.nan)
    own_k, own_m = k.square().sum((-2, -1)), m.square().sum((-2, -1))
    defined = meant & (own_k > NO_VARIANCE) & (own_m > NO_VARIANCE)
    return _ratio(cross, torch.where(defined, own_k, 1.0), torch.where(defined, own_m, 1.0), defined)


_TASKS: dict[str, Any] = {
    "cka": pair,
    "matrix": matrix,
    "alignment": alignment,
    "drift": drift,
    "change": change,
    "hsic": hsic,
    "minibatch": matrix,
    "hsic_sums": hsic_sums,
    "rbf": rbf,
}
