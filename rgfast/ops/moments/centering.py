"""Sums about means by a kernel for a GPU, csrc/cuda/moments_centered.cu: one pass over all moments."""

from __future__ import annotations

import torch
from torch import Tensor

from rgfast.dispatch import HandOff
from rgfast.ops.device import LAUNCH, STREAM
from rgfast.ops.moments.call import Centered, Uncentered
from rgfast.ops.moments.tiles import MOST_SIDE, bits
from rgfast.runtime import cuda
from rgfast.runtime.known_answers import KnownAnswer
from rgfast.runtime.waiting import numbers

__all__ = ["CENTERING", "centered", "centering_answer", "centering_cost", "centering_refusal"]

CENTERING = "rgfast_moments_centered"
# Of moments_centered.cuh, which holds its side of these numbers against its sources.
_THREADS, _SHARED = 256, 64
_TRIED = 35  # columns of the problem with a known answer


def centered(call: Uncentered) -> Centered:
    """As `reference.centered`."""
    if cuda.capturing(call.device):
        reason = "a CUDA graph would read the table of pairs where it was on the host, when it is replayed"
        raise HandOff(reason, lambda run: run(call))
    device, positions, (d, e) = call.device, call.positions, call.widths
    pairs, each, own = len(call.sums), sum(positions), len(call.shifts)
    words, kept = [], []  # what is copied has to be there until the kernel was queued
    first = 0
    for k, parts in enumerate(call.sums):
        shifts, unit = (call.shifts[k], bits(call.units[k])) if k < own else ((), 0)
        for part, moment in enumerate(parts):
            shift = shifts[part].contiguous() if k < own else None
            kept += [moment := moment.contiguous(), shift]
            at = 0 if shift is None else shift.data_ptr()
            words += [moment.data_ptr(), at, first, positions[part], unit]
            first += positions[part]
    sums = torch.empty((4, pairs, each), dtype=torch.float64, device=device)
    matrix = torch.empty((own * each, d, d), dtype=torch.float64, device=device)
    mean = torch.empty((own * each, d), dtype=torch.float64, device=device)
    if first:
        grid = max(positions), pairs * len(positions), 1
        table = numbers(words, device)
        cuda.launch(CENTERING, grid, _THREADS, _SHARED, table, d, e, first, sums, matrix, mean, device=device)
    del kept
    return Centered(sums, matrix, mean) if own else Centered(sums)


def centering_refusal(call: Uncentered) -> str | None:
    """Why the kernel cannot take the call."""
    tensors: list[Tensor] = [x for parts in (*call.sums, *call.shifts) for x in parts]
    if any(x.device != call.device for x in tensors):
        return "sums and shifts must be on one device"
    if len(call.sums) * len(call.positions) > MOST_SIDE:
        return f"a grid has {MOST_SIDE} blocks of pairs and parts at most"
    return cuda.device_refusal(call.device)


def centering_cost(call: Uncentered) -> float:
    """A pass over all moments, and matrices that are written."""
    (d, e), each = call.widths, sum(call.positions)
    moved = 8.0 * each * (len(call.sums) * (d + 2) * (e + 2) + len(call.shifts) * d * (d + 3) / 2)
    return 5 * LAUNCH + moved / STREAM


def _tried(device: torch.device) -> Tensor:
    """Of two pairs of layers of whole numbers, in two parts; means and their squares have few digits."""
    rows = torch.arange(16, dtype=torch.float64, device=device)[:, None]
    columns = torch.arange(_TRIED, dtype=torch.float64, device=device)
    x = (3 * rows + 5 * columns) % 8 - 3
    more = x.square().sum(1, keepdim=True), torch.ones_like(rows)
    z, other = torch.cat([x, *more], 1), torch.cat([x * (columns % 3), *more], 1)
    pairs = [[(z.mT @ y)[None], torch.stack([z[:8].mT @ y[:8], 0 * (z.mT @ y)])] for y in (z, other)]
    shifts = [torch.ones((len(part), _TRIED), dtype=torch.float64, device=device) for part in pairs[0]]
    found = centered(Uncentered(pairs, [shifts], [2.0]))
    assert found.matrix is not None
    assert found.mean is not None
    places = torch.arange(_TRIED**2, dtype=torch.float64, device=device).view(_TRIED, _TRIED).tril() % 5
    matrix = (found.matrix.tril() * places).sum((1, 2))
    return torch.cat([found.sums.flatten(), matrix, (found.mean * columns).sum(1)])


_VALUES = (
    2069520.0,
    517380.0,
    0.0,
    3317376.0,
    829344.0,
    0.0,
    540305.0,
    270152.5,
    0.0,
    524998.0,
    262499.0,
    0.0,
    2940.0,
    1470.0,
    0.0,
    2940.0,
    1470.0,
    0.0,
    3080.0,
    1540.0,
    0.0,
    3080.0,
    1540.0,
    0.0,
    2912.0,
    1456.0,
    0.0,
    5950.0,
    4207.285348059957,
    0.0,
)


def centering_answer() -> KnownAnswer:
    """Of :data:`CENTERING`."""
    return KnownAnswer((CENTERING,), _tried, _VALUES, 1e-9)
