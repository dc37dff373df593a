"""CKA and drift by torch's batched fp64 products, of all layers of a few positions at a time.

With z and w centred rows and Q = Σ_k |z_k|²|w_k|², both inner products of two layers follow from the sum over
different samples, off = ‖zᵀw‖² − Q: ⟨K, L⟩ is off + Q, that of U-centred kernels is
off − 2Q/(n−2) + Σ|z|² Σ|w|²/((n−1)(n−2)). Nothing is read from the device before the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rgfast.ops.cka.call import Call
from rgfast.ops.cka.checks import check_call
from rgfast.ops.cka.sums import Sums, Wanted, mirrored, wanted_by
from rgfast.ops.device import by_itself, memory_bytes, seconds

__all__ = ["product_seconds", "run", "without"]

# Sums of so many products are cut in so many parts.
_LONG, _CUTS = 1 << 16, 64
# Bytes in work on the CPU; on a GPU an eighth of its memory, but no more than this.
_WORK_BYTES, _WORK_BYTES_ON_DEVICE = 64 << 20, 2 << 30


def run(call: Call) -> Tensor:
    """What the task of that name returns. Raises ValueError for NaN or Inf, for which it is read, once."""
    with torch.no_grad(), by_itself(call.device.type):
        value, finite = _computed(call)
    if not bool(finite):
        check_call(call)
    return value


def _computed(call: Call) -> tuple[Tensor, Tensor]:
    """The result, and whether the data were finite."""
    first, *lead = call.sides[0], *call.sides[0][0].shape[:-2]
    n, wanted, options = first[0].shape[-2], wanted_by(call), dict(call.options)
    flat = [x.detach().reshape(math.prod(lead), n, x.shape[-1]) for side in call.sides for x in side]
    if call.task == "alignment":
        groups = options["groups"]
        rest = [[without(x, g, groups) for x in flat] for g in range(groups if groups > 1 else 0)]
        found = [_alignment(part, wanted) for part in (flat, *rest)]
        return torch.stack([value for value, _ in found]), torch.stack([good for _, good in found]).all()
    layers, debiased = len(flat), options["debiased"]
    shape = (layers - 1,) if call.task == "drift" else (layers, layers)
    out = torch.empty((len(flat[0]), *shape), dtype=torch.float64, device=call.device)
    finite = torch.ones(len(out), dtype=torch.bool, device=call.device)
    limit = options.get("sample_limit", 4096)
    for part in _parts(flat, wanted):
        z = _centred(flat, part)
        sums = _sums(z, wanted, limit)
        finite[part] = sums.finite
        out[part] = _drift(z, sums, debiased) if call.task == "drift" else sums.ratio(debiased)
    if wanted.first < layers:
        out = out[:, : wanted.first, wanted.first :]
    out = out.reshape(*lead, *out.shape[1:])
    return (out[..., 0, 0] if call.task == "cka" else out), finite.all()


def without(x: Tensor, group: int, groups: int) -> Tensor:
    """``x[P, n, d]`` without samples group, group + groups, ..."""
    n = x.shape[1]
    kept = torch.arange(n - len(range(group, n, groups)), dtype=torch.int64, device=x.device)
    offset = kept % (groups - 1)
    return x.index_select(1, kept // (groups - 1) * groups + offset + (offset >= group))


def _alignment(flat: list[Tensor], wanted: Wanted) -> tuple[Tensor, Tensor]:
    """Debiased and biased CKA ``[2, P, L, L]``, of neighbours from their difference, NaN if not wanted."""
    layers = len(flat)
    out = torch.empty((2, len(flat[0]), layers, layers), dtype=torch.float64, device=flat[0].device)
    finite = torch.ones(len(flat[0]), dtype=torch.bool, device=out.device)
    for part in _parts(flat, wanted):
        z = _centred(flat, part)
        sums = _sums(z, wanted, 4096)
        finite[part] = sums.finite
        for values, debiased in zip(out, (True, False), strict=True):
            values[part] = sums.ratio(debiased)
            near = 1.0 - _drift(z, sums, debiased)
            values[part].diagonal(1, -2, -1).copy_(near)
            values[part].diagonal(-1, -2, -1).copy_(near)
    if wanted.near:
        at = torch.arange(layers, dtype=torch.int64, device=out.device)
        out.masked_fill_((at[:, None] - at).abs() > 1, torch.nan)
    return out, finite.all()


def _parts(flat: list[Tensor], wanted: Wanted) -> Iterator[slice]:
    """Positions at a time whose rows and products fit the work space."""
    positions, n, _ = flat[0].shape
    width, layers = max(x.shape[2] for x in flat), len(flat)
    here = flat[0].device
    limit = _WORK_BYTES if here.type == "cpu" else min(_WORK_BYTES_ON_DEVICE, memory_bytes(here) // 8)
    step = max(1, limit // (8 * layers * (4 * n * width + 2 * width * width)))
    for start in range(0, positions, step):
        yield slice(start, min(start + step, positions))


def _centred(flat: list[Tensor], part: slice) -> Tensor:
    """Centred rows ``[p, n, L, d]`` in fp64, each layer in a unit of its size, narrow ones with zeros."""
    p, n, _ = flat[0][part].shape
    z = torch.zeros(
        (p, n, len(flat), max(x.shape[2] for x in flat)), dtype=torch.float64, device=flat[0].device
    )
    for layer, x in enumerate(flat):
        z[:, :, layer, : x.shape[2]] = x[part]
    if any(x.dtype == torch.float64 for x in flat):
        z *= _unit(z)
    # The first row goes first: equal rows become zeros, and an offset costs no digits.
    z -= z[:, :1].clone()
    z -= z.mean(1, keepdim=True)
    z -= z.mean(1, keepdim=True)
    z *= _unit(z)
    return z


def _unit(z: Tensor) -> Tensor:
    """A power of two ``[p, 1, L, 1]`` that takes the largest magnitude of a layer into [1/2, 1)."""
    exponent = torch.frexp(z.abs().amax((1, 3), keepdim=True)).exponent.long().clamp(-1000, 1000)
    return ((1023 - exponent) << 52).view(torch.float64)


def _sums(z: Tensor, wanted: Wanted, sample_limit: int) -> Sums:
    """By features or, up to ``sample_limit`` samples, by samples: whichever takes less time.

    With more features than samples Q is most of ‖zᵀw‖², and what is left of it lacks digits.
    """
    p, n, _, width = z.shape
    norms = z.square().sum(3)  # [p, n, L]
    same = torch.bmm(norms.mT, norms)
    by_features, by_samples = product_seconds(p, n, width, wanted)
    if n > sample_limit or (by_features <= by_samples and width <= n):
        off = _by_features(z, wanted) - same
    else:
        off = _by_samples(z, wanted)
    return Sums(mirrored(off), same, norms.sum(1), n)


def product_seconds(p: int, n: int, width: int, wanted: Wanted) -> tuple[float, float]:
    """About how long both routes take on a GPU, whose bytes count as much as its products."""
    layers, pairs, square = wanted.layers, wanted.pairs, float(n * n)
    features = seconds(4.0 * layers, 24.0 * p * pairs * width**2, float(p * n * pairs) * width**2)
    inner = square * (pairs if wanted.near else layers**2)
    samples = seconds(16.0, p * square * layers * 40.0, p * (square * width * layers + inner))
    return features, samples


def _empty(z: Tensor) -> Tensor:
    p, _, layers, _ = z.shape
    return torch.full((p, layers, layers), torch.nan, dtype=torch.float64, device=z.device)


def _by_features(z: Tensor, wanted: Wanted) -> Tensor:
    """‖zᵀw‖² of every pair ``[p, L, L]``; all that a layer is multiplied by lie side by side."""
    out, (p, n, layers, width) = _empty(z), z.shape
    for i in range(layers):
        for part in wanted.of(i):
            count = part.stop - part.start
            cross = torch.bmm(z[:, :, i].mT, z[:, :, part].reshape(p, n, count * width))
            out[:, i, part] = cross.square_().view(p, width, count, width).sum((1, 3))
    return out


def _by_samples(z: Tensor, wanted: Wanted) -> Tensor:
    """Σ_{i≠j} K_ij L_ij of every pair ``[p, L, L]``, from rows of all kernels at a time."""
    out, (p, n, layers, _) = _empty(z), z.shape
    stacked = z.transpose(1, 2).contiguous()  # [p, L, n, d]
    total = torch.zeros((p, layers, layers), dtype=torch.float64, device=z.device)
    step = _rows_at_once(p * layers * n, z.device)
    for start in range(0, n, step):
        stop = min(start + step, n)
        kernels = stacked[:, :, start:stop] @ stacked.mT  # [p, L, rows, n]
        kernels[..., start:stop].diagonal(0, -2, -1).zero_()
        flat = kernels.flatten(2)
        if wanted.near:
            total.diagonal(0, 1, 2).add_(flat.square().sum(2))
            total.diagonal(1, 1, 2).add_((flat[:, :-1] * flat[:, 1:]).sum(2))
        else:
            total += _inner(flat)
    for i in range(layers):
        for part in wanted.of(i):
            out[:, i, part] = total[:, i, part]
    return out


def _inner(kernels: Tensor) -> Tensor:
    """Inner products ``[p, L, L]`` of ``kernels[p, L, m]``; long sums are cut, to keep all of a GPU busy."""
    m = kernels.shape[2]
    if m < _LONG:
        return torch.bmm(kernels, kernels.mT)
    cut = math.gcd(m, _CUTS)
    parts = [each.view(len(each), cut, m // cut).transpose(0, 1) for each in kernels]
    return torch.stack([torch.bmm(part, part.mT).sum(0) for part in parts])


def _rows_at_once(columns: int, device: torch.device) -> int:
    limit = _WORK_BYTES if device.type == "cpu" else min(_WORK_BYTES_ON_DEVICE, memory_bytes(device) // 8)
    return max(1, limit // (8 * max(1, columns)))


def _drift(z: Tensor, sums: Sums, debiased: bool) -> Tensor:
    """½‖K̂_l − K̂_{l+1}‖² ``[p, L-1]`` of kernels of unit norm, NaN beside layers without variance.

    With D = x − y and S = x + y it is ‖D Sᵀ + S Dᵀ‖²/8: a small change is seen before it is squared.
    """
    p, n, layers, width = z.shape
    if layers < 2:
        return torch.empty((p, 0), dtype=torch.float64, device=z.device)
    own = sums.own(sums.inner(debiased))
    unit = (z / own.sqrt().sqrt()[:, None, :, None]).transpose(1, 2)  # [p, L, n, d]
    d, s = unit[:, 1:] - unit[:, :-1], unit[:, 1:] + unit[:, :-1]
    diagonal = (d * s).sum(3)  # [p, L-1, n]
    off = torch.zeros((p, layers - 1), dtype=torch.float64, device=z.device)
    if width <= n:
        mixed = s.mT @ d
        off = ((d.mT @ d) * (s.mT @ s)).sum((-2, -1)) + (mixed * mixed.mT).sum((-2, -1))
        off = off / 2 - diagonal.square().sum(2) if debiased else off / 2
    else:
        step = _rows_at_once(p * layers * n, z.device)
        for start in range(0, n, step):
            stop = min(start + step, n)
            slab = (d[:, :, start:stop] @ s.mT + s[:, :, start:stop] @ d.mT) / 2
            if debiased:
                slab[..., start:stop].diagonal(0, -2, -1).zero_()
            off += slab.square().sum((-2, -1))
    if debiased:
        off = off - 2.0 * diagonal.square().sum(2) / (n - 2)
        off = off + diagonal.sum(2).square() / ((n - 1) * (n - 2))
    return off.clamp(min=0.0) / 2
