"""CKA in many orders of samples on a GPU, several at a time, in bounded memory.

By kernels, that of the second side is whole, 8 n² bytes, and is looked up in every order; those of the
first side are there by slabs of rows, in the upper triangle. By features, rows are reordered and
multiplied. Nothing is read from the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rgfast.ops.similarity.factors import Factor, inner

__all__ = ["Kernel", "Rows", "alignments", "kernel", "products", "rows"]

# Bytes of a slab of kernels of the first side, of columns in fp64, and of what is reordered at a time.
_SLAB, _COLUMNS, _REORDERED = 32 << 20, 8 << 20, 32 << 20
# ‖K‖² below this fraction of (tr K)²/n is rounding, not variance.
_NO_VARIANCE = 1e-13


class Rows(NamedTuple):
    """Rows ``x[n, d]`` as given, a unit of their size when centered, and the squared norms they have then."""

    x: Tensor
    unit: Tensor
    norms: Tensor


class Kernel(NamedTuple):
    """A centered or U-centered kernel ``[n, n]`` and its squared norm, NaN without variance."""

    matrix: Tensor
    square: Tensor


def rows(layers: Iterable[Tensor]) -> list[Rows]:
    """What kernels of layers ``[n, d]`` are made of, a slab at a time."""
    return [_rows(x) for x in layers]


def _rows(x: Tensor) -> Rows:
    one = torch.ones((), dtype=torch.float64, device=x.device)
    largest = torch.stack([z.abs().amax() for z in _columns(x, one)]).amax()
    unit = _power(-torch.frexp(largest).exponent.long())
    norms = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for z in _columns(x, unit):
        norms += z.square_().sum(1)
    return Rows(x, unit, norms)


def _power(exponent: Tensor) -> Tensor:
    return ((exponent.clamp(-1000, 1000) + 1023) << 52).view(torch.float64)


def _columns(x: Tensor, unit: Tensor) -> Iterator[Tensor]:
    """Some centered columns at a time, in fp64, times ``unit`` and the power of two that x is below.

    The first row goes first: equal rows become zeros, and an offset costs no digits.
    """
    low, high = torch.aminmax(x)
    size = torch.maximum(high, -low).to(torch.float64)
    first = _power(-torch.frexp(size).exponent.long())
    step = max(1, _COLUMNS // (8 * len(x)))
    for start in range(0, x.shape[1], step):
        z = x[:, start : start + step].to(torch.float64) * first
        z -= z[:1].clone()
        z -= z.mean(0)
        z -= z.mean(0)
        yield z.mul_(unit)


def _put_slab(out: Tensor, layer: Rows, start: int, debiased: bool) -> None:
    """Rows of the kernel from ``start`` on, and its columns from there on: ``out[rows, n - start]``."""
    n, a, stop = len(layer.x), layer.norms, start + len(out)
    out.zero_()
    for z in _columns(layer.x, layer.unit):
        out.addmm_(z[start:stop], z[start:].mT)
    if debiased:
        # Row sums of a centered kernel vanish: without the diagonal a they are −a.
        out += (a[start:stop] / (n - 2))[:, None]
        out += a[start:] / (n - 2)
        out -= a.sum() / ((n - 1) * (n - 2))
        out.diagonal().zero_()


def _slabs(n: int, layers: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < n:
        stop = min(n, start + max(1, _SLAB // (8 * layers * (n - start))))
        yield start, stop
        start = stop


def _halved(slab: Tensor) -> Tensor:
    """The sum of squares of a slab and its image; leaves what is above the diagonal, and half of that."""
    slab.triu_()
    diagonal, flat = slab.diagonal(), slab.view(-1)
    square = 2.0 * flat.dot(flat) - diagonal.square().sum()
    diagonal.div_(2.0)
    return square


def _own(square: Tensor, layer: Rows) -> Tensor:
    floor = _NO_VARIANCE * layer.norms.sum().square() / len(layer.x)
    return torch.where(square > floor, square, torch.nan)


def kernel(x: Tensor, debiased: bool) -> Kernel:
    """The whole kernel of rows ``x[n, d]``."""
    layer = _rows(x)
    n, device = len(x), x.device
    matrix = torch.empty(n, n, dtype=torch.float64, device=device)
    square = torch.zeros((), dtype=torch.float64, device=device)
    for start, stop in _slabs(n, 1):
        slab = torch.empty(stop - start, n - start, dtype=torch.float64, device=device)
        _put_slab(slab, layer, start, debiased)
        matrix[start:stop, start:] = slab
        matrix[start:, start:stop] = slab.mT
        square += _halved(slab)
    return Kernel(matrix, _own(square, layer))


def alignments(first: list[Rows], second: Kernel, orders: Tensor, debiased: bool) -> Tensor:
    """CKA ``[orders, layers]`` of the first layers and of the second one in each order of its samples."""
    n, device = len(second.matrix), second.matrix.device
    sums = torch.zeros(len(orders), len(first), dtype=torch.float64, device=device)
    squares = torch.zeros(len(first), dtype=torch.float64, device=device)
    for start, stop in _slabs(n, len(first)):
        high, wide = stop - start, n - start
        upper = torch.empty(len(first), high, wide, dtype=torch.float64, device=device)
        for slab, square, layer in zip(upper, squares, first, strict=True):
            _put_slab(slab, layer, start, debiased)
            square += _halved(slab)
        by_row = upper.permute(1, 2, 0)  # [rows, columns, layers]
        step = max(1, _REORDERED // (8 * high * wide))
        for begin in range(0, len(orders), step):
            some = orders[begin : begin + step]
            down, across = some[:, start:stop].mT, some[:, start:]
            reordered = second.matrix[down[:, :, None], across[None]]  # [rows, orders, columns]
            sums[begin : begin + step] += torch.bmm(reordered, by_row).sum(0)
    own = torch.stack([_own(square, layer) for square, layer in zip(squares, first, strict=True)])
    return 2.0 * sums / (own * second.square).sqrt()


def products(first: list[Factor], second: Factor, orders: Tensor, debiased: bool) -> Tensor:
    """The same by the cross moments of rows, of which those of the second are reordered."""
    n, widths = len(second.z), [each.z.shape[1] for each in first]
    side = torch.cat([each.z for each in first], 1).mT.contiguous()
    norms = torch.stack([each.norms for each in first])
    traces, sizes = norms.sum(1) * second.norms.sum(), torch.stack([each.size for each in first])
    out = torch.empty(len(orders), len(first), dtype=torch.float64, device=side.device)
    width = second.z.shape[1]
    step = max(1, _REORDERED // (8 * width * (n + len(side))))
    for begin in range(0, len(orders), step):
        some = orders[begin : begin + step]
        squares = torch.matmul(side, second.z[some]).square_().sum(2)  # [orders, columns of the first]
        whole = torch.stack([part.sum(1) for part in torch.split(squares, widths, 1)], 1)
        same = second.norms[some] @ norms.mT
        out[begin : begin + step] = inner(whole, same, traces, n, debiased)
    return out / (sizes * second.size)
