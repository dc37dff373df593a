"""CKA and drift in single precision on an NVIDIA GPU: split half-precision products of samples, in Triton.

The kernels are in ``gpu/kernels.py``. No whole kernel of samples is stored; centered rows are, in two parts
of fp16, of a few positions at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rgfast.dispatch import HandOff, Impl
from rgfast.ops.cka.call import Call
from rgfast.ops.cka.checks import check_call
from rgfast.ops.cka.gpu import answers
from rgfast.ops.cka.gpu.launch import at_once, fit, sums, tile_for
from rgfast.ops.cka.gpu.table import Tile
from rgfast.ops.cka.sums import TASKS, Sums, wanted_by
from rgfast.ops.device import LAUNCH, STREAM, by_itself
from rgfast.ops.moments.tiles import card, count
from rgfast.ops.residual_mlp.gpu import needs
from rgfast.runtime import known_answers, measured

__all__ = ["CKA"]

known_answers.register(*answers.ANSWERS)

# Split products a second on an H100, by prototypes, and how many times faster than fp64 fp32 is on cards
# where these take less time.
_PRODUCTS, _SLOW_FP64 = 2.0e14, 8
# Of pairs of layers at a time, in about ten tensors.
_WORK_BYTES = 16 << 20
# Below this, 1 - CKA lacks digits; U-centering that leaves little of a kernel raises it. Less than this
# fraction of the squares off its diagonal is too little.
_TINY_DRIFT, _LEAST_LEFT = 1e-4, 0.25


def run(call: Call) -> Tensor:
    """What the task of that name returns. Raises ValueError for NaN or Inf, for which it is read, once."""
    if call.device.type == "cuda":
        with torch.cuda.device(call.device):
            if torch.cuda.is_current_stream_capturing():
                raise _left(
                    call, "its table and its result go through the host, which a CUDA graph does not do"
                )
    with torch.no_grad(), by_itself(call.device.type):
        value, state = _computed(call)
    finite, in_range, left, sharp = state.tolist()
    if not finite:
        check_call(call)
    for fine, reason in (
        (finite and in_range, "its data leave the range of fp32"),
        (left, f"U-centering leaves less than {_LEAST_LEFT} of a kernel"),
        (sharp, f"a drift is below {_TINY_DRIFT}, where 1 - CKA in single precision has lost digits"),
    ):
        if not fine:
            raise _left(call, reason)
    return value


def _left(call: Call, reason: str) -> HandOff:
    return HandOff(reason, lambda others: others(call))


def _computed(call: Call) -> tuple[Tensor, Tensor]:
    """The result, and whether data were finite, in range, with digits after U-centering, and drifts large."""
    wanted, debiased = wanted_by(call), dict(call.options).get("debiased")
    *lead, n, _ = call.sides[0][0].shape
    flat = [x.detach().reshape(math.prod(lead), n, x.shape[-1]) for side in call.sides for x in side]
    kinds = (True, False) if call.task == "alignment" else (bool(debiased),)
    found, states = [], []
    positions, step = len(flat[0]), max(1, _WORK_BYTES // (80 * wanted.layers**2))
    for start in range(0, positions, step):
        some, in_range = sums(flat, start, min(step, positions - start), wanted)
        values, sharp = [], torch.ones_like(in_range)
        for kind in kinds:
            values.append(some.ratio(kind))
            if call.task in ("drift", "alignment"):
                drift, sharp_too = _drift(some, values[-1], kind)
                sharp = sharp & sharp_too
                if call.task == "drift":
                    values[-1] = drift
        found.append(torch.stack(values))
        left = _left_over(some) if kinds[0] else torch.ones_like(in_range)
        states.append(torch.stack([some.finite.all(), in_range, left, sharp]))
    value, state = torch.cat(found, 1), torch.stack(states).all(0)
    if call.task == "alignment":
        return value[None], state
    value = value[0]
    if wanted.first < wanted.layers:
        value = value[:, : wanted.first, wanted.first :]
    value = value.reshape(*lead, *value.shape[1:])
    return (value[..., 0, 0] if call.task == "cka" else value), state


def _drift(sums: Sums, ratio: Tensor, debiased: bool) -> tuple[Tensor, Tensor]:
    """1 - CKA of neighbors ``[P, L-1]``, and whether all have their digits."""
    drift = (1.0 - ratio.diagonal(1, 1, 2)).clamp(min=0.0)
    whole = sums.inner(False).diagonal(0, 1, 2) / sums.own(sums.inner(debiased))
    least = _TINY_DRIFT * torch.maximum(whole[:, 1:], whole[:, :-1])
    return drift, ~(drift < least).any()


def _left_over(sums: Sums) -> Tensor:
    """Whether U-centering leaves enough of every kernel that has variance."""
    own = sums.own(sums.inner(True))
    return ~(own < _LEAST_LEFT * sums.off.diagonal(0, 1, 2)).any()


def _can_run(call: Call) -> str | None:
    if call.task not in TASKS:
        return f"only CKA and drift of linear kernels have kernels in Triton, not {call.task!r}"
    if call.recorded():
        return "a gradient is wanted"
    options = dict(call.options)
    if options.get("precision") == "double":
        return "it computes in single precision"
    if options.get("groups", 1) > 1:
        return "samples are not left out by groups"
    layers = [x for side in call.sides for x in side]
    dtypes = {x.dtype for x in layers}
    if len(dtypes) > 1 or torch.float64 in dtypes:
        have = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"layers must have one dtype of at most 32 bits, and these have {have}"
    *lead, n, _ = layers[0].shape
    limit = options.get("sample_limit", 4096)
    if n > limit:
        return f"it multiplies samples, up to sample_limit={limit}, not {n}"
    if not math.prod(lead):
        return "there is no position"
    if fit([x.shape[-1] for x in layers], n, _tile(call)) < min(2, len(layers)):
        return (
            f"two layers of {n} samples and {max(x.shape[-1] for x in layers)} features do not fit its memory"
        )
    return needs.too_old(call.device)


def _by_name_only(call: Call) -> str | None:
    if dict(call.options).get("precision") != "single" and card(call.device)[2] <= _SLOW_FP64:
        return 'precision="single" is not asked for, and this GPU is fast in fp64'
    return measured.refusal("cka", "triton", call.device)


def _tile(call: Call) -> Tile:
    return tile_for(call.device, near=wanted_by(call).near)


def _cost(call: Call) -> float:
    """By launches, passes over rows, and products of tiles, which layers that do not fit together repeat."""
    layers, side = [x for side in call.sides for x in side], _tile(call).side
    *lead, n, _ = layers[0].shape
    width, rows = max(x.shape[-1] for x in layers), float(math.prod(lead) * len(layers))
    parts = at_once(len(layers), fit([width], n, _tile(call)), near=wanted_by(call).near)
    rows *= sum(map(len, parts)) / len(layers)
    tiles = rows * count(n, n, same=True, side=side) * side**2
    # Rows are read and written once, in as many bytes.
    return max(60 * LAUNCH, 8.0 * rows * n * width / STREAM + 2 * tiles * (width + len(layers)) / _PRODUCTS)


CKA = Impl(
    "triton",
    run,
    _can_run,
    _cost,
    ("cuda",),
    needs.missing,
    by_name_only=_by_name_only,
    unproven=lambda call: known_answers.unproven(
        call.device, answers.name_of(call.sides[0][0].dtype, near=wanted_by(call).near)
    ),
)
