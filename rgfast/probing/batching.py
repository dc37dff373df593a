"""How many sequences of a whole array are a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rgfast.ops.fast import factors_pay
from rgfast.probing.capture.batches import is_array
from rgfast.probing.capture.layers import Tap
from rgfast.probing.capture.watcher import tile_streamer
from rgfast.probing.first import FirstBatch
from rgfast.probing.offloaded import runs_on
from rgfast.probing.planning import plan_of, room
from rgfast.probing.sharding import is_sharded
from rgfast.probing.spec import ProbeSpec
from rgfast.runtime.memory import free_bytes
from rgfast.runtime.waiting import waits_for

__all__ = ["batch_size", "tile_size"]

# Sequences of a stack that hands over tiles that are taken through all its layers at once: as many rows per
# position as an accumulator sums in one product at least, on the CPU and where a product is a launch.
_TILE, _TILE_ELSEWHERE = 128, 1024
# Of the memory of a probe, what the rows of a tile at all layers may take, if its state leaves as much.
_SHARE = 4


def tile_size(model: nn.Module, groups: int) -> int:
    """Sequences of a tile."""
    device = runs_on(model)
    return groups * (_TILE if device is None or not waits_for(device) else _TILE_ELSEWHERE)


def batch_size(spec: ProbeSpec, model: nn.Module, taps: Sequence[Tap], batches: Any) -> int:
    """What was asked for, or the default.

    That is a tile for a stack that hands over tiles of an array of its rows where every operator is a launch:
    a block's kernel for fewer rows leaves most of a GPU idle. Fewer are taken if their rows at all layers
    need more than a quarter of ``memory`` or than the state leaves of it, and the usual number with a
    checkpoint, which counts batches and goes on anywhere.
    """
    device, usual = runs_on(model), spec.sequences_at_once
    if spec.batch_size is not None or spec.checkpoint is not None or device is None or not waits_for(device):
        return usual
    if not is_array(batches) or batches.ndim not in (2, 3) or tile_streamer({"": model}, taps) is None:
        return usual
    if spec.reads_layers or is_sharded(model):  # its layers are not watched in tiles
        return usual
    weight = next(model.parameters())
    first = _foreseen(spec, weight, len(taps), batches.shape)
    if first is None:
        return usual
    each: int = len(taps) * math.prod(batches.shape[1:]) * weight.element_size()
    memory = room(first, spec)
    try:
        left = memory - plan_of(first, spec, [tap.name for tap in taps]).state_bytes
    except ValueError:  # ranks may share out the state; otherwise it is said when the first batch is there
        return usual
    fitting = min(memory // _SHARE, left) // max(1, each)
    return max(usual, min(tile_size(model, spec.groups), fitting))


def _foreseen(spec: ProbeSpec, weight: Tensor, layers: int, shape: Sequence[int]) -> FirstBatch | None:
    """What the first batch of an array ``[n, D]`` or ``[n, T, D]`` will show, if that is known without it."""
    length = shape[1] if len(shape) == 3 else 1
    targets = []
    for target in spec.new_targets():
        width = target.width(length)
        if width is None:
            return None
        targets.append((target.name, width, target.classes is not None))
    return FirstBatch(
        widths=(shape[-1],) * layers,
        length=length,
        aligned=True,
        places=(0,) * layers,
        padded=False,
        masked=spec.mask is not None,
        targets=tuple(targets),
        free=free_bytes(weight.device),
        factors=factors_pay(weight),
        launched=waits_for(weight.device),
        itemsize=weight.element_size(),
    )
