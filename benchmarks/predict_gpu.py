"""What a whole probe is predicted to cost on an H100, over the bare forward of the same model.

    python benchmarks/predict_gpu.py [--shapes 5]

No GPU is needed and none is used: every figure of a probe here is PREDICTED. The code that runs on a GPU is
run on stand-ins of its tensors, operator by operator, and each operator is given the time that its bytes,
products and launch take by rates measured on an H100. First the same model of time is held against what was
measured there. Rows that are off by more than a quarter are marked.

A probe's stand-in has the depth, positions and sequences of the real one and a width of 37. Wherever a size
is a multiple of 37, 38 or 39, it stands for that multiple of the real width, or of one or two columns more.

Left out, and named: operators without a model of their time. Left out: what Python does between operators.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rgfast
from rgfast.bench.probe import ON_A_GPU, Case, last
from rgfast.dispatch import Op
from rgfast.ops.cka.api import OP as CKA
from rgfast.ops.device import LAUNCH, STREAM, WAIT
from rgfast.ops.moments.api import OP as MOMENTS
from rgfast.ops.moments.api import PAIRS, POSITIONS
from rgfast.ops.moments.call import Products
from rgfast.ops.moments.impl import library as products
from rgfast.ops.spectrum.impl import library as spectra
from rgfast.ops.spectrum.selection import EIGVALSH, GRAM, SPECTRUM
from rgfast.runtime import waiting

STAND_IN = 37
# Measured on an H100: fp32 products (SIMT), fp64 ones by the width of a tile, passes over memory that compute
# something, and the rows of a LayerNorm, which gets a thread block each (eager block at D = 64 and 128).
FP32, FP64, PASS, NORM = 51e12, {16: 28e12, 64: 28.4e12, 128: 55.2e12, 256: 60.4e12}, 2.5e12, 1.3e-9
# One thread block's step through the terms of a product, of the inner products of 7 kernels by samples.
STEP = 7e-9
# A view has no kernel, but the host makes it. Assumed.
VIEW, LEAST_KERNEL = 1e-6, 2e-6
GPU = torch.device("cuda")
VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "slice",
        "select",
        "transpose",
        "t",
        "permute",
        "unsqueeze",
        "squeeze",
        "expand",
    ),
    *(
        "detach",
        "alias",
        "diagonal",
        "as_strided",
        "split",
        "split_with_sizes",
        "unbind",
        "empty",
        "new_empty",
    ),
    *("empty_like", "empty_strided", "lift_fresh", "promote_types", "result_type", "reshape", "unfold"),
    *("_reshape_alias", "is_same_size", "sym_size", "_conj", "resolve_conj"),
}
READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}
MULTIPLY = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "baddbmm_": 1, "addmm_": 1}
UNKNOWN = {
    "geqrf",
    "linalg_qr",
    "_linalg_svd",
    "linalg_svd",
    "ormqr",
    "linalg_householder_product",
}


@dataclass
class Cost:
    """Seconds of the host and of the device, and what was not counted."""

    host: float = 0.0
    device: float = 0.0
    waits: int = 0
    kernels: int = 0
    unknown: Counter[str] = field(default_factory=Counter)

    @property
    def seconds(self) -> float:
        """The host queues ahead until it has to wait."""
        return max(self.host, self.device) + self.waits * WAIT


class Clock(TorchDispatchMode):
    """Adds up what the operators inside would cost, their stand-in sizes read as ``width``."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self.width, self.cost = width, Cost()

    def size(self, n: int) -> int:
        """What a size of a stand-in stands for."""
        if self.width is None or n < STAND_IN:
            return n
        for extra in (0, 2, 1):
            if n % (STAND_IN + extra) == 0:
                return n // (STAND_IN + extra) * (self.width + extra)
        return n

    def numel(self, x: Tensor) -> float:
        """Elements in memory: a dimension of stride 0 has one."""
        count = 1.0
        for n, stride in zip(x.shape, x.stride(), strict=True):
            count *= self.size(n) if stride or n <= 1 else 1
        return count

    def bytes(self, tensors: Any) -> float:
        """Of all tensors in a tree; what is given twice is read once."""
        found: dict[Any, float] = {}
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor):
                key = x.untyped_storage()._cdata, x.storage_offset()
                found[key] = max(found.get(key, 0.0), self.numel(x) * x.element_size())
        return sum(found.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        found = function(*args, **(kwargs or {}))
        cost = self.cost
        if name in READS:
            cost.waits += 1
        elif name in UNKNOWN:
            cost.unknown[name] += 1
        elif name in VIEWS or name == "_linalg_eigh":  # spectra have a model of their own
            cost.host += VIEW
        else:
            cost.host += LAUNCH
            cost.kernels += 1
            cost.device += max(LEAST_KERNEL, self.kernel(name, args, kwargs or {}, found))
        return found

    def kernel(self, name: str, args: Any, kwargs: Any, found: Any) -> float:
        """Seconds of one operator on the device."""
        moved = self.bytes((args, kwargs))
        if kwargs.get("out") is None:
            moved += self.bytes(found)
        if name == "native_layer_norm":
            return max(moved / PASS, self.numel(args[0]) / self.size(args[0].shape[-1]) * NORM)
        if name not in MULTIPLY:
            return moved / PASS
        left, right = args[MULTIPLY[name] : MULTIPLY[name] + 2]
        *batch, m, k = (self.size(n) for n in left.shape)
        n = self.size(right.shape[-1])
        count = batch[0] if batch else 1
        if left.dtype != torch.float64:
            return 2.0 * count * m * n * k / FP32 + moved / STREAM
        m, n = _padded(m), _padded(n)
        return max(2.0 * count * m * n * k / _rate(min(m, n)), moved / STREAM, k * STEP)


def _padded(n: int) -> int:
    """To whole tiles."""
    return 16 if n <= 16 else 32 if n <= 32 else -(-n // 64) * 64


def _rate(width: int) -> float:
    return FP64[max(size for size in FP64 if size <= max(width, 16))]


def timed(call: Callable[[], Any], width: int | None = None) -> Cost:
    """What ``call`` costs."""
    with Clock(width) as clock, torch.no_grad():
        call()
    return clock.cost


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


FORWARDS = {(6, 64, 64, 1024): 1.887, (12, 32, 128, 1024): 4.184, (24, 16, 256, 1024): 11.37}
FORWARDS |= {(24, 16, 512, 2048): 75.25, (48, 4, 1024, 4096): 280.4, (24, 2, 4096, 4096): 1092.0}
WIDENED = {(448, 1024, 64): 0.1443, (416, 1024, 128): 0.2615, (400, 1024, 256): 0.5006}
MULTIPLIED = {(448, 1024, 64): 0.1323, (416, 1024, 128): 0.2531, (400, 1024, 256): 0.8892}
MULTIPLIED |= {(104, 4096, 1024): 14.73, (24, 4096, 4096): 59.19}
CENTERED = {(7, 64, 1024, 64): 0.3979, (13, 32, 1024, 128): 0.72, (25, 16, 1024, 256): 1.37}
CENTERED |= {(49, 16, 1024, 256): 2.6956}
BY_FEATURES = {(7, 64, 1024, 64): 0.5046, (13, 32, 1024, 128): 3.277, (25, 16, 1024, 256): 24.92}
NEIGHBORS = {(49, 16, 1024, 256): 4.307}
BY_SAMPLES = {(13, 32, 1024, 128): 7.290, (25, 16, 1024, 256): 6.708}
# Moments and neighbors on top of the forward, as shares of it in all; then spectra on top of that.
WITH_MOMENTS, SPECTRA = (1.54, 1.39, 1.37, 1.36, 1.29), (0.7, 1.1, 2.9, 2.0, 1.9)
# Microseconds of a matrix at a batch that the model of eigenvalues was not made from.
EIGENVALUES = {(2048, 16): 0.2589, (2048, 64): 2.538, (2048, 100): 7.407, (2048, 128): 9.78}
EIGENVALUES |= {(2048, 200): 45.29, (2048, 256): 63.64}


def forward(depth: int, length: int, width: int, n: int) -> Cost:
    """Of a plain residual stack in fp32."""
    up, down = meta(4 * width, width), meta(width, 4 * width)
    norm, bias, high = meta(width), meta(width), meta(4 * width)

    def run() -> None:
        x = meta(n * length, width)
        for _ in range(depth):
            x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (width,), norm, bias), up, high)), down, bias)

    return timed(run)


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
    double, rows = torch.float64, []
    for shape, ms in FORWARDS.items():
        rows.append(Row(f"forward fp32 {shape}", ms, 1e3 * forward(*shape).seconds))
    for shape, ms in WIDENED.items():
        rows.append(Row(f"widen {shape}", ms, 1e3 * timed(lambda s=shape: meta(*s).double()).seconds))
    for shape, ms in MULTIPLIED.items():
        z = meta(*shape, dtype=double)
        rows.append(Row(f"bmm fp64 {shape}", ms, 1e3 * timed(lambda z=z: torch.bmm(z.mT, z)).seconds))
    for shape, ms in CENTERED.items():
        rows.append(
            Row(f"center in fp64 {shape}", ms, 1e3 * timed(lambda s=shape: _center(meta(*s))).seconds)
        )
    kinds: tuple[tuple[str, Any, Callable[..., None]], ...] = (
        ("CKA by features", BY_FEATURES, _by_features),
        ("CKA of neighbors by features", NEIGHBORS, _neighbors_by_features),
        ("CKA by samples", BY_SAMPLES, _by_samples),
    )
    for kind, table, call in kinds:
        for shape, ms in table.items():
            rows.append(Row(f"{kind} {shape}", ms, 1e3 * timed(lambda c=call, s=shape: c(*s)).seconds))
    for (batch, d), each in EIGENVALUES.items():
        rows.append(Row(f"eigenvalues, {batch} of d={d}, us each", each, 1e6 * solved(batch, d) / batch))
    for (depth, length, width, n), total, more in zip(ON_A_GPU, WITH_MOMENTS, SPECTRA, strict=True):
        bare, at = forward(depth, length, width, n).seconds, f"{(depth, length, width, n)}, over forward"
        added = _moments(depth + 1, length, n, width)
        rows.append(Row(f"forward, moments, neighbors {at}", total, 1 + added / bare))
        rows.append(Row(f"spectra on top {at}", more, solved((depth + 1) * length, width) / bare))
    return rows


