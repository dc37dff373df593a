"""What CKA in Triton must do; ``triton_process.py`` runs it in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from conftest import _drift, _matrix
from rgfast.dispatch import HandOff
from rgfast.ops.cka.call import Call
from rgfast.ops.cka.gpu import answers, launch
from rgfast.ops.cka.gpu.table import Tile
from rgfast.ops.cka.impl import triton

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# What is promised of a CKA; the drifts of interpreted kernels, which do not truncate, are better.
ALLOWED = 1e-6


def drawn(count: int, positions: int, n: int, width: int, seed: int = 0, step: float = 0.7) -> Tensor:
    """Layers ``[count, positions, n, width]`` that add to the one before, fp64."""
    made = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, width + 1, dtype=torch.float64) ** -0.5
    steps = torch.randn(count, positions, n, width, generator=made, dtype=torch.float64) * decay
    steps[1:] *= step
    return steps.cumsum(0)


@contextmanager
def small_tiles(**more: Any) -> Iterator[None]:
    """Tiles of 64 samples, of which a GPU that is emulated needs not many; other settings as given."""
    smaller = {"tile_for": lambda device, *, near: Tile(64, 4, 2)} if DEVICE == "cpu" else {}
    with mock.patch.multiple(launch, **{"_AT_ONCE": 132, **smaller, **more}):
        yield


def called(task: str, layers: Any, other: Any = None, **options: Any) -> Call:
    first = tuple(x.to(DEVICE) for x in layers)
    second = None if other is None else tuple(x.to(DEVICE) for x in other)
    return Call(task, ("layers", "other"), first, second, tuple(options.items()))


def aligned(layers: Any, *, adjacent: bool = False) -> tuple[Tensor, list[bool]]:
    """Debiased and biased CKA ``[2, P, L, L]``, and whether they are trusted."""
    value, state = triton._computed(called("alignment", layers, adjacent=adjacent, groups=1))
    return value[0].cpu(), state.tolist()


def matrices(layers: Any) -> Tensor:
    """The truth for these."""
    truth = [
        torch.stack([_matrix([x[p] for x in layers], debiased=debiased) for p in range(len(layers[0]))])
        for debiased in (True, False)
    ]
    return torch.stack(truth)


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest error by what is allowed; infinite if not the same are NaN."""
    if not torch.equal(found.isnan(), wanted.isnan()):
        return float("inf")
    return float((found - wanted).abs().nan_to_num(0.0).max()) / ALLOWED


def refusal(call: Call) -> str:
    """Why the result is left to others, or an error's sentence, or nothing."""
    try:
        triton.run(call)
    except (HandOff, ValueError) as error:
        return str(error)
    return ""


def check_every_pair() -> dict[str, float]:
    found = {}
    with small_tiles():
        for shape in ((2, 2, 12, 5), (2, 1, 4, 3), (2, 1, 5, 70), (2, 1, 130, 17)):
            layers = drawn(*shape).float()
            value, state = aligned(layers)
            found[str(shape)] = off(value, matrices(layers))
            found[f"{shape}, trusted"] = all(state[:2])
            found[f"{shape}, itself"] = bool((value.diagonal(0, -2, -1) == 1).all())
    return found


def check_neighbors_and_drift() -> dict[str, float]:
    found = {}
    with small_tiles(_run=lambda tiles, layers, multiprocessors: 2):
        for shape in ((4, 2, 20, 66), (3, 1, 70, 3)):
            layers = drawn(*shape).float()
            value, _ = aligned(layers, adjacent=True)
            wanted = matrices(layers)
            apart = torch.arange(len(layers))
            wanted[:, :, (apart[:, None] - apart).abs() > 1] = torch.nan
            found[str(shape)] = off(value, wanted)
            drift = triton.run(called("drift", layers, debiased=False, precision="single")).cpu()
            truth = [[_drift(x[p], y[p]) for x, y in pairwise(layers)] for p in range(shape[1])]
            found[f"{shape}, drift"] = off(drift, torch.tensor(truth, dtype=torch.float64))
    return found


def check_two_models_of_several_widths() -> dict[str, float]:
    found = {}
    with small_tiles():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            first = [drawn(1, 1, 30, d, seed=d)[0].to(dtype) for d in (28,)]
            other = [drawn(1, 1, 30, d, seed=d)[0].to(dtype) for d in (1, 70)]
            call = called("matrix", first, other, debiased=True, precision="single")
            value = triton.run(call).cpu()
            wanted = _matrix([x[0] for x in first], [y[0] for y in other])
            found[str(dtype)] = off(value, wanted[None])
    pair = triton.run(called("cka", first[:1], other[:1], debiased=False)).cpu()
    found["two layers"] = off(pair, _matrix([first[0][0]], [other[0][0]], debiased=False)[0, 0][None])
    return found


