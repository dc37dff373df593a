"""The products in plain PyTorch, on any device: what other implementations are tested against."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rgfast.ops.moments.call import Batch, Centered, Moved, PairSums, Survey, Uncentered

__all__ = [
    "add_positions",
    "add_products",
    "centered",
    "first_mean",
    "first_rows",
    "pair_products",
    "pooled",
    "shifted",
    "survey",
]

_WORK_BYTES = 64 << 20


def shifted(
    rows: Tensor, shift: Tensor, keep: Tensor | None = None, exponent: int = 0, out: Tensor | None = None
) -> Tensor:
    """``(x − shift) 2^-exponent`` of ``rows[P, b, d]`` in fp64, zero for rows that are not kept.

    Nothing is summed, so the values are the same wherever and however they are computed.
    """
    if out is None:
        out = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
    out.copy_(rows)
    out.sub_(shift[:, None])
    if keep is not None:
        out.masked_fill_(~keep[..., None], 0.0)
    return out.mul_(math.ldexp(1.0, -exponent)) if exponent else out


def extended(rows: Tensor, shift: Tensor, keep: Tensor | None, exponent: int, extra: int = 2) -> Tensor:
    """``[z, |z|², 1]`` with z as :func:`shifted` has it, all three zero for rows that are not kept; or z."""
    d = rows.shape[-1]
    if not extra:
        return shifted(rows, shift, keep, exponent)
    z = torch.empty(*rows.shape[:2], d + 2, dtype=torch.float64, device=rows.device)
    body = shifted(rows, shift, keep, exponent, out=z[..., :d])
    torch.sum(body.square(), -1, out=z[..., d])
    z[..., d + 1] = 1.0 if keep is None else keep.to(torch.float64)
    return z


def add_products(
    sums: Mapping[tuple[int, int], Tensor],
    rows: Sequence[Tensor],
    shifts: Sequence[Tensor],
    keep: Tensor | None,
    exponents: Sequence[int],
    extra: int = 2,
    *,
    fresh: bool = False,
) -> None:
    """``sums[i, j] += z_iᵀ z_j`` in chunks of positions, so that work space is bounded.

    Factors and product are new tensors whose layout follows from the shapes: on one thread of a CPU the
    library then sees the same alignment whatever tensors the caller passes.
    """
    if fresh:
        for total in sums.values():
            total.zero_()
    positions, b = rows[0].shape[:2]
    chunk = max(1, _WORK_BYTES // max(1, 8 * b * sum(x.shape[2] + 2 for x in rows)))
    for start in range(0, positions, chunk):
        part = slice(start, min(start + chunk, positions))
        kept = None if keep is None else keep[part]
        z = [
            extended(x[part], shift[part], kept, exponent, extra)
            for x, shift, exponent in zip(rows, shifts, exponents, strict=True)
        ]
        for (i, j), total in sums.items():
            total[part] += torch.bmm(z[i].mT, z[j])


def add_positions(rows: Tensor, to: Tensor) -> None:
    """``to[n, d] += Σ_P rows[P, n, d]``, one position after another."""
    for x in rows:
        to += x


def first_mean(rows: Tensor, keep: Tensor | None) -> Tensor:
    """Mean ``[P, d]`` of the rows ``[P, b, d]`` that are kept, in fp64; exact for constant columns.

    Every position keeps at least one row.
    """
    wide = torch.empty(rows.shape, dtype=torch.float64, device=rows.device).copy_(rows)
    if keep is None:
        first = wide[:, :1]
        return first[:, 0] + (wide - first).sum(1) / float(rows.shape[1])
    at = torch.arange(len(wide), dtype=torch.int64, device=rows.device)
    first = wide[at, keep.to(torch.uint8).argmax(1)][:, None]
    off = (wide - first).masked_fill_(~keep[..., None], 0.0)
    return first[:, 0] + off.sum(1) / keep.sum(1, keepdim=True).to(torch.float64)


def first_rows(rows: Sequence[Tensor], keep: Tensor | None) -> Tensor:
    """The first row of ``[P, b, d]`` of every layer that is kept at each position ``[L, P, d]``, in fp64."""
    if keep is None:
        return torch.stack([x[:, 0] for x in rows]).to(torch.float64)
    at = keep.to(torch.uint8).argmax(1)[:, None, None].expand(-1, 1, rows[0].shape[2])
    return torch.stack([x.gather(1, at)[:, 0] for x in rows]).to(torch.float64)


def pair_products(
    totals: Mapping[tuple[int, int], Tensor],
    rows: Sequence[Tensor],
    shifts: Sequence[Tensor],
    moves: Sequence[Tensor | None],
) -> PairSums:
    """``totals[i, j] += Σ_P uᵀ v`` of rows less their shifts, and what else it leads to, in fp64."""
    positions, width = len(rows[0]), max(x.shape[2] for x in rows)
    shape = (len(totals), positions)
    found = PairSums(
        *(torch.zeros(shape, dtype=torch.float64, device=rows[0].device) for _ in range(2)),
        *(torch.zeros(*shape, width, dtype=torch.float64, device=rows[0].device) for _ in range(4)),
    )
    for k, ((i, j), total) in enumerate(totals.items()):
        u, v = shifted(rows[i], shifts[i]), shifted(rows[j], shifts[j])
        cross = torch.bmm(u.mT, v)
        total += cross.sum(0)
        a, b = u.square().sum(2), v.square().sum(2)
        found.norm[k] = cross.square().sum((1, 2))
        found.products[k] = (a * b).sum(1)
        found.right_sums[k, :, : v.shape[2]] = (a[..., None] * v).sum(1)
        found.left_sums[k, :, : u.shape[2]] = (b[..., None] * u).sum(1)
        e, f = moves[i], moves[j]
        if e is not None and f is not None:
            found.moved_right[k, :, : v.shape[2]] = (cross * e[:, :, None]).sum(1)
            found.moved_left[k, :, : u.shape[2]] = (cross * f[:, None]).sum(2)
    return found


def centered(call: Uncentered) -> Centered:
    """As `rgfast.ops.moments.centered` has it, every pair and part by itself: Tᵀ M T of `[x, |x|², 1]`."""
    numbers, matrices, means = [], [], []
    for k, parts in enumerate(call.sums):
        for part, moment in enumerate(parts):
            count = moment[:, -1, -1, None]
            left, right = (
                -column / count.clamp_min(1.0) for column in (moment[:, :-2, -1], moment[:, -1, :-2])
            )
            found = torch.bmm(_moving(left).mT, torch.bmm(moment, _moving(right)))
            norm = found[:, :-2, :-2].square().sum((1, 2))
            numbers.append(torch.stack([norm, found[:, -2, -2], found[:, -2, -1], moment[:, -2, -1]]))
            if k < len(call.shifts):
                matrices.append(found[:, :-2, :-2])
                mean = torch.where(count > 0, call.shifts[k][part] * call.units[k] - left, 0.0)
                means.append(mean * count.sqrt())
    sums = torch.cat(numbers, 1).view(4, len(call.sums), -1)
    return Centered(sums, torch.cat(matrices), torch.cat(means)) if call.shifts else Centered(sums)


def pooled(call: Moved) -> Tensor:
    """As `rgfast.ops.moments.pooled` has it, pair by pair: Σ Tᵀ M T' over positions."""
    moves = zip(call.sums, call.left, call.right, strict=True)
    return torch.stack([(_moving(a).mT @ (moment @ _moving(b))).sum(0) for moment, a, b in moves])


def _moving(delta: Tensor) -> Tensor:
    """T of a move by ``delta[P, d]``: ``[x + delta, |x + delta|², 1]`` is ``[x, |x|², 1] T``."""
    d = delta.shape[1]
    found = torch.eye(d + 2, dtype=delta.dtype, device=delta.device).repeat(len(delta), 1, 1)
    found[:, :d, d], found[:, d + 1, :d] = 2 * delta, delta
    found[:, d + 1, d] = delta.square().sum(1)
    return found


def survey(call: Batch) -> Survey:
    """As its definition has it."""
    bad, means = [], []
    for x, keep in zip(call.layers, call.keeps, strict=True):
        wide = x.to(torch.float64)
        if keep is not None:
            wide = wide.masked_fill(~keep[..., None], 0.0)
        bad.append((~torch.isfinite(wide)).sum((0, 2)))
        if call.means:
            number = x.shape[1] if keep is None else keep.sum(1, keepdim=True).clamp_min(1)
            means.append(wide.sum(1) / number)
    return Survey(torch.stack(bad), means)
