"""What a whole probe is predicted to cost on an H100, over the bare forward of the same model.

    python benchmarks/predict_gpu.py [--shapes 5] [--kernels] [--bf16] [--gpt2] [--python]

No GPU is needed and none is used: every figure of a probe here is PREDICTED. The code that runs on a GPU is
run on stand-ins of its tensors, operator by operator, and each operator is given the time that its bytes,
products and launch take by rates measured on an H100. First the same model of time is held against what was
measured there. Rows that are off by more than a quarter are marked.

A probe's stand-in has the depth, positions and sequences of the real one and a width of 53. Wherever a size
is a multiple of 53, 54 or 55, it stands for that multiple of the real width, or of one or two columns more.

With ``--kernels`` a probe is predicted by the package's kernels, too: those of moments where `auto` would
take them (`predict_moments.py`), of eigenvalues where there is one for the size (`gpu_spectrum.py`), and a
``ResidualStack`` of the Triton block (`gpu_block.py`). None of them was ever run on a GPU.

Weights come to the host for their digest while the forwards run: only what of that takes longer counts.

Left out, and named: operators without a model of their time. Left out: what Python does between operators
(``--python`` times that of reading a result and of a forward, here), the digest of weights once they are on
the host, by other processors there than the one that queues the forwards, and the copy of the moments to the
host, which is made when a result is saved or merged.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_block
import torch
import torch.nn.functional as F
from gpu_clock import STAND_IN, Clock, Cost, Row, print_beside, timed
from gpu_stand_in import as_on_a_gpu, launches_alone, solved
from torch import Tensor

import rgfast
from rgfast.bench.probe import ON_A_GPU, Case, last
from rgfast.ops.device import LAUNCH, TRANSFER
from rgfast.ops.spectrum.impl import library as spectra
from rgfast.probing.plan import make_plan
from rgfast.probing.spec import ProbeSpec

MEASURED = Path(__file__).with_name("h100_measured.json")
# Of plain stacks in fp32 at the five shapes, by library parts and with the package's kernels.
WANTED = {False: (3.0, 3.0, 5.0, 4.0, 4.0), True: (2.2, 1.8, 1.7, 1.6, 1.7)}


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


@dataclass(frozen=True)
class Predicted:
    """A whole probe and its parts: the bare eager forward, the probed one, reading the result without the
    eigenvalues, and in seconds these, and bringing the weights to the host after the last forward."""

    name: str
    eager: Cost
    forwards: Cost
    reading: Cost
    spectra: float
    digest: float

    @property
    def bare(self) -> float:
        """Seconds of the bare forward."""
        return self.eager.seconds

    @property
    def share(self) -> float:
        """The whole over the bare forward."""
        return (self.forwards.seconds + self.reading.seconds + self.spectra + self.digest) / self.bare

    def row(self, wanted: float | None = None) -> str:
        """Of the table."""
        parts = (self.bare, self.forwards.seconds, self.reading.seconds, self.spectra, self.digest)
        forward, probed, reading, solving, digest = (f"{1e3 * part:.2f}" for part in parts)
        reading += f" ({self.reading.kernels} kernels, {self.reading.waits} waits)"
        unknown = self.forwards.unknown + self.reading.unknown
        left = ", ".join(f"{name} x {count}" for name, count in unknown.items()) or "-"
        cells = [self.name, forward, probed, reading, solving, digest, f"{self.share:.2f} (predicted)"]
        return f"| {' | '.join([*cells, '-' if wanted is None else f'{wanted:.1f}', left])} |"


def predict(
    depth: int,
    length: int,
    width: int,
    n: int,
    batch: int = 256,
    *,
    dtype: torch.dtype = torch.float32,
    ours: bool = False,
) -> Predicted:
    """A probe by moments with its default views and measures of a plain stack, by library parts or by the
    package's kernels (``ours``)."""
    case = Case.make("default", depth, length, STAND_IN, n, "cpu")
    model, batches = case.model.to(dtype), case.x.to(dtype).split(batch)
    with as_on_a_gpu(width, ours=ours) as solving:
        return _predicted(
            f"{(depth, length, width, n)}",
            rgfast.Probe(model, progress=False, route="moments"),
            width,
            solving,
            lambda run: [run(part) for part in batches],
            lambda: [last(model, part) for part in batches],
            ours=ours,
        )