def check_offsets_scales_and_outliers() -> dict[str, float]:
    """Each is a position of its own."""
    base = drawn(3, 1, 20, 30)[:, 0]
    cases = {
        "offset": base + 1e4,
        "large": base * 1e18,
        "small": base * 1e-18,
        "smaller": base * 1e-30,
        "large offset": (base + 1e4) * 1e18,
        "small offset": (base + 1e4) * 1e-18,
        "row": base.clone(),
        "feature": base.clone(),
        "number": base.clone(),
    }
    cases["row"][:, 5] *= 1e5
    cases["feature"][:, :, 3] *= 1e5
    cases["number"][1, 7, 11] = 1e5
    layers = torch.stack(list(cases.values()), 1).float()
    with small_tiles():
        value, state = aligned(layers)
    wanted, found = matrices(layers), {}
    for p, name in enumerate(cases):
        found[f"{name}, biased"] = off(value[1, p], wanted[1, p])
        if name not in ("row", "number"):  # of which U-centering leaves little
            found[f"{name}, debiased"] = off(value[0, p], wanted[0, p])
    return found | {"finite and in range": state[:2] == [True, True], "too little is seen": not state[2]}


def check_a_drift_keeps_its_digits_or_is_left_to_others() -> dict[str, float]:
    x, step = drawn(1, 1, 40, 9)[0], drawn(1, 1, 40, 9, seed=5)[0]
    sizes, found = (1e-1, 3e-2, 1e-2), {}
    with small_tiles():
        layers = (
            torch.stack([torch.cat([x] * len(sizes)), torch.cat([x + size * step for size in sizes])]) + 1e4
        )
        layers = layers.float()
        for debiased in (True, False):
            value, state = triton._computed(called("drift", layers, debiased=debiased, precision="single"))
            for p, size in enumerate(sizes):
                wanted = _drift(layers[0, p], layers[1, p], debiased)
                found[f"{debiased} {size}"] = abs(float(value[p, 0]) - wanted) / ALLOWED
            found[f"{debiased} is seen"] = state.tolist() == [True, True, True, wanted > 1e-4]
        said = refusal(called("drift", [x.float(), (x + 1e-3 * step).float()], debiased=False))
    found["is left"] = said.startswith("a drift is below 0.0001, where 1 - CKA in single precision has lost")
    return found


def check_layers_without_variance_are_nan() -> dict[str, Any]:
    layers = drawn(3, 2, 12, 15).float()
    layers[1, 0] = 1 / 3
    with small_tiles():
        value, state = aligned(layers)
        drift, _ = triton._computed(called("drift", layers, debiased=False))
    wanted = matrices(layers)
    wanted[:, 0, 1] = wanted[:, 0, :, 1] = torch.nan
    return {
        "all pairs": off(value, wanted),
        "trusted": all(state[:3]),
        "drift": bool(drift[0].isnan().all()) and not bool(drift[1].isnan().any()),
    }


def check_four_samples() -> dict[str, float]:
    """Of which U-centering leaves least."""
    found = {}
    with small_tiles():
        for seed, width in ((0, 8), (2, 64), (5, 64), (8, 64), (13, 32)):
            layers = drawn(2, 1, 4, width, seed).float()
            value, state = aligned(layers)
            trusted = [kind for kind in (0, 1) if kind or state[2]]
            found[f"{width}, {seed}"] = off(value[trusted], matrices(layers)[trusted])
    return found


def check_what_is_left_to_others() -> dict[str, bool]:
    fine, found = drawn(2, 2, 12, 5).float(), {}
    cases: dict[str, tuple[Tensor, str]] = {
        "a layer of two": (torch.stack([fine[0], fine[1] * 1e-41]), "its data leave the range of fp32"),
        "one outlier": (fine.clone(), "U-centering leaves less than 0.25 of a kernel"),
        "NaN": (fine.clone(), "layers must be finite, got 1 NaN or Inf values in layer 1 at position 1"),
        "Inf": (fine.clone(), "layers must be finite, got 1 NaN or Inf values in layer 1 at position 1"),
        "huge": (fine.clone(), "its data leave the range of fp32"),
    }
    cases["one outlier"][0][0, 1, 3] = 1e5
    cases["NaN"][0][1, 1, 3, 2] = torch.nan
    cases["Inf"][0][1, 1, 3, 2] = torch.inf
    cases["huge"][0][1, 1, 3, 2], cases["huge"][0][1, 1, 0, 2] = 3e38, -3e38
    with small_tiles():
        for name, (layers, reason) in cases.items():
            said = refusal(called("matrix", layers, debiased=True, precision="single"))
            found[f"{name}: {said}"] = said == reason
    return found


