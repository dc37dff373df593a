"""What a whole probe is predicted to cost on an H100, over the bare forward of the same model.

    python benchmarks/predict_gpu.py [--shapes 5] [--gpt2] [--python]

No GPU is needed and none is used: every figure of a probe here is PREDICTED. The code that runs on a GPU is
run on stand-ins of its tensors, operator by operator, and each operator is given the time that its bytes,
products and launch take by rates measured on an H100. First the same model of time is held against what was
measured there. Rows that are off by more than a quarter are marked.

A probe's stand-in has the depth, positions and sequences of the real one and a width of 37. Wherever a size
is a multiple of 37, 38 or 39, it stands for that multiple of the real width, or of one or two columns more.

Left out, and named: operators without a model of their time. Left out: what Python does between operators
(``--python`` times that of reading a result, here), the digest of weights once they are on the host, and the
copy of the moments to the host, which is made when a result is saved or merged.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from gpu_clock import STAND_IN, Clock, Cost, Row, timed
from torch import Tensor

import rgfast
from rgfast.bench.probe import ON_A_GPU, Case, last
from rgfast.ops.cka.api import OP as CKA
from rgfast.ops.device import TRANSFER, WAIT
from rgfast.ops.moments.api import OP as MOMENTS
from rgfast.ops.moments.api import PAIRS, POSITIONS
from rgfast.ops.moments.call import Products
from rgfast.ops.moments.impl import library as products
from rgfast.ops.spectrum.impl import library as spectra
from rgfast.ops.spectrum.selection import EIGVALSH, GRAM, SPECTRUM
from rgfast.probing import checkpoint, plan
from rgfast.probing import measured as measured_views
from rgfast.probing.plan import make_plan
from rgfast.probing.spec import ProbeSpec
from rgfast.runtime import waiting
from rgfast.streaming import MomentAccumulator, Together, sizes

MEASURED = Path(__file__).with_name("h100_measured.json")
GPU = torch.device("cuda")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def measured() -> dict[str, Any]:
    """What was measured on an H100: by kind, pairs of a shape and its figure (the file says what of)."""
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return found


def forward(depth: int, length: int, width: int, n: int, dtype: torch.dtype = torch.float32) -> Cost:
    """Of a plain residual stack."""
    up, down = meta(4 * width, width, dtype=dtype), meta(width, 4 * width, dtype=dtype)
    norm, bias, high = (meta(size, dtype=dtype) for size in (width, width, 4 * width))

    def run() -> None:
        x = meta(n * length, width, dtype=dtype)
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
    for shape, ms in table["forward_bf16"]:
        seconds = forward(*shape, dtype=torch.bfloat16).seconds
        rows.append(Row(f"forward in bf16 {tuple(shape)}, ms", ms, 1e3 * seconds))
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
def as_on_a_gpu(width: int, pending: int = plan._PENDING_BYTES) -> Iterator[Counter[tuple[int, int]]]:
    """The library's implementations are all there are, no forward looks at values, and views, blocks of rows
    and products are cut as they would be at their real ``width``, with ``pending`` bytes of rows held back.
    Yields how often so many matrices of so many rows were solved at once."""
    counted: Counter[tuple[int, int]] = Counter()
    narrower = STAND_IN / width
    original, cut, add = spectra.eigenvalues, products.positions_at_once, products._add

    def eigenvalues(a: Tensor) -> Tensor:
        side = width if a.shape[-1] == STAND_IN else a.shape[-1]
        counted[a.shape[:-2].numel(), side] += 1
        return original(a)

    def at_once(call: Products) -> int:
        rows = [meta(*x.shape[:2], width, dtype=x.dtype) for x in call.rows]
        return cut(call._replace(rows=rows))

    def few(part: MomentAccumulator) -> bool:
        return (rows := part.few) is not None and not part.factored and 2 * rows[0][0].shape[1] <= width

    def may_be_few(sums: MomentAccumulator) -> bool:
        return not sums._sums.summed and 2 * sums.rows_at_once <= width

    changes: list[tuple[Any, str, Any]] = [
        (Together, "few", staticmethod(few)),
        (MomentAccumulator, "_may_be_few", property(may_be_few)),
        (waiting, "_EVERYWHERE", True),
        (products, "_APART", 0 if width >= products._APART else 1 << 30),
        (products, "_add", lambda total, left, right, here: add(total, left, right, False)),
        (products, "positions_at_once", at_once),
        (spectra, "eigenvalues", eigenvalues),
        (measured_views, "on_host", lambda found: found),  # all views have been brought together
        (plan, "_FLATTENED_WIDTH", int(plan._FLATTENED_WIDTH * narrower)),
        (plan, "_PENDING_BYTES", int(pending * narrower)),
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
    """A whole probe and its parts, in seconds: the bare forward, the probed one, reading the result without
    the eigenvalues, these, and bringing the weights to the host for their digest."""

    name: str
    bare: float
    forwards: Cost
    reading: Cost
    spectra: float
    digest: float

    @property
    def share(self) -> float:
        """The whole over the bare forward."""
        return (self.forwards.seconds + self.reading.seconds + self.spectra + self.digest) / self.bare

    def row(self) -> str:
        """Of the table."""
        parts = (self.bare, self.forwards.seconds, self.reading.seconds, self.spectra, self.digest)
        forward, probed, reading, solving, digest = (f"{1e3 * part:.2f}" for part in parts)
        reading += f" ({self.reading.kernels} kernels, {self.reading.waits} waits)"
        unknown = self.forwards.unknown + self.reading.unknown
        left = ", ".join(f"{name} x {count}" for name, count in unknown.items()) or "-"
        cells = (self.name, forward, probed, reading, solving, digest, f"{self.share:.2f} (predicted)", left)
        return f"| {' | '.join(cells)} |"


def predict(depth: int, length: int, width: int, n: int, batch: int = 256) -> Predicted:
    """A probe by moments with its default views and measures, of a plain stack in fp32."""
    case = Case.make("default", depth, length, STAND_IN, n, "cpu")
    batches = case.x.split(batch)
    with as_on_a_gpu(width) as solving:
        return _predicted(
            f"{(depth, length, width, n)}",
            rgfast.Probe(case.model, progress=False, route="moments"),
            width,
            solving,
            lambda run: [run(part) for part in batches],
            lambda: [last(case.model, part) for part in batches],
        )


def predict_gpt2(layers: int = 12, width: int = 768, n: int = 64, length: int = 512) -> Predicted:
    """A probe of Hugging Face's GPT-2 in bf16, of one batch in which sequences lack up to half of their
    positions; the positions followed and the rows held back are those of the real width."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.GPT2Config(n_layer=layers, n_embd=STAND_IN, n_head=1, n_positions=length)
    model = hf.GPT2Model(config).to(torch.bfloat16).eval()
    batch = padded(n, length)
    names = [f"h.{k}" for k in range(layers + 1)]
    real = make_plan(
        names,
        [width] * len(names),
        length,
        positions="auto",
        views=None,
        pairs="adjacent",
        groups=1,
        memory=ProbeSpec().memory_bytes,
        masked=False,
        padded=True,
        refine=False,
        launched=True,
    )
    options: dict[str, Any] = {"positions": real.positions, "views": real.views, "memory": 1 << 40}

    def bare() -> None:
        with torch.no_grad():
            model(**batch)

    with as_on_a_gpu(width, real.pending_bytes) as solving:
        return _predicted(
            f"GPT-2 {layers} x {width} in bf16, [{n}, {length}] tokens with padding, "
            f"{len(real.positions)} positions followed",
            rgfast.Probe(model, progress=False, route="moments", **options),
            width,
            solving,
            lambda run: run(batch),
            bare,
        )


