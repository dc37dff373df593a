"""What rows are looked at for while a model runs, by a kernel for a GPU, csrc/cuda/moments_surveyed.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from rgfast.dispatch import HandOff
from rgfast.ops.device import LAUNCH, STREAM
from rgfast.ops.moments.call import Batch, Survey
from rgfast.ops.moments.tiles import DTYPES, MOST_BLOCKS, MOST_SIDE, THREADS
from rgfast.runtime import cuda
from rgfast.runtime.known_answers import KnownAnswer
from rgfast.runtime.waiting import numbers

__all__ = ["SURVEYING", "surveyed", "surveying_answer", "surveying_cost", "surveying_refusal"]

SURVEYING = {dtype: f"rgfast_moments_survey_{name}" for dtype, name in DTYPES.items()}
# Of moments_surveyed.cu, which holds its side of these numbers against its sources: columns of a warp, and
# warps of a block.
_COLUMNS, _WARPS = 128, 4


def surveyed(call: Batch) -> Survey:
    """As `reference.survey`."""
    if cuda.capturing(call.device):
        reason = "a CUDA graph would read the table of layers where it was on the host, when it is replayed"
        raise HandOff(reason, lambda run: run(call))
    device, (sequences, positions) = call.device, call.lead
    strips = _strips(call)
    bad = torch.zeros((len(call.layers), sequences * strips, positions), dtype=torch.int32, device=device)
    means = []
    if call.means:
        means = [
            torch.empty((sequences, x.shape[2]), dtype=torch.float64, device=device) for x in call.layers
        ]
    words: dict[torch.dtype, list[int]] = {}
    for k, (x, keep) in enumerate(zip(call.layers, call.keeps, strict=True)):
        mask = [0, 0, 0] if keep is None else [keep.data_ptr(), *keep.stride()]
        words.setdefault(x.dtype, []).extend(
            [x.data_ptr(), *x.stride(), x.shape[2], *mask, means[k].data_ptr() if means else 0]
        )
        words[x.dtype].append(bad.data_ptr() + k * bad.stride(0) * bad.element_size())
    for dtype, each in words.items():
        grid = -(-sequences * strips // _WARPS), call.dtypes.count(dtype), 1
        table, sizes = numbers(each, device), (sequences, positions, strips)
        cuda.launch(SURVEYING[dtype], grid, THREADS, 0, table, *sizes, device=device)
    return Survey(bad.sum(1), means)


def _strips(call: Batch) -> int:
    """Of 128 columns, of the widest layer."""
    return -(-max(x.shape[2] for x in call.layers) // _COLUMNS)


def surveying_refusal(call: Batch) -> str | None:
    """Why the kernels cannot take the call."""
    if any(x is not None and x.device != call.device for x in (*call.layers, *call.keeps)):
        return "layers and masks must be on one device"
    if other := {*call.dtypes} - {*DTYPES}:
        return f"layers must be float64, float32, bfloat16 or float16, got {str(other.pop())[6:]}"
    if not all(call.lead) or not all(x.shape[2] for x in call.layers):
        return "there must be sequences, positions and features"
    if len(call.layers) > MOST_SIDE or call.lead[0] * _strips(call) > MOST_BLOCKS:
        return f"a grid has {MOST_BLOCKS} blocks at most, and {MOST_SIDE} of layers"
    return cuda.device_refusal(call.device)


def surveying_cost(call: Batch) -> float:
    """A pass over all rows, and the counts."""
    return (3 + len({*call.dtypes})) * LAUNCH + call.nbytes / STREAM


def _tried(device: torch.device) -> Tensor:
    """Of every dtype a layer of small whole numbers and one with a mask, of which the features lie apart."""
    found = []
    for dtype in DTYPES:
        rows = torch.arange(3 * 5, dtype=torch.float64, device=device).view(3, 5, 1)
        columns = torch.arange(131, dtype=torch.float64, device=device)
        x = (7 * rows + 3 * columns) % 16
        x[1, 2, 4] = torch.inf
        x[2, 3, 129] = torch.nan
        keep = rows[..., 0] % 3 != 0
        apart = x[..., :3].to(dtype).mT.contiguous().mT
        survey = surveyed(Batch([x.to(dtype), apart], [None, keep], means=True))
        found += [survey.bad.flatten().to(torch.float64)]
        for mean in survey.means:
            places = torch.arange(mean.numel(), dtype=torch.float64, device=device).view_as(mean) % 7
            found.append((mean.nan_to_num(0.0, 0.0, 0.0) * places).sum()[None])
    return torch.cat(found)


# Of each dtype: numbers that are not finite at five positions of both layers, and sums of both layers' means.
_VALUES = (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 8747.2, 165.33333333333331) * len(DTYPES)


def surveying_answer() -> KnownAnswer:
    """Of :data:`SURVEYING`."""
    return KnownAnswer(tuple(SURVEYING.values()), _tried, _VALUES, 1e-9)
