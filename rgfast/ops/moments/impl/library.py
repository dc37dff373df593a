"""The products by torch's batched fp64 GEMMs, without a wait for the device."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from rgfast.dispatch import Impl
from rgfast.ops.device import by_itself, by_name_on_cpu, cache_bytes, seconds
from rgfast.ops.moments.call import (
    Batch,
    Centered,
    Moved,
    Pairs,
    PairSums,
    Positions,
    Products,
    Survey,
    Uncentered,
)
from rgfast.ops.moments.moved import moved, norms_moved
from rgfast.runtime.waiting import sent, waits_for

__all__ = ["CENTERED", "MOMENTS", "PAIRS", "POOLED", "POSITIONS", "SURVEY", "first_mean", "positions_at_once"]

# Widened rows of all layers in work at a time: most of them, and so few that a launch takes longer than what
# it does.
_WORK_BYTES, _WORTH_A_LAUNCH = 64 << 20, 8 << 20
_WORK_BYTES_ON_DEVICE = 1 << 30
# Widened rows, or products, of all layers that are made in one launch.
_TOGETHER = 128 << 20
# From this width on two more columns cost a product more (a tile of 64 in each direction) than to read the
# rows again for them.
_APART = 128


def _run(call: Products) -> None:
    """As `reference.add_products`, layer by layer: a layer is widened when its first pair is due, and let go
    after its last, so that products find both in the cache."""
    if _fits_together(call):
        _run_together(call)
        return
    kind, positions = call.device.type, len(call.rows[0])
    order = sorted(call.sums, key=lambda pair: (pair[1], pair[0]))
    last = {layer: step for step, pair in enumerate(order) for layer in pair}
    with by_itself(kind):
        dropped = None if call.keep is None else ~call.keep[..., None]
        step = positions_at_once(call)
        for start in range(0, positions, step):
            part = slice(start, min(start + step, positions))
            wide: dict[int, Tensor] = {}
            spare: list[Tensor] = []
            for at, (i, j) in enumerate(order):
                for layer in (i, j):
                    if layer not in wide:
                        wide[layer] = _extended(call, layer, part, dropped, spare)
                total, add = call.sums[i, j][part], partial(_add, here=kind == "cpu", fresh=call.fresh)
                _multiply(total, wide[i], wide[j], call.extra, add, same=i == j)
                for layer in {i, j}:
                    if last[layer] == at:
                        spare.append(wide.pop(layer))


def _fits_together(call: Products) -> bool:
    """Whether all layers are widened and multiplied at once: where launches would take longer, and layers
    are alike and compared at the same distances all along."""
    (positions, b, d), layers = call.rows[0].shape, len(call.rows)
    wide = d + call.extra
    if layers == 1 or 8 * layers * positions * wide * max(b, wide) > _TOGETHER or not waits_for(call.device):
        return False
    if any(call.exponents) or len({(x.shape, x.dtype) for x in call.rows}) > 1:
        return False
    return all(count == layers - apart for apart, count in Counter(j - i for i, j in call.sums).items())


def _run_together(call: Products) -> None:
    (positions, b, d), layers = call.rows[0].shape, len(call.rows)
    with by_itself(call.device.type):
        z = torch.empty((layers, positions, b, d + call.extra), dtype=torch.float64, device=call.device)
        body, shifts = z[..., :d], torch.stack(list(call.shifts))
        torch.sub(torch.stack(list(call.rows)), shifts[:, :, None], out=body)
        if call.keep is not None:
            body.masked_fill_(~call.keep[..., None], 0.0)
        if call.extra:
            torch.linalg.vector_norm(body, dim=-1, out=z[..., d])
            z[..., d].square_()
            z[..., d + 1] = 1.0 if call.keep is None else call.keep.to(torch.float64)
        for apart in sorted({j - i for i, j in call.sums}):
            left, right = z[: layers - apart].flatten(0, 1), z[apart:].flatten(0, 1)
            found = torch.bmm(left.mT, right).view(layers - apart, positions, *z.shape[3:], z.shape[3])
            totals = [call.sums[layer, layer + apart] for layer in range(layers - apart)]
            put = torch._foreach_copy_ if call.fresh else torch._foreach_add_
            put(totals, list(found.unbind()))


def _extended(call: Products, layer: int, part: slice, dropped: Tensor | None, spare: list[Tensor]) -> Tensor:
    """``[z, |z|², 1]`` of the rows of a layer, or z alone, all zero for rows that are not kept.

    It takes the place of a spare one that is as wide.
    """
    x, exponent = call.rows[layer][part], call.exponents[layer]
    d = x.shape[2]
    shape = (*x.shape[:2], d + call.extra)
    used = next((k for k, each in enumerate(spare) if each.shape == shape), None)
    if used is None:
        z = torch.empty(shape, dtype=torch.float64, device=x.device)
        if call.extra:
            z[..., d + 1] = 1.0 if dropped is None else (~dropped[part, :, 0]).to(torch.float64)
    else:  # with its ones
        z = spare.pop(used)
    body = z[..., :d]
    torch.sub(x, call.shifts[layer][part][:, None], out=body)  # widened first: the difference is fp64
    if dropped is not None:
        body.masked_fill_(dropped[part], 0.0)
    if exponent:
        body.mul_(math.ldexp(1.0, -exponent))
    if call.extra:
        norms = z[..., d]
        torch.linalg.vector_norm(body, dim=-1, out=norms)
        norms.square_()
    return z


def _multiply(
    total: Tensor, left: Tensor, right: Tensor, extra: int, add: Callable[..., None], *, same: bool
) -> None:
    d, e = left.shape[2] - extra, right.shape[2] - extra
    if not extra or min(d, e) < _APART:
        add(total, left, right, same=same)
        return
    add(total[:, :d, :e], left[..., :d], right[..., :e], same=same)
    add(total[:, :, e:], left, right[..., e:], same=same)
    if same:
        total[:, d:, :e] = total[:, :d, e:].mT
    else:
        add(total[:, d:, :e], left[..., d:], right[..., :e])


def _add(total: Tensor, left: Tensor, right: Tensor, *, here: bool, fresh: bool, same: bool = False) -> None:
    """Add the products; ``same`` if ``right`` are the last columns of ``left``."""
    if not here:
        total.baddbmm_(left.mT, right, beta=0.0 if fresh else 1.0)
        return
    found = torch.bmm(left.mT, right)
    if same:  # the CPU's library gives the two halves other bits on some processors
        square = found[:, -found.shape[2] :]
        square.copy_(square.tril() + square.tril(-1).mT)
    if fresh:
        total.copy_(found)
    else:  # the caller's sums may lie anywhere, and the library's bits depend on where
        total += found


def first_mean(rows: Tensor) -> Tensor:
    """As `reference.first_mean`, of rows in fewer bits than fp64, in one pass.

    Exact for a constant column: up to 2^29 times a number of 24 bits is one of fp64's, and so is each sum.
    """
    return rows.sum(1, dtype=torch.float64) / rows.shape[1]


def positions_at_once(call: Products) -> int:
    """Positions whose rows are widened together: so few that a GPU's cache holds them, if launches then still
    have enough to do, else as many as work space allows."""
    positions, b = call.rows[0].shape[:2]
    each = max(1, 8 * b * max(x.shape[2] + call.extra for x in call.rows))
    live = _layers_at_once(call.sums)
    if call.device.type == "cpu":
        return max(1, min(positions, _WORK_BYTES // (live * each)))
    fits = cache_bytes(call.device) // 2 // (live * each)
    if fits * each < _WORTH_A_LAUNCH:
        fits = _WORK_BYTES_ON_DEVICE // (live * each)
    return max(1, min(positions, fits))


def _layers_at_once(sums: Mapping[tuple[int, int], Tensor]) -> int:
    """How many layers are widened at a time, at most, in the order of the products."""
    order = sorted(sums, key=lambda pair: (pair[1], pair[0]))
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for step, pair in enumerate(order):
        for layer in pair:
            first.setdefault(layer, step)
            last[layer] = step
    return max((sum(first[k] <= s <= last[k] for k in first) for s in range(len(order))), default=1)


def _cost(call: Products) -> float:
    """About the same as the reference on the CPU; on a GPU by launches, bytes and products."""
    if call.device.type == "cpu":
        return 2e-4 + call.multiplications() / 20e9
    positions, b = call.rows[0].shape[:2]
    if _fits_together(call):
        d, layers = call.rows[0].shape[2] + call.extra, len(call.rows)
        moved = positions * (60.0 * layers * b * d + 32.0 * len(call.sums) * d * d)
        return seconds(10 + 2 * len({j - i for i, j in call.sums}), moved, call.multiplications())
    wide = [x.shape[2] + call.extra for x in call.rows]
    chunks = math.ceil(positions / positions_at_once(call)) if positions else 0
    apart = sum(call.extra > 0 and min(wide[i], wide[j]) - 2 >= _APART for i, j in call.sums)
    # Without |y|² and 1 rows are widened and multiplied, and nothing else is done to them.
    operators, moved = (5, 40.0) if call.extra else (2, 20.0)
    launches = chunks * (len(wide) * operators + len(call.sums) + 2 * apart)
    rows = positions * b * sum(wide)
    sums = positions * sum(wide[i] * wide[j] for i, j in call.sums)
    return seconds(launches, moved * rows + 16.0 * sums, call.multiplications())


MOMENTS = Impl("library", _run, cost=_cost, by_name_only=by_name_on_cpu)


def _run_pairs(call: Pairs) -> PairSums:
    """As `reference.pair_products`, every layer widened once."""
    positions, width, moved = len(call.rows[0]), call.width, all(move is not None for move in call.moves)
    shape = (len(call.totals), positions)
    found = PairSums(
        *(torch.zeros(shape, dtype=torch.float64, device=call.device) for _ in range(2)),
        *(torch.zeros(*shape, width, dtype=torch.float64, device=call.device) for _ in range(4)),
    )
    wide: dict[int, tuple[Tensor, Tensor]] = {}
    with by_itself(call.device.type):
        for k, ((i, j), total) in enumerate(call.totals.items()):
            wide = {layer: each for layer, each in wide.items() if layer in (i, j)}
            for layer in (i, j):
                if layer not in wide:
                    x, shift = call.rows[layer], call.shifts[layer]
                    z = torch.empty(x.shape, dtype=torch.float64, device=x.device)
                    torch.sub(x, shift[:, None], out=z)
                    wide[layer] = z, z.square().sum(2)
            (u, a), (v, b) = wide[i], wide[j]
            cross = torch.bmm(u.mT, v)
            total += cross.sum(0)
            found.norm[k] = cross.square().sum((1, 2))
            found.products[k] = (a * b).sum(1)
            found.right_sums[k, :, : v.shape[2]] = torch.bmm(a[:, None], v)[:, 0]
            found.left_sums[k, :, : u.shape[2]] = torch.bmm(b[:, None], u)[:, 0]
            e, f = call.moves[i], call.moves[j]
            if moved and e is not None and f is not None:
                found.moved_right[k, :, : v.shape[2]] = torch.bmm(e[:, None], cross)[:, 0]
                found.moved_left[k, :, : u.shape[2]] = torch.bmm(cross, f[..., None])[..., 0]
    return found


def _pairs_cost(call: Pairs) -> float:
    if call.device.type == "cpu":
        return 2e-4 + call.multiplications() / 20e9
    positions, n = call.rows[0].shape[:2]
    rows = positions * n * sum(x.shape[2] for x in call.rows)
    launches = 3 * len(call.rows) + 14 * len(call.totals)
    return seconds(launches, 60.0 * rows, call.multiplications())


PAIRS = Impl("library", _run_pairs, cost=_pairs_cost, by_name_only=by_name_on_cpu)


def _add_positions(call: Positions) -> None:
    """In one sum over the positions, of which every row is read once."""
    with by_itself(call.device.type):
        call.to.add_(call.rows.sum(0, dtype=torch.float64))


def _positions_cost(call: Positions) -> float:
    if call.device.type == "cpu":
        return 1e-5 + call.rows.numel() / 5e8
    return seconds(2, float(call.rows.nbytes) + 24.0 * call.to.numel())


POSITIONS = Impl("library", _add_positions, cost=_positions_cost, by_name_only=by_name_on_cpu)


def _centered(call: Uncentered) -> Centered:
    """Of all pairs and parts at once."""
    with by_itself(call.device.type):
        moment = _joined(call.sums)
        count = moment[:, -1, -1, None]
        some = count.clamp_min(1.0)  # sums of no rows are zero
        e, f = -moment[:, :-2, -1] / some, -moment[:, -1, :-2] / some
        matrix = torch.addcmul(moment[:, :-2, :-2], e[:, :, None], moment[:, -1, None, :-2])
        norm = torch.linalg.vector_norm(matrix, dim=(1, 2)).square_()
        square = e.square().sum(1)
        trace = torch.addcmul(moment[:, -2, -1], square, count[:, 0], value=-1.0)
        rows = norms_moved(moment, f)  # Σ z|y_c|²
        product = torch.addcmul(rows[:, -2], square, rows[:, -1])[:, None, None]
        product = torch.baddbmm(product, e[:, None], rows[:, :-2, None], alpha=2.0)[:, 0, 0]
        sums = torch.stack([norm, product, trace, moment[:, -2, -1]]).view(4, len(call.sums), -1)
        if not call.shifts:
            return Centered(sums)
        shifts = _joined(call.shifts)
        if any(unit != 1.0 for unit in call.units):
            units = sent(torch.tensor(call.units, dtype=torch.float64, device="cpu"), call.device)
            shifts = (shifts.view(len(units), -1, shifts.shape[1]) * units[:, None, None]).view(shifts.shape)
        own = len(shifts)
        return Centered(sums, matrix[:own], (shifts - e[:own]) * count[:own].sqrt())


def _joined(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    found = [x for some in parts for x in some]
    return found[0] if len(found) == 1 else torch.cat(found)


def _centered_cost(call: Uncentered) -> float:
    d, e = call.widths
    moments = 8.0 * len(call.sums) * sum(call.positions) * (d + 2) * (e + 2)
    return seconds(20, 6.0 * moments)


CENTERED = Impl("library", _centered, cost=_centered_cost)


def _pooled(call: Moved) -> Tensor:
    """Of all pairs at once."""
    with by_itself(call.device.type):
        left, right = (torch.cat(list(moves)) for moves in (call.left, call.right))
        of_all = moved(torch.cat(list(call.sums)), left, right)
        return of_all.view(len(call.sums), -1, *of_all.shape[1:]).sum(1).contiguous()


def _pooled_cost(call: Moved) -> float:
    positions, d, e = call.sizes
    return seconds(16, 72.0 * len(call.sums) * positions * (d + 2) * (e + 2))


POOLED = Impl("library", _pooled, cost=_pooled_cost)


def _survey(call: Batch) -> Survey:
    """Layer by layer: two launches for what is not finite, one for means, and one for each mask in both."""
    bad, means = [], []
    with by_itself(call.device.type):
        for x, keep in zip(call.layers, call.keeps, strict=True):
            dropped = None if keep is None else ~keep[..., None]
            bad.append(_nonfinite(x, dropped))
            if not call.means:
                continue
            if keep is None or dropped is None:
                means.append(x.mean(1, dtype=torch.float64))
            else:
                total = x.masked_fill(dropped, 0.0).sum(1, dtype=torch.float64)  # widened on the way
                means.append(total / keep.sum(1, keepdim=True).clamp_min(1))
        return Survey(torch.stack(bad).to(torch.int64), means)


def _nonfinite(x: Tensor, dropped: Tensor | None) -> Tensor:
    """How many values of ``x[B, T, d]`` are not finite at every position ``[T]``, as floating-point
    numbers."""
    # Zero of a number, NaN of others, in few bytes.
    narrow = x.dtype if x.dtype.itemsize == 2 else torch.float16
    bad = torch.sub(x, x, out=torch.empty_like(x, dtype=narrow))
    if dropped is not None:
        bad.masked_fill_(dropped, 0.0)
    dtype = torch.promote_types(x.dtype, torch.float32)
    # How many are not zero: fewer launches and passes than comparing and counting.
    count: Tensor = torch.linalg.vector_norm(bad, 0, dim=(0, 2), dtype=dtype)
    return count


def _survey_cost(call: Batch) -> float:
    masked = sum(keep is not None for keep in call.keeps)
    launches = (3 if call.means else 2) * len(call.layers) + 5 * masked + 2
    return seconds(launches, (3.0 if call.means else 2.0) * call.nbytes)


SURVEY = Impl("library", _survey, cost=_survey_cost)