def _predicted(
    name: str,
    opened: rgfast.Probe,
    width: int,
    solving: Counter[tuple[int, int]],
    feed: Callable[[Callable[[Any], Any]], object],
    bare: Callable[[], object],
) -> Predicted:
    """A probe of what ``feed`` gives it, over ``bare``; ``solving`` counts the matrices solved."""
    with opened as probe:
        forwards = timed(lambda: feed(probe.run), width)
        solving.clear()
        reading = timed(probe.result, width)
    spectrum = sum(times * solved(*matrices) for matrices, times in solving.items())
    weights = sum(Clock(width).numel(x) * x.element_size() for x in probe.model.state_dict().values())
    digest = weights / TRANSFER + math.ceil(weights / checkpoint._TRANSFER) * WAIT
    return Predicted(name, timed(bare, width).seconds, forwards, reading, spectrum, digest)


def padded(n: int, length: int) -> dict[str, Tensor]:
    """Tokens of which every sequence lacks up to half."""
    draw = torch.Generator().manual_seed(0)
    lacking = torch.randint(0, length // 2 + 1, (n, 1), generator=draw)
    keep = (torch.arange(length) < length - lacking).long()
    return {"input_ids": torch.randint(0, 30_000, (n, length), generator=draw), "attention_mask": keep}


def python(depth: int, length: int, n: int, rounds: int = 5) -> float:
    """Seconds of one thread of this machine's CPU that reading a result takes, of operators of almost no
    size in place of a GPU's and without eigenvalues: what Python and the launches take, and a little more."""
    taken = []

    def diagonal(a: Tensor) -> Tensor:
        return a.diagonal(dim1=-2, dim2=-1).sort(-1).values

    case = Case.make("default", depth, length, 2, n, "cpu")
    with as_on_a_gpu(64), mock.patch.object(spectra, "eigenvalues", diagonal):
        for _ in range(rounds + 1):
            views = ("position", "pooled", "mean_pooled")
            with rgfast.Probe(case.model, progress=False, route="moments", views=views) as probe:
                probe.run(case.x)
            start = time.process_time()
            probe.result()
            taken.append(time.process_time() - start)
    return statistics.median(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", type=int, default=len(ON_A_GPU), help="how many of the five (default: all)"
    )
    parser.add_argument("--gpt2", action="store_true", help="GPT-2 too (needs transformers)")
    parser.add_argument("--python", action="store_true", help="time the reading's Python instead")
    args = parser.parse_args()
    if args.python:
        print("| (L, T, n) | reading, its Python and launches, ms on this machine's CPU |\n|---|---|")
        torch.set_num_threads(1)
        for depth, length, _, n in ON_A_GPU[: args.shapes]:
            print(f"| {(depth, length, n)} | {1e3 * python(depth, length, n):.1f} |", flush=True)
        return
    print("| measured on an H100 | measured | model | model / measured | |\n|---|---|---|---|---|")
    for row in validation():
        mark = "" if row.close else "OFF BY MORE THAN A QUARTER"
        print(f"| {row.name} | {row.measured:.4g} | {row.predicted:.4g} | {row.ratio:.2f} | {mark} |")
    print("\nPREDICTED, not measured: a whole probe on an H100, route moments, torch >= 2.12\n")
    parts = ("forward", "forward, probed", "reading", "spectra", "weights")
    head = ["(L, T, d, n)", *(f"{part}, ms" for part in parts), "whole / forward", "left out"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for shape in ON_A_GPU[: args.shapes]:
        print(predict(*shape).row(), flush=True)
    if args.gpt2:
        print(predict_gpt2().row(), flush=True)


if __name__ == "__main__":
    main()
