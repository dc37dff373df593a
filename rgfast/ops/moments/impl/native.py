"""The products through the compiled kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rgfast.dispatch import Impl
from rgfast.ops.moments.call import Pairs, PairSums, Positions, Products
from rgfast.runtime import native

__all__ = ["MOMENTS", "PAIRS", "POSITIONS"]

# Seconds per call, and products a second of one AVX-512 core (README, "Measurements").
_CALL, _PRODUCTS = 2e-5, 35e9


def _run(call: Products) -> None:
    """As `reference.add_products`; the bits depend on values and instruction set alone."""
    rows, sums = call.rows, call.sums
    if call.fresh:
        for total in sums.values():
            total.zero_()
    shifts = [shift.contiguous() for shift in call.shifts]
    keep = None if call.keep is None else call.keep.contiguous()
    b = rows[0].shape[1]
    native.load().moments_add(
        [native.tensor(x) for x in rows],
        [
            native.address(s, torch.float64, x.shape[0] * x.shape[2], "shifts")
            for s, x in zip(shifts, rows, strict=True)
        ],
        [math.ldexp(1.0, -exponent) for exponent in call.exponents],
        (native.address(keep, torch.bool, len(rows[0]) * b, "keep"), b, 1),
        [
            (i, j, native.address(total, torch.float64, _entries(rows[i], rows[j]), "sums"))
            for (i, j), total in sums.items()
        ],
        native.threads(),
    )


def _entries(left: Tensor, right: Tensor) -> int:
    return len(left) * (left.shape[2] + 2) * (right.shape[2] + 2)


MOMENTS = Impl(
    "native",
    _run,
    lambda call: None if call.extra else "it computes the columns |y|² and 1 in any case",
    cost=lambda call: _CALL + call.multiplications() / _PRODUCTS,
    devices=("cpu",),
    missing=native.unavailable_reason,
    isa=native.active_isa,
)


def _run_pairs(call: Pairs) -> PairSums:
    """In fp32 products with fp64 sums, of the difference of two layers if their widths allow it."""
    positions, width = len(call.rows[0]), call.width
    shape = (len(call.totals), positions)
    found = PairSums(
        *(torch.empty(shape, dtype=torch.float64, device="cpu") for _ in range(2)),
        *(torch.zeros(*shape, width, dtype=torch.float64, device="cpu") for _ in range(4)),
    )
    moved = all(move is not None for move in call.moves)
    layers = []
    for x, shift, unit, own, move in zip(
        call.rows, call.shifts, call.units, call.owns, call.moves, strict=True
    ):
        d, count = x.shape[2], positions * x.shape[2]
        layers.append(
            (
                native.tensor(x),
                native.address(shift, torch.float64, count, "shifts"),
                native.address(unit, torch.float64, positions, "units"),
                native.address(own, torch.float64, count * d, "owns"),
                native.address(move, torch.float64, count, "moves") if moved else 0,
            )
        )
    pairs = [
        (
            *(i, j, native.address(total, torch.float64, call.entries(i, j), "totals")),
            *(native.address(x[k], torch.float64, positions, "sums") for x in found[:2]),
            *(native.address(x[k], torch.float64, positions * width, "sums") for x in found[2:4]),
            *(
                native.address(x[k], torch.float64, positions * width, "sums") if moved else 0
                for x in found[4:]
            ),
        )
        for k, ((i, j), total) in enumerate(call.totals.items())
    ]
    native.load().pair_products(layers, pairs, width, native.threads())
    return found


def _pairs_refusal(call: Pairs) -> str | None:
    if any(x.dtype not in (torch.float32, torch.float64) for x in call.rows):
        return "it takes float32 and float64"
    if not call.contiguous:
        return "it takes rows with contiguous features"
    return "a layer beside itself needs its own moment" if call.lacks_own else None


PAIRS = Impl(
    "native",
    _run_pairs,
    _pairs_refusal,
    cost=lambda call: _CALL + call.multiplications() / (2 * _PRODUCTS),
    devices=("cpu",),
    missing=native.unavailable_reason,
    isa=native.active_isa,
)


def _add_positions(call: Positions) -> None:
    """Position after position, in fp64; the bits depend on values alone."""
    x = call.rows
    to = native.address(call.to, torch.float64, x.shape[1] * x.shape[2], "to")
    native.load().add_positions(native.tensor(x), to, native.threads())


def _positions_refusal(call: Positions) -> str | None:
    x = call.rows
    if x.dtype not in (torch.float32, torch.float64):
        return "it takes float32 and float64"
    return None if x.shape[2] <= 1 or x.stride(2) == 1 else "it takes rows with contiguous features"


POSITIONS = Impl(
    "native",
    _add_positions,
    _positions_refusal,
    cost=lambda call: _CALL + call.rows.numel() / 2e9,
    devices=("cpu",),
    missing=native.unavailable_reason,
    isa=native.active_isa,
)
