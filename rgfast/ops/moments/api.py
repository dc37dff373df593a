"""Functions of the room: products of rows added to moments, and the shift that rows are taken off first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rgfast.dispatch import Impl, ImplName, Op, register
from rgfast.ops.moments import reference
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
from rgfast.ops.moments.impl import cuda, library, native
from rgfast.ops.moments.reference import first_rows, shifted
from rgfast.runtime.threads import no_autocast, one_thread
from rgfast.runtime.waiting import waits_for
from rgfast.validation import as_real_tensor, check_choice

__all__ = [
    "CENTERED",
    "OP",
    "PAIRS",
    "POOLED",
    "POSITIONS",
    "SURVEY",
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


Precision = Literal["double", "single"]


def _reference(call: Products) -> None:
    with one_thread(), no_autocast(call.device.type):
        reference.add_products(
            call.sums, call.rows, call.shifts, call.keep, call.exponents, call.extra, fresh=call.fresh
        )


def _reference_cost(impl: Impl) -> Callable[[Any], float]:
    """The cost of the reference, which makes more passes and launches than the library off the CPU."""
    return lambda call: impl.cost(call) * (1.0 if call.device.type == "cpu" else 2.0)


OP = Op(
    "moments",
    [
        native.MOMENTS,
        cuda.MOMENTS,
        library.MOMENTS,
        # Passes over the rows and fp64 products of PyTorch on one thread (README, "Measurements").
        Impl("reference", _reference, cost=_reference_cost(library.MOMENTS)),
    ],
)


def _pairs_reference(call: Pairs) -> PairSums:
    with one_thread(), no_autocast(call.device.type):
        return reference.pair_products(call.totals, call.rows, call.shifts, call.moves)


PAIRS = Op(
    "pair products",
    [
        native.PAIRS,
        cuda.PAIRS,
        library.PAIRS,
        Impl("reference", _pairs_reference, cost=_reference_cost(library.PAIRS)),
    ],
    part_of="moments",
)


POSITIONS = Op(
    "position sums",
    [
        native.POSITIONS,
        library.POSITIONS,
        Impl(
            "reference", lambda call: reference.add_positions(*call), cost=_reference_cost(library.POSITIONS)
        ),
    ],
    part_of="moments",
)


def _centered_reference(call: Uncentered) -> Centered:
    with one_thread(), no_autocast(call.device.type):
        return reference.centered(call)


CENTERED = Op(
    "centered sums",
    [
        cuda.CENTERED,
        library.CENTERED,
        Impl("reference", _centered_reference, cost=lambda call: 3.0 * library.CENTERED.cost(call)),
    ],
    part_of="moments",
)


def _pooled_reference(call: Moved) -> Tensor:
    with one_thread(), no_autocast(call.device.type):
        return reference.pooled(call)


POOLED = Op(
    "pooled sums",
    [
        cuda.POOLED,
        library.POOLED,
        Impl("reference", _pooled_reference, cost=lambda call: 3.0 * library.POOLED.cost(call)),
    ],
    part_of="moments",
)


def _survey_reference(call: Batch) -> Survey:
    with one_thread(), no_autocast(call.device.type):
        return reference.survey(call)


SURVEY = Op(
    "survey",
    [
        cuda.SURVEY,
        library.SURVEY,
        Impl("reference", _survey_reference, cost=lambda call: 3.0 * library.SURVEY.cost(call)),
    ],
    part_of="moments",
)


def add_positions(rows: Tensor, to: Tensor, *, impl: ImplName = "auto") -> None:
    """Adds the sum over positions of ``rows[P, n, d]`` to ``to[n, d]`` (fp64), one position after another.

    >>> import torch
    >>> from rgfast.ops.moments import add_positions
    >>> total = torch.zeros(1, 2, dtype=torch.float64)
    >>> add_positions(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), total)
    >>> total
    tensor([[4., 6.]], dtype=torch.float64)
    """
    _check(to, "to", tuple(rows.shape[1:]))
    POSITIONS(impl, Positions(rows, to))


def add_products(
    sums: Mapping[tuple[int, int], Tensor],
    rows: Sequence[Tensor],
    shifts: Sequence[Tensor],
    *,
    keep: Tensor | None = None,
    exponents: Sequence[int] | None = None,
    extended: bool = True,
    precision: Precision = "double",
    fresh: bool = False,
    impl: ImplName = "auto",
) -> None:
    """Adds z_iᵀ z_j to ``sums[i, j][P, d_i + 2, d_j + 2]`` in place, with ``z = [y, |y|², 1]`` per row.

    y is ``(x − shift) 2^-exponent`` of the rows ``rows[l][P, b, d_l]`` (fp64, fp32, bf16 or fp16, of any
    strides) with ``shifts[l][P, d_l]``; rows for which ``keep[P, b]`` is False add nothing and may hold
    anything.
    ``sums`` are fp64, contiguous, with i ≤ j; (i, i) stays symmetric. All arithmetic is fp64.
    ``extended=False`` leaves the last two columns out: ``sums[i, j][P, d_i, d_j] += y_iᵀ y_j``.
    ``fresh=True`` takes sums as zeros, whatever is in them.
    ``precision="single"`` lets kernels on a GPU multiply numbers split into two fp16 numbers each: an entry
    then errs by at most 2^-16 Σ |z_i||z_j|, usually by 1e-7 of that, and per row by 2^-38 of the longest row.
    Squares of rows must be within fp64's range.

    The bits of a sum do not depend on the number of threads, nor on the strides and addresses of any tensor.
    Raises TypeError or ValueError for dtypes and shapes that do not fit.

    >>> import torch
    >>> from rgfast.ops.moments import add_products
    >>> x, total = torch.tensor([[[1.0], [3.0]]]), torch.zeros(1, 3, 3, dtype=torch.float64)
    >>> add_products({(0, 0): total}, [x], [torch.zeros(1, 1, dtype=torch.float64)])
    >>> total[0, 0]  # Σx², Σx³, Σx
    tensor([10., 28.,  4.], dtype=torch.float64)
    """
    check_choice(precision, "precision", ("double", "single"))
    extra = 2 if extended else 0
    call = _checked(sums, rows, shifts, keep, exponents, extra)
    OP(impl, call._replace(precision=precision, fresh=fresh))


def pair_products(
    totals: Mapping[tuple[int, int], Tensor],
    rows: Sequence[Tensor],
    shifts: Sequence[Tensor],
    *,
    owns: Sequence[Tensor | None],
    moves: Sequence[Tensor | None],
    units: Sequence[Tensor],
    impl: ImplName = "auto",
) -> PairSums:
    """What cross moments of pairs of layers lead to at every position; their sum is added to ``totals``.

    With u and v the rows ``rows[l][P, n, d_l]`` (fp32 or fp64) of two layers less ``shifts[l][P, d_l]``, the
    sum over positions of C = Σ u vᵀ is added to ``totals[i, j][d_i, d_j]``, i ≤ j. Compiled kernels multiply
    in fp32 with sums of 32 products, where ``owns[i]`` has the layer's own moments ``[P, d, d]`` only u by
    v − u: then a cross moment errs by as little as its layers differ. ``units[l][P]`` are powers of two that
    bring rows to about 1, 0 if all are zero. All other sums are fp64; the bits do not depend on the number
    of threads.

    >>> import torch
    >>> from rgfast.ops.moments import pair_products
    >>> x, one = torch.tensor([[[1.0], [-1.0]]]), torch.ones(1, dtype=torch.float64)
    >>> total, zero = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    >>> sums = pair_products(
    ...     {(0, 1): total}, [x, 2 * x], [zero] * 2, owns=[None] * 2, moves=[None] * 2, units=[one] * 2
    ... )
    >>> float(total), float(sums.norm), float(sums.products)
    (4.0, 16.0, 8.0)
    """
    found: PairSums = PAIRS(impl, Pairs(totals, rows, shifts, units, owns, moves))
    return found


def centered(
    sums: Sequence[Sequence[Tensor]],
    *,
    shifts: Sequence[Sequence[Tensor]] = (),
    units: Sequence[float] = (),
    impl: ImplName = "auto",
) -> Centered:
    """Sums of the rows about their means, by which layers are measured, from what `add_products` summed.

    ``sums[k][part]`` ``[P, d + 2, e + 2]`` are those of pair k, of any number of parts of P positions each,
    the same for every pair. Of the first of them, layers with themselves, ``shifts[k][part]`` ``[P, d]`` may
    be what their rows were less, in units of which ``units[k]`` (default: 1) make those of the sums: then
    their matrices and means are returned, too. See :class:`rgfast.ops.moments.call.Centered`.

    >>> import torch
    >>> from rgfast.ops.moments import add_products, centered
    >>> x, total = torch.tensor([[[1.0], [3.0]]]), torch.zeros(1, 3, 3, dtype=torch.float64)
    >>> shift = torch.zeros(1, 1, dtype=torch.float64)
    >>> add_products({(0, 0): total}, [x], [shift])
    >>> found = centered([[total]], shifts=[[shift]])
    >>> float(found.matrix), round(float(found.mean) ** 2, 12)  # Σ(x − 2)², and 2 · 2²
    (2.0, 8.0)
    """
    if shifts and not units:
        units = [1.0] * len(shifts)
    found: Centered = CENTERED(impl, Uncentered(sums, shifts, units))
    return found


def pooled(
    sums: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor], *, impl: ImplName = "auto"
) -> Tensor:
    """Sums ``[K, d + 2, e + 2]`` of the rows of all positions together, from those of every position.

    ``sums[k][P, d + 2, e + 2]`` are those of pair k, as `add_products` makes them, of rows less the shifts of
    their positions; ``left[k][P, d]`` and ``right[k][P, e]`` are these less one for all positions.

    >>> import torch
    >>> from rgfast.ops.moments import add_products, pooled
    >>> x, total = torch.tensor([[[1.0]], [[4.0]]]), torch.zeros(2, 3, 3, dtype=torch.float64)
    >>> add_products({(0, 0): total}, [x], [x[:, 0].double()])  # rows are their positions' shifts
    >>> pooled([total], [x[:, 0].double()], [x[:, 0].double()])[0, 0]  # Σx², Σx³, Σx
    tensor([17., 65.,  5.], dtype=torch.float64)
    """
    found: Tensor = POOLED(impl, Moved(sums, left, right))
    return found


def survey(
    layers: Sequence[Tensor],
    keeps: Sequence[Tensor | None],
    *,
    means: bool = True,
    impl: ImplName = "auto",
) -> Survey:
    """How many numbers are not finite at every position, and every sequence's mean over positions in fp64.

    Of the rows ``layers[l][B, T, d_l]`` those count that ``keeps[l][B, T]`` keeps (None: all); others may
    hold anything. ``means=False`` leaves the means out. Nothing is read on the host. A mean is the same
    whatever else is in the call, but sums of one implementation have another order than those of another.

    Raises ValueError for no layers, layers that are not [B, T, d_l] or differ in B or T, and for masks of
    another shape or dtype.

    >>> import torch
    >>> from rgfast.ops.moments import survey
    >>> x = torch.tensor([[[1.0], [4.0]], [[torch.inf], [2.0]]])
    >>> found = survey([x], [torch.tensor([[True, True], [False, True]])])
    >>> found.bad, found.means[0][:, 0]
    (tensor([[0, 0]]), tensor([2.5000, 2.0000], dtype=torch.float64))
    """
    if not len(layers):
        raise ValueError("layers must hold at least one layer, got none")
    if len(keeps) != len(layers):
        raise ValueError(f"keeps must be one per layer, got {len(keeps)} for {len(layers)} layers")
    lead = tuple(layers[0].shape[:2])
    for k, (x, keep) in enumerate(zip(layers, keeps, strict=True)):
        if x.dim() != 3 or tuple(x.shape[:2]) != lead:
            wanted = "[B, T, d]" if k == 0 else f"[{lead[0]}, {lead[1]}, d]"
            raise ValueError(f"layers[{k}] must be {wanted}, got shape {tuple(x.shape)}")
        if keep is not None and (keep.dtype != torch.bool or tuple(keep.shape) != lead):
            raise ValueError(f"keeps[{k}] must be bool {lead}, got {keep.dtype} {tuple(keep.shape)}")
    found: Survey = SURVEY(impl, Batch(layers, keeps, means))
    return found


def first_mean(rows: Tensor, keep: Tensor | None = None) -> Tensor:
    """Mean ``[P, d]``, fp64, of the rows ``[P, b, d]`` that ``keep[P, b]`` keeps; exact for constant columns.

    Every position keeps at least one row. The bits do not depend on threads, strides or addresses, but for
    rows of fewer bits than fp64 on a GPU that are all kept: those are summed by torch, in its own order.
    """
    if keep is None and waits_for(rows.device) and rows.dtype != torch.float64:
        return library.first_mean(rows)
    with one_thread():
        return reference.first_mean(rows, keep)


def _checked(
    sums: Mapping[tuple[int, int], Tensor],
    rows: Sequence[Tensor],
    shifts: Sequence[Tensor],
    keep: Tensor | None,
    exponents: Sequence[int] | None,
    extra: int,
) -> Products:
    if not len(rows) or len(shifts) != len(rows):
        raise ValueError(f"shifts must be one per layer of rows, got {len(shifts)} for {len(rows)} layers")
    rows = [as_real_tensor(x, f"rows[{k}]", min_dim=3).detach() for k, x in enumerate(rows)]
    lead = tuple(rows[0].shape[:-1])
    for k, (x, shift) in enumerate(zip(rows, shifts, strict=True)):
        if x.dim() != 3 or tuple(x.shape[:2]) != lead:
            raise ValueError(f"rows[{k}] must be [{lead[0]}, {lead[1]}, d], got shape {tuple(x.shape)}")
        _check(shift, f"shifts[{k}]", (lead[0], x.shape[2]))
    if keep is not None and (keep.dtype != torch.bool or tuple(keep.shape) != lead):
        raise ValueError(f"keep must be bool {lead}, got {keep.dtype} {tuple(keep.shape)}")
    for (i, j), total in sums.items():
        if not 0 <= i <= j < len(rows):
            raise ValueError(f"sums must be of pairs (i, j) with 0 <= i <= j < {len(rows)}, got {(i, j)}")
        _check(total, f"sums[{i}, {j}]", (lead[0], rows[i].shape[2] + extra, rows[j].shape[2] + extra))
        if not total.is_contiguous():
            raise ValueError(f"sums[{i}, {j}] must be contiguous, got strides {total.stride()}")
    units = [0] * len(rows) if exponents is None else list(exponents)
    if len(units) != len(rows):
        raise ValueError(f"exponents must be one per layer of rows, got {len(units)} for {len(rows)} layers")
    return Products(sums, rows, shifts, keep, units, extra)


def _check(x: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if x.dtype != torch.float64:
        raise TypeError(f"{name} must be float64, got {str(x.dtype).removeprefix('torch.')}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


register(OP, add_products)