def solved(count: int, d: int) -> float:
    """Seconds of the eigenvalues of so many matrices where torch has batches."""
    with _torch_with_batches():
        return spectra.solving(count, d, torch.float64, GPU)


@contextlib.contextmanager
def _torch_with_batches() -> Iterator[None]:
    before = torch.__version__
    torch.__version__ = "2.13.0"
    try:
        yield
    finally:
        torch.__version__ = before


@contextlib.contextmanager
def as_on_a_gpu(width: int) -> Iterator[Counter[int]]:
    """The library's implementations are all there are, no forward looks at values, and products are cut as
    they would be at their real ``width``. Yields how often batches of a size were solved."""
    counted: Counter[int] = Counter()
    ops: tuple[Op, ...] = (MOMENTS, PAIRS, POSITIONS, EIGVALSH, GRAM, SPECTRUM, CKA)
    before = [(op, op.impls) for op in ops]
    held = (
        waiting._EVERYWHERE,
        products._APART,
        products._add,
        products.positions_at_once,
        spectra.eigenvalues,
    )
    original, cut = spectra.eigenvalues, products.positions_at_once

    def eigenvalues(a: Tensor) -> Tensor:
        counted[a.shape[:-2].numel()] += 1
        return original(a)

    def at_once(call: Products) -> int:
        rows = [meta(*x.shape[:2], width, dtype=x.dtype) for x in call.rows]
        return cut(call._replace(rows=rows))

    try:
        for op in ops:
            library = dataclasses.replace(
                op.impls["library"], by_name_only=lambda call: None, cost=lambda call: 0.0
            )
            op.impls = {"library": library, "reference": op.impls["reference"]}
            op._chosen.clear()
        waiting._EVERYWHERE = True
        products._APART = 0 if width >= products._APART else 1 << 30
        products._add = lambda total, left, right, here: held[2](total, left, right, False)
        products.positions_at_once = at_once
        spectra.eigenvalues = eigenvalues
        yield counted
    finally:
        (
            waiting._EVERYWHERE,
            products._APART,
            products._add,
            products.positions_at_once,
            spectra.eigenvalues,
        ) = held
        for op, impls in before:
            op.impls = impls
            op._chosen.clear()


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
