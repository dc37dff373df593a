"""Small problems whose sums and values are known, for the kernels in csrc/cuda/cka*."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rgfast.ops.cka.launches import Batches, Layers, finish
from rgfast.ops.cka.sums import Wanted
from rgfast.ops.moments.tiles import DTYPES
from rgfast.runtime.known_answers import KnownAnswer

__all__ = ["ANSWERS"]


def _layers(
    device: torch.device, dtype: torch.dtype, n: int, width: int, *, near: bool, samples: bool, groups: int
) -> Layers:
    """Two layers of small numbers, whose sums none is rounded of without groups."""
    rows = torch.arange(n, dtype=torch.float64, device=device)[:, None]
    columns = torch.arange(width, dtype=torch.float64, device=device)
    x = ((7 * rows + 3 * columns + rows * columns) % 5 - 2)[None].to(dtype)
    return Layers([x, x[..., width - 7 : width - 2]], Wanted(2, 2, near), samples=samples, groups=groups)


def _by_features(dtype: torch.dtype, groups: int = 1) -> Callable[[torch.device], Tensor]:
    return lambda device: _layers(device, dtype, 32, 67, near=False, samples=False, groups=groups).sums()


def _by_samples(dtype: torch.dtype, *, near: bool) -> Callable[[torch.device], Tensor]:
    return lambda device: _layers(device, dtype, 128, 19, near=near, samples=True, groups=1).sums()


def _values(device: torch.device) -> Tensor:
    """Debiased and biased CKA of all samples and without each of two groups, and that nothing is wrong."""
    layers = _layers(device, torch.float64, 32, 67, near=False, samples=False, groups=2)
    value = torch.full((3, 2, 1, 2, 2), torch.nan, dtype=torch.float64, device=device)
    faults = torch.full((1, 3), -1, dtype=torch.int64, device=device)
    finish("alignment", [Batches(layers, layers.sums())], 0, value, faults, debiased=True)
    return torch.cat([value.flatten(), faults.flatten().double()])


_FEATURES = (
    *(4245242.66015625 - 461727.53576660156, 461727.53576660156, 3396.1875, 32 * 52.181640625),
    *(314297.16796875 - 34194.75769042969, 34194.75769042969, 3396.1875, 32 * 52.181640625),
    *(23280.56640625 - 2532.9742431640625, 2532.9742431640625, 251.5625, 32 * 4.013671875),
)
_SAMPLES = (
    *(5509385.005540371, 144712.89491128922, 3856.6328125, 128 * 16.00286865234375),
    *(1456776.1930799484, 38507.23770618439, 3856.6328125, 128 * 16.00286865234375),
    *(388059.1680049896, 10263.250207901001, 1027.890625, 128 * 4.0008544921875),
)
_GROUPS = (
    *(3783515.1243896484, 461727.53576660156, 3396.1875, 1669.8125),
    *(280102.4102783203, 34194.75769042969, 3396.1875, 1669.8125),
    *(20747.592163085938, 2532.9742431640625, 251.5625, 128.4375),
    *(828267.9265136719, 230611.07739257812, 1694.0625, 2.15625),
    *(61430.10498046875, 17089.62158203125, 1694.0625, 2.15625),
    *(4558.6669921875, 1266.7236328125, 125.625, 0.15625),
    *(834310.4948730469, 231213.04028320312, 1697.8125, 2.15625),
    *(61653.90380859375, 17111.91650390625, 1697.8125, 2.15625),
    *(4558.6669921875, 1266.7236328125, 125.625, 0.15625),
)
_ALIGNMENTS = (
    *(1.0, 0.9997354586124809, 0.9997354586124809, 1.0),
    *(1.0, 0.9997523570309907, 0.9997523570309907, 1.0),
    *(1.0, 0.9997144194468569, 0.9997144194468569, 1.0),
    *(1.0, 0.9997538466514131, 0.9997538466514131, 1.0),
    *(1.0, 0.9997165281692539, 0.9997165281692539, 1.0),
    *(1.0, 0.9997553818345016, 0.9997553818345016, 1.0),
    *(0.0, 0.0, 0.0),
)


def _names(*kinds: str) -> tuple[str, ...]:
    return tuple(f"rgfast_cka_{kind}" for kind in kinds)


def _answers(dtype: torch.dtype, name: str) -> list[KnownAnswer]:
    first = dtype == torch.float64
    features = [f"squares_{name}", f"centers_{name}", f"norms_{name}", *(["sums"] if first else [])]
    samples = [f"grams_{name}", *(["inner", "collect"] if first else [])]
    groups = [f"left_out_{name}", f"group_sums_{name}", f"group_products_{name}"]
    return [
        KnownAnswer(_names(*features), _by_features(dtype), _FEATURES),
        KnownAnswer(_names(*samples), _by_samples(dtype, near=False), _SAMPLES),
        KnownAnswer(_names(f"near_{name}"), _by_samples(dtype, near=True), _SAMPLES),
        KnownAnswer(_names(*groups), _by_features(dtype, 2), _GROUPS, 1e-6),
    ]


ANSWERS = (
    *(answer for dtype, name in DTYPES.items() for answer in _answers(dtype, name)),
    KnownAnswer(_names("finish"), _values, _ALIGNMENTS, 1e-12),
)
