"""What a whole probe is predicted to cost on an H100, over the bare forward of the same model.

    python benchmarks/predict_gpu.py [--shapes 5]

No GPU is needed and none is used: every figure of a probe here is PREDICTED. The code that runs on a GPU is
run on stand-ins of its tensors, operator by operator, and each operator is given the time that its bytes,
products and launch take by rates measured on an H100. First the same model of time is held against what was
measured there. Rows that are off by more than a quarter are marked.

A probe's stand-in has the depth, positions and sequences of the real one and a width of 37. Wherever a size
is a multiple of 37, 38 or 39, it stands for that multiple of the real width, or of one or two columns more.

Left out, and named: operators without a model of their time. Left out: what Python does between operators,
and copies to the host, of which that of the moments, which a result carries, is the largest.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from gpu_clock import STAND_IN, Cost, timed
from torch import Tensor

import rgfast
from rgfast.bench.probe import ON_A_GPU, Case, last
from rgfast.ops.cka.api import OP as CKA
from rgfast.ops.moments.api import OP as MOMENTS
from rgfast.ops.moments.api import PAIRS, POSITIONS
from rgfast.ops.moments.call import Products
from rgfast.ops.moments.impl import library as products
from rgfast.ops.spectrum.impl import library as spectra
from rgfast.ops.spectrum.selection import EIGVALSH, GRAM, SPECTRUM
from rgfast.probing import plan
from rgfast.runtime import waiting
from rgfast.streaming import sizes

MEASURED = Path(__file__).with_name("h100_measured.json")
GPU = torch.device("cuda")


@dataclass(frozen=True)
class Row:
    """A figure that was measured, and the model's."""

    name: str
    measured: float
    predicted: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured

    @property
    def close(self) -> bool:
        """Within a quarter."""
        return 0.75 <= self.ratio <= 1.25


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def measured() -> dict[str, Any]:
    """What was measured on an H100: by kind, pairs of a shape and its figure (the file says what of)."""
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return found


def forward(depth: int, length: int, width: int, n: int) -> Cost:
    """Of a plain residual stack in fp32."""
    up, down = meta(4 * width, width), meta(width, 4 * width)
    norm, bias, high = meta(width), meta(width), meta(4 * width)

    def run() -> None:
        x = meta(n * length, width)
        for _ in range(depth):
            x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (width,), norm, bias), up, high)), down, bias)

    return timed(run)


def _multiply(*shape: int) -> None:
    z = meta(*shape, dtype=torch.float64)
    torch.bmm(z.mT, z)


def _center(x: Tensor) -> Tensor:
    wide = x.double()
    return wide - wide.mean(-2, keepdim=True)


def _by_features(layers: int, positions: int, n: int, width: int) -> None:
    side = meta(positions, n, layers * width, dtype=torch.float64)
    cross = torch.bmm(side.mT, side).view(positions, layers, width, layers, width)
    torch.linalg.vector_norm(cross, dim=(2, 4)).square()


def _neighbors_by_features(layers: int, positions: int, n: int, width: int) -> None:
    z = meta(layers * positions, n, width, dtype=torch.float64)
    near = (z, z), (z[:-positions], z[positions:])
    for left, right in near:
        torch.linalg.vector_norm(torch.bmm(left.mT, right), dim=(1, 2)).square()