def predict_own(depth: int, length: int, width: int, n: int) -> Predicted:
    """That of a ``ResidualStack`` of the Triton block by the package's kernels, in fp32, over the bare eager
    forward of a plain stack, in batches of one array as :func:`rgfast.probe` cuts them."""
    plain = Case.make("default", depth, length, STAND_IN, n, "cpu")
    own = Case.make("own", depth, length, STAND_IN, n, "cpu")
    with as_on_a_gpu(width, ours=True) as solving:
        probe = rgfast.Probe(own.model, progress=False, route="moments")
        size = probe.batch_size(meta(n, length, width))
        batches = plain.x.split(size)
        found = _predicted(
            f"{(depth, length, width, n)}",
            probe,
            width,
            solving,
            lambda run: [run(part) for part in batches],
            lambda: [last(plain.model, part) for part in batches],
            ours=True,
        )
    # Blocks are compiled on the CPU too, so that none of torch's operators were counted for them.
    tiles = [len(part) for part in batches]  # a batch is one tile at most
    launches = len(tiles) * gpu_block.launches("split", width, depth)
    seconds = sum(gpu_block.stack("split", width, tile * length, depth) for tile in tiles)
    forwards = dataclasses.replace(
        found.forwards,
        host=found.forwards.host + launches * LAUNCH,
        device=found.forwards.device + seconds,
        kernels=found.forwards.kernels + launches,
    )
    left = found.digest - (forwards.seconds - found.forwards.seconds)
    return dataclasses.replace(found, forwards=forwards, digest=max(0.0, left))


def predict_gpt2(
    layers: int = 12, width: int = 768, n: int = 64, length: int = 512, *, ours: bool = False
) -> Predicted:
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

    with as_on_a_gpu(width, real.pending_bytes, ours=ours) as solving:
        return _predicted(
            f"GPT-2 {layers} x {width} in bf16, [{n}, {length}] tokens with padding, "
            f"{len(real.positions)} positions followed",
            rgfast.Probe(model, progress=False, route="moments", **options),
            width,
            solving,
            lambda run: run(batch),
            bare,
            ours=ours,
        )


def _predicted(
    name: str,
    opened: rgfast.Probe,
    width: int,
    solving: Counter[tuple[int, ...]],
    feed: Callable[[Callable[[Any], Any]], object],
    bare: Callable[[], object],
    *,
    ours: bool,
) -> Predicted:
    """A probe of what ``feed`` gives it, over ``bare``; ``solving`` counts the matrices solved."""
    with opened as probe:
        forwards = timed(lambda: feed(probe.run), width)
        solving.clear()
        reading = timed(probe.result, width)
    spectrum = sum(times * solved(*matrices, ours=ours) for matrices, times in solving.items())
    weights = sum(Clock(width).numel(x) * x.element_size() for x in probe.model.state_dict().values())
    digest = max(0.0, weights / TRANSFER - forwards.seconds)
    return Predicted(name, timed(bare, width), forwards, reading, spectrum, digest)