def check_bits_depend_on_a_position_alone() -> dict[str, bool]:
    found = {}

    def same(name: str, one: Any, two: Any) -> None:
        found[name] = torch.equal(one.nan_to_num(), two.nan_to_num())

    layers = drawn(2, 2, 66, 5).float()
    with small_tiles():
        same("alone", aligned(layers[:, 1:])[0], aligned(layers)[0][:, 1:])
    layers = drawn(3, 2, 20, 7).float()
    turned = layers.transpose(2, 3).contiguous().transpose(2, 3)
    apart = torch.empty(3, 2, 20, 15)[..., 1::2].copy_(layers)
    for near in (True, False):
        with small_tiles(_run=lambda *sizes: 3):
            together, _ = aligned(layers, adjacent=near)
            same(f"{near}, layout", aligned([turned[0], apart[1], layers[2]], adjacent=near)[0], together)
        # Rows of two layers at a time, of one position.
        side = 64 if DEVICE == "cpu" else launch.tile_for(torch.device(DEVICE), near=near).side
        with small_tiles(_ROWS_BYTES=2 * 4 * side * 64, _run=lambda *sizes: 1):
            same(f"{near}, few", aligned(layers, adjacent=near)[0], together)
    return found


def check_some_tiles_at_a_time() -> dict[str, float]:
    layers = drawn(2, 1, 130, 3).float()
    with small_tiles(_SCRATCH=4 * 2 * 4 * 64**2):  # four of six tiles
        value, _ = aligned(layers)
    return {"value": off(value, matrices(layers)), "chunk": launch.chunk(25, 36, 128) == (1, 21)}


def check_more_layers_than_a_group() -> dict[str, float]:
    layers = drawn(33, 1, 5, 2).float()
    with small_tiles():
        value, _ = aligned(layers)
    return {"biased": off(value[1], matrices(layers)[1])}


def check_every_output_is_written() -> dict[str, bool]:
    torch.use_deterministic_algorithms(True)  # new tensors then start as NaN
    try:
        found = {"poisoned": bool(torch.empty(3, device=DEVICE).isnan().all())}
        with small_tiles():
            for near in (True, False):
                value, _ = aligned(drawn(3, 1, 5, 3).float(), adjacent=near)
                found[f"{near}"] = int(value.isnan().sum()) == (4 if near else 0)
    finally:
        torch.use_deterministic_algorithms(False)
    return found


def _truncated(builder: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    """As tensor cores do: sums of 16 products are exact, and what is added to is cut to 24 bits."""
    total = d.data.astype(np.float32)
    for at in range(0, a.data.shape[1], 16):
        part = a.data[:, at : at + 16].astype(np.float64) @ b.data[at : at + 16].astype(np.float64)
        exact = total.astype(np.float64) + part
        rounded = exact.astype(np.float32)
        away = np.abs(rounded.astype(np.float64)) > np.abs(exact)
        total = np.where(away, np.nextafter(rounded, np.float32(0)), rounded)
    return type(d)(total, d.dtype.scalar)


def check_tensor_cores_that_truncate() -> dict[str, float]:
    """The data whose sums suffer most: wide layers, alike, and of few bits at an offset."""
    if DEVICE != "cpu":
        return {"there": True}
    x, found = drawn(2, 1, 40, 300, step=0.1), {}
    x[..., 0] += 3.0 * torch.arange(40)  # most products have one sign
    truncated = mock.patch.object(
        interpreter.InterpreterBuilder, "create_dot", autospec=True, side_effect=_truncated
    )
    with small_tiles(), truncated as emulated:
        for name, layers in (("wide", x.float()), ("few bits", (x + 1e4).float())):
            value, _ = aligned(layers)
            found[name] = off(value, matrices(layers))
    return found | {"emulated": emulated.call_count > 100}


def check_known_answers() -> dict[str, float]:
    found = {}
    # The first as it is tried on an H100.
    for answer in (answers.ANSWERS[1], answers.ANSWERS[0]) if DEVICE == "cpu" else answers.ANSWERS:
        with small_tiles() if found else nullcontext():
            value = answer.run(torch.device(DEVICE)).cpu()
        error = (value - torch.tensor(answer.values, dtype=torch.float64)).abs().max()
        found[answer.kernels[0]] = float(error) / answer.allowed
    return found