def _by_samples(layers: int, positions: int, n: int, width: int) -> None:
    x, kernels = meta(layers, n, width, dtype=torch.float64), meta(layers, n, n, dtype=torch.float64)
    for _ in range(positions):
        torch.bmm(x, x.mT, out=kernels)
        parts = kernels.view(layers, 64, n * n // 64).transpose(0, 1)
        torch.bmm(parts, parts.mT).sum(0)


def _moments(layers: int, positions: int, n: int, width: int) -> float:
    """Seconds of widened, centered rows, their own products and those with the next layer."""

    def run() -> None:
        z = _center(meta(layers, positions, n, width)).view(layers * positions, n, width)
        torch.bmm(z.mT, z)
        torch.bmm(z[positions:].mT, z[:-positions])

    return timed(run).seconds


def validation() -> list[Row]:
    """Everything that was measured on an H100 and that the model is made to give."""
    table, rows = measured(), []
    calls: dict[str, Callable[..., object]] = {
        "widen": lambda *shape: meta(*shape).double(),
        "multiply": _multiply,
        "center": lambda *shape: _center(meta(*shape)),
        "cka_by_features": _by_features,
        "neighbors_by_features": _neighbors_by_features,
        "cka_by_samples": _by_samples,
    }
    for shape, ms in table["forward"]:
        rows.append(Row(f"forward {tuple(shape)}, ms", ms, 1e3 * forward(*shape).seconds))
    for kind, call in calls.items():
        for shape, ms in table[kind]:
            cost = timed(partial(call, *shape))
            rows.append(Row(f"{kind} {tuple(shape)}, ms", ms, 1e3 * cost.seconds))
    for (batch, d), each in table["eigenvalues"]:
        rows.append(Row(f"eigenvalues, {batch} of d={d}, us each", each, 1e6 * solved(batch, d) / batch))
    for shape, total, more in zip(ON_A_GPU, table["with_moments"], table["spectra_on_top"], strict=True):
        depth, length, width, n = shape
        bare = forward(*shape).seconds
        added = _moments(depth + 1, length, n, width)
        rows.append(Row(f"with_moments {shape}, over forward", total, 1 + added / bare))
        eigen = solved((depth + 1) * length, width)
        rows.append(Row(f"spectra_on_top {shape}, over forward", more, eigen / bare))
    return rows


def solved(count: int, d: int) -> float:
    """Seconds of the eigenvalues of so many matrices where torch has batches."""
    with _torch_with_batches():
        return spectra.solving(count, d, torch.float64, GPU)


@contextlib.contextmanager
def _torch_with_batches() -> Iterator[None]:
    with mock.patch.object(torch, "__version__", "2.13.0"):
        yield


@contextlib.contextmanager
def as_on_a_gpu(width: int) -> Iterator[Counter[int]]:
    """The library's implementations are all there are, no forward looks at values, and views, blocks of rows
    and products are cut as they would be at their real ``width``. Yields how often batches of a size were
    solved."""
    counted: Counter[int] = Counter()
    narrower = STAND_IN / width
    original, cut, add = spectra.eigenvalues, products.positions_at_once, products._add

    def eigenvalues(a: Tensor) -> Tensor:
        counted[a.shape[:-2].numel()] += 1
        return original(a)

    def at_once(call: Products) -> int:
        rows = [meta(*x.shape[:2], width, dtype=x.dtype) for x in call.rows]
        return cut(call._replace(rows=rows))

    changes: list[tuple[Any, str, Any]] = [
        (waiting, "_EVERYWHERE", True),
        (products, "_APART", 0 if width >= products._APART else 1 << 30),
        (products, "_add", lambda total, left, right, here: add(total, left, right, False)),
        (products, "positions_at_once", at_once),
        (spectra, "eigenvalues", eigenvalues),
        (plan, "_FLATTENED_WIDTH", int(plan._FLATTENED_WIDTH * narrower)),
        (plan, "_PENDING_BYTES", int(plan._PENDING_BYTES * narrower)),
        (sizes, "_AT_ONCE", int(sizes._AT_ONCE * narrower**2)),
    ]
    for op in (MOMENTS, PAIRS, POSITIONS, EIGVALSH, GRAM, SPECTRUM, CKA):
        library = dataclasses.replace(
            op.impls["library"], by_name_only=lambda call: None, cost=lambda call: 0.0
        )
        changes += [(op, "impls", {"library": library, "reference": op.impls["reference"]})]
        changes += [(op, "_chosen", {})]
    with contextlib.ExitStack() as stack:
        for where, name, value in changes:
            stack.enter_context(mock.patch.object(where, name, value))
        yield counted


@dataclass(frozen=True)
class Predicted:
    """A whole probe and its parts, in seconds."""

    shape: tuple[int, int, int, int]
    bare: float
    forwards: Cost
    reading: Cost
    spectra: float

    @property
    def share(self) -> float:
        """The whole over the bare forward."""
        return (self.forwards.seconds + self.reading.seconds + self.spectra) / self.bare


def predict(depth: int, length: int, width: int, n: int, batch: int = 256) -> Predicted:
    """A probe by moments with its default views and measures, of a plain stack in fp32."""
    case = Case.make("default", depth, length, STAND_IN, n, "cpu")
    with (
        as_on_a_gpu(width) as solving,
        rgfast.Probe(case.model, progress=False, route="moments") as probe,
    ):
        forwards = timed(lambda: [probe.run(part) for part in case.x.split(batch)], width)
        solving.clear()
        reading = timed(probe.result, width)
    bare = timed(lambda: [last(case.model, part) for part in case.x.split(batch)], width)
    spectrum = sum(times * solved(count, width) for count, times in solving.items())
    return Predicted((depth, length, width, n), bare.seconds, forwards, reading, spectrum)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", type=int, default=len(ON_A_GPU), help="how many of the five (default: all)"
    )
    args = parser.parse_args()
    print("| measured on an H100 | measured | model | model / measured | |\n|---|---|---|---|---|")
    for row in validation():
        mark = "" if row.close else "OFF BY MORE THAN A QUARTER"
        print(f"| {row.name} | {row.measured:.4g} | {row.predicted:.4g} | {row.ratio:.2f} | {mark} |")
    print("\nPREDICTED, not measured: a whole probe on an H100, route moments, torch >= 2.12\n")
    head = ["(L, T, d, n)", *(f"{part}, ms" for part in ("forward", "forward, probed", "reading", "spectra"))]
    print(f"| {' | '.join([*head, 'whole / forward', 'left out'])} |")
    print("|---|---|---|---|---|---|---|")
    for shape in ON_A_GPU[: args.shapes]:
        found = predict(*shape)
        left = found.forwards.unknown + found.reading.unknown
        ms = [
            1e3 * each for each in (found.bare, found.forwards.seconds, found.reading.seconds, found.spectra)
        ]
        print(
            f"| {shape} | {ms[0]:.2f} | {ms[1]:.2f} | {ms[2]:.2f} ({found.reading.kernels} kernels, "
            f"{found.reading.waits} waits) | {ms[3]:.2f} | {found.share:.2f} (predicted) "
            f"| {', '.join(f'{name} x {count}' for name, count in left.items()) or '-'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
