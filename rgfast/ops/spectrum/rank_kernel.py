"""All rank measures of eigenvalues by a kernel for a GPU, csrc/cuda/spectrum_ranks.cu: a block per matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from rgfast.ops.device import LAUNCH, STREAM
from rgfast.ops.spectrum.call import Ranks, Values
from rgfast.runtime import cuda

__all__ = ["ANSWER", "BOUNDED", "KERNEL", "MEASURED", "launched", "table_cost", "tried"]

# In the order of a table's rows, which spectrum_ranks.cu has; bounds follow, and whether values were finite.
MEASURED = (
    "effective_rank",
    "effective_rank_variance",
    "participation_ratio",
    "stable_rank",
    "numerical_rank",
    "effective_rank_uncentred",
    "effective_rank_variance_uncentred",
)
BOUNDED = ("effective_rank", "effective_rank_uncentred")
KERNEL, _THREADS, _SHARED = "rgfast_spectrum_ranks", 128, 192
_ROWS = len(MEASURED) + len(BOUNDED) + 1


def launched(call: Values) -> Ranks:
    """The same by the kernel."""
    values, variance, accumulated, count = (
        x.contiguous() for x in (call.values, call.variance, call.accumulated, call.samples)
    )
    (b,), (m, d), device = count.shape, (values.shape[-1], variance.shape[-1]), call.device
    sigma = torch.empty((b, d), dtype=torch.float64, device=device)
    table = torch.empty((_ROWS, b), dtype=torch.float64, device=device)
    if b:
        given = values, variance, accumulated, count
        sizes = b, m, d, call.kinds, int(call.by_features)
        cuda.launch(
            KERNEL, (b, 1, 1), _THREADS, _SHARED, *given, *sizes, call.tol, sigma, table, device=device
        )
    return Ranks(sigma, table)


def tried(device: torch.device) -> Tensor:
    """The kernel's measures of a spectrum of 1 to 130 and of one value, of nothing, and of rows that are all
    the same."""
    root = torch.arange(1, 131, dtype=torch.float64, device=device)
    zero, last = 0 * root, root * (root == 130)
    values = torch.stack([root.square(), zero, 1e-12 * root, root.square() + last, zero, last]).contiguous()
    variance = torch.stack([root, zero, zero, root, zero, root])
    samples = torch.full((3,), 90, dtype=torch.int64, device=device)
    sigma, table = launched(Values(values, variance, 2 * values[:3].sum(1), samples))
    places = torch.arange(130, dtype=torch.float64, device=device) % 7
    return torch.cat([(sigma * places).sum(1), table.flatten()])


def table_cost(call: Values, launches: int) -> float:
    """Seconds of so many launches over the values."""
    return launches * (LAUNCH + 8.0 * call.variance.numel() / STREAM)


# Of `tried`.
ANSWER = (
    22396.0,
    0.0,
    0.0,
    85.00586161833364,
    0.0,
    0.0,
    75.99126281407906,
    0.0,
    0.0,
    68.1352350663285,
    0.0,
    0.0,
    42.42508875739645,
    0.0,
    0.0,
    89.0,
    0.0,
    0.0,
    85.81810357460988,
    0.0,
    1.0,
    76.46922173858917,
    0.0,
    1.0,
    7.539415904637025e-11,
    1.7763568394002505e-15,
    1.7763568394002505e-15,
    1.2271990328485244e-12,
    1.7763568394002505e-15,
    0.0,
    1.0,
    1.0,
    1.0,
)