def padded(n: int, length: int) -> dict[str, Tensor]:
    """Tokens of which every sequence lacks up to half."""
    draw = torch.Generator().manual_seed(0)
    lacking = torch.randint(0, length // 2 + 1, (n, 1), generator=draw)
    keep = (torch.arange(length) < length - lacking).long()
    return {"input_ids": torch.randint(0, 30_000, (n, length), generator=draw), "attention_mask": keep}


def python(
    depth: int, length: int, n: int, rounds: int = 20, *, kernels: bool = False
) -> tuple[float, float]:
    """Seconds of one thread of this machine's CPU that reading a result takes, and making its dataset when it
    is asked for, at least: of operators of almost no size in place of a GPU's and without eigenvalues, so
    that it is what Python and the launches take, and a little more. With ``kernels`` by the package's, of
    whose launches what the driver takes is left out."""
    read, made = [], []

    def diagonal(a: Tensor) -> Tensor:
        return a.diagonal(dim1=-2, dim2=-1).sort(-1).values

    case = Case.make("default", depth, length, 2, n, "cpu")
    alone = launches_alone() if kernels else contextlib.nullcontext()
    # No rows are few where two features stand for two.
    with as_on_a_gpu(2 if kernels else 64), mock.patch.object(spectra, "eigenvalues", diagonal), alone:
        for _ in range(rounds):
            views = ("position", "pooled", "mean_pooled")
            with rgfast.Probe(case.model, progress=False, route="moments", views=views) as probe:
                probe.run(case.x)
            times = [time.process_time()]
            result = probe.result()
            times.append(time.process_time())
            assert result.dataset.sizes["layer"] == depth + 1
            times.append(time.process_time())
            read.append(times[1] - times[0])
            made.append(times[2] - times[1])
    return min(read), min(made)


def python_of_a_forward(
    depth: int, length: int, rounds: int = 40, *, kernels: bool = False
) -> tuple[float, float]:
    """Seconds of one thread of this machine's CPU that a probed forward takes, and a bare one, at least: of
    four sequences of two features, after two others and before rows are summed up."""
    probed, bare = [], []
    case = Case.make("default", depth, length, 2, 12, "cpu")
    *before, batch = case.x.split(4)
    with as_on_a_gpu(2 if kernels else 64):
        for _ in range(rounds):
            with rgfast.Probe(case.model, progress=False, route="moments") as probe:
                for each in before:
                    probe.run(each)
                begun = time.process_time()
                probe.run(batch)
                probed.append(time.process_time() - begun)
            with torch.no_grad():
                begun = time.process_time()
                last(case.model, batch)
                bare.append(time.process_time() - begun)
    return min(probed), min(bare)


def rows(shapes: int, *, kernels: bool, bf16: bool, gpt2: bool) -> Iterator[str]:
    """Of the tables, each with a headline."""
    head = ["(L, T, d, n)", "forward, ms", "forward, probed, ms", "reading, ms", "spectra, ms", "weights, ms"]
    head = [*head, "whole / forward", "wanted", "left out"]

    def table(of: str, predictions: Iterable[tuple[Callable[[], Predicted], float | None]]) -> Iterator[str]:
        yield f"\nPREDICTED, not run on a GPU: a whole probe on an H100, {of}\n"
        yield f"| {' | '.join(head)} |\n|{'---|' * len(head)}"
        for predicted, wanted in predictions:
            yield predicted().row(wanted)

    some = ON_A_GPU[:shapes]

    def each(call: Callable[..., Predicted], wanted: Sequence[float | None]) -> Any:
        return [(partial(call, *shape), aim) for shape, aim in zip(some, wanted, strict=False)]

    parts = {
        False: "library parts, torch >= 2.12",
        True: "the package's kernels, and the library beyond them",
    }
    for ours in (False, True)[: 1 + kernels]:
        yield from table(f"plain torch, fp32, {parts[ours]}", each(partial(predict, ours=ours), WANTED[ours]))
        if bf16:
            half = partial(predict, dtype=torch.bfloat16, ours=ours)
            yield from table(f"plain torch, bf16, {parts[ours]}", each(half, (None,) * 4 + (6.0,)))
        if gpt2:
            yield from table(parts[ours], [(partial(predict_gpt2, ours=ours), 1.6 if ours else 3.0)])
    if kernels:
        aims = (1.5, 1.0, 1.0, None, None)
        yield from table(f"ResidualStack, fp32, {parts[True]}", each(predict_own, aims))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", type=int, default=len(ON_A_GPU), help="how many of the five (default: all)"
    )
    parser.add_argument("--kernels", action="store_true", help="by the package's kernels too")
    parser.add_argument("--bf16", action="store_true", help="of stacks in bf16 too")
    parser.add_argument("--gpt2", action="store_true", help="GPT-2 too (needs transformers)")
    parser.add_argument(
        "--python", action="store_true", help="time Python, of the reading and of a forward, instead"
    )
    args = parser.parse_args()
    if args.python:
        print(
            "| (L, T, n) | reading, its Python and launches, ms on this machine's CPU | its dataset, later "
            "| a forward, probed | bare |"
        )
        print("|---|---|---|---|---|")
        torch.set_num_threads(1)
        for depth, length, _, n in ON_A_GPU[: args.shapes]:
            found = (
                *python(depth, length, n, kernels=args.kernels),
                *python_of_a_forward(depth, length, kernels=args.kernels),
            )
            cells = " | ".join(f"{1e3 * seconds:.1f}" for seconds in found)
            print(f"| {(depth, length, n)} | {cells} |", flush=True)
        return
    print_beside("measured on an H100", validation())
    for line in rows(args.shapes, kernels=args.kernels, bf16=args.bf16, gpt2=args.gpt2):
        print(line, flush=True)


if __name__ == "__main__":
    main()
