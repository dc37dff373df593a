"""What `rgfast plan` predicts in seconds beside what ranks on this machine take: rates are fitted to some
shapes, and held against others.

    python benchmarks/plan_seconds.py [--rounds 3]

Every rank is a process with one thread, and takes part by gloo. Seconds are of the processor, in the rank
that spends most, so that other work on the machine hardly counts; waiting for other ranks is none of it. Of
several rounds the fewest count. The ratio is predicted over measured.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import rgfast

_BATCH = 256  # sequences of a forward, at most this many tokens


@dataclass(frozen=True)
class Shape:
    """A probe: ``tokens`` are those of all ranks."""

    layers: int
    width: int
    tokens: int
    length: int
    ranks: int = 1
    options: dict[str, Any] = field(default_factory=lambda: {"views": ["pooled"]})

    def __str__(self) -> str:
        more = ", ".join(f"{name}={value}" for name, value in self.options.items())
        tokens = f"{self.tokens} tokens in {self.length}s"
        return f"{self.layers} x {self.width}, {tokens}, {self.ranks} ranks, {more}"


SHARED = {"views": ["pooled"], "owner": "layers"}
POSITIONS = {"views": ["position", "pooled"]}
FITTED = [
    Shape(5, 192, 16384, 8),
    Shape(4, 320, 12288, 4),
    Shape(3, 512, 8192, 8),
    Shape(5, 320, 12288, 8, 2),
    Shape(4, 512, 6144, 8, 2),
]
OTHERS = [
    Shape(6, 256, 16384, 8),
    Shape(3, 448, 12288, 4),
    Shape(4, 576, 6144, 16),
    Shape(4, 288, 6144, 4, options=POSITIONS),
    Shape(6, 288, 16384, 8, 2),
    Shape(5, 416, 12288, 4, 2),
    Shape(4, 352, 6144, 4, 2, POSITIONS),
    Shape(9, 352, 8192, 8, 2, SHARED),
    Shape(6, 320, 16384, 8, 4),
    Shape(10, 384, 12288, 8, 4, SHARED),
]


class Block(nn.Module):
    """As many parameters as the plan assumes: 12 times the width squared."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 6 * width, bias=False), nn.Linear(6 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(shape.width) for _ in range(shape.layers - 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def of_rank(shape: Shape, rank: int) -> dict[str, float]:
    """Seconds of the processor that one rank takes, by kind."""
    model = Model(shape)
    sequences = shape.tokens // shape.length // shape.ranks
    x = torch.randn(
        sequences, shape.length, shape.width, generator=torch.Generator().manual_seed(rank)
    ).split(_BATCH)
    layers = ["blocks.0:input", *(f"blocks.{k}" for k in range(shape.layers - 1))]
    asked: Any = {"layers": layers, "refine": False, "route": "moments", "progress": False, **shape.options}
    with torch.no_grad():
        model(x[0])
        start = time.process_time()
        for part in x:
            model(part)
        bare = time.process_time() - start
        if shape.ranks > 1:
            dist.barrier()
        start = time.process_time()
        with rgfast.Probe(model, **asked) as p:
            for part in x:
                model(part)
        watched = time.process_time()
        p.result()
    return {"forward": bare, "moments": watched - start - bare, "result": time.process_time() - watched}


def measured(shape: Shape, rounds: int) -> dict[str, float]:
    """The seconds of the rank that takes most, of every kind the fewest of several rounds."""
    found = [_of_ranks(shape) for _ in range(rounds)]
    return {kind: min(one[kind] for one in found) for kind in found[0]}


def _of_ranks(shape: Shape) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(shape.ranks):
            if (pid := os.fork()) == 0:
                _child(shape, rank, folder)
            children.append(pid)
        statuses = [os.waitpid(pid, 0)[1] for pid in children]
        if any(statuses):
            raise RuntimeError(f"a rank of {shape} failed")
        found = [torch.load(f"{folder}/{rank}") for rank in range(shape.ranks)]
    busiest: dict[str, float] = max(found, key=lambda one: sum(one.values()))
    return busiest


def _child(shape: Shape, rank: int, folder: str) -> None:
    status = 1
    try:
        if shape.ranks > 1:
            dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=shape.ranks)
        torch.save(of_rank(shape, rank), f"{folder}/{rank}")
        status = 0
    finally:
        os._exit(status)


def planned(shape: Shape, rates: dict[str, float]) -> Any:
    """The option of the plan that this is."""
    options = {name: value for name, value in shape.options.items() if name != "owner"}
    plan = rgfast.plan_cluster(
        layers=shape.layers,
        width=shape.width,
        tokens=shape.tokens,
        ranks=shape.ranks,
        length=shape.length,
        batch=_BATCH * shape.length,
        activation_bytes=4,
        device="cpu",
        refine=False,
        rates=rates,
        **options,
    )
    return next(one for one in plan.options if ("owner" in one.call) == ("owner" in shape.options))


def predicted(shape: Shape, rates: dict[str, float]) -> tuple[float, float]:
    """Seconds of the forward, and of all else."""
    found = planned(shape, rates)
    return found.seconds["forward"], found.total_seconds - found.seconds["forward"]


def fitted(rounds: int) -> dict[str, float]:
    """Rates by which the seconds of all fitted shapes of a kind add up to those that were measured."""
    one = {"forward": 1.0, "products": 1.0, "eigenvalues": 1.0, "network": 1.0, "copies": copies()}
    found = [(shape, measured(shape, rounds)) for shape in FITTED]
    alone = [(shape, seconds) for shape, seconds in found if shape.ranks == 1]
    several = [(shape, seconds) for shape, seconds in found if shape.ranks > 1]

    def rate(kind: str, by: str, of: list[tuple[Shape, dict[str, float]]]) -> float:
        """Work per second: units of rate 1 over seconds."""
        return sum(planned(s, one).seconds[by] for s, _ in of) / sum(seconds[kind] for _, seconds in of)

    rates = {
        "forward": rate("forward", "forward", alone),
        "products": rate("moments", "moments", alone),
        "eigenvalues": rate("result", "spectra", alone),
        "copies": one["copies"],
    }
    # Of several ranks the rest of reading a result is what moves between them.
    work = sum(planned(shape, one).seconds["network"] for shape, _ in several)
    spectra = sum(planned(shape, rates).seconds["spectra"] for shape, _ in several)
    rest = sum(seconds["result"] for _, seconds in several) - spectra
    return {**rates, "network": work / max(rest, 1e-9)}


def copies() -> float:
    """Bytes that are read or written per second of the processor."""
    x, y = torch.ones(1 << 24), torch.empty(1 << 24)
    y.copy_(x)
    start = time.process_time()
    for _ in range(8):
        y.copy_(x)
    return 8 * 2 * x.nbytes / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    prepare()
    rates = fitted(args.rounds)
    print("rates per second:", ", ".join(f"{name} {value:.3g}" for name, value in rates.items()))
    print("\n| shape | predicted | measured | ratio | of the forward | of the rest |")
    print("|---|---|---|---|---|---|")
    ratios = []
    for shape in OTHERS:
        seconds, (forward, rest) = measured(shape, args.rounds), predicted(shape, rates)
        took = sum(seconds.values())
        ratios.append((forward + rest) / took)
        parts = f"{forward / seconds['forward']:.2f} | {rest / (took - seconds['forward']):.2f}"
        print(f"| {shape} | {forward + rest:.3f} s | {took:.3f} s | {ratios[-1]:.2f} | {parts} |", flush=True)
    within = sum(0.75 <= ratio <= 1.25 for ratio in ratios)
    middle = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(
        f"\n{within} of {len(ratios)} shapes that nothing was fitted to are within 25%; ratios from "
        f"{min(ratios):.2f} to {max(ratios):.2f}, {middle:.2f} in the geometric mean"
    )


def prepare() -> None:
    """One thread, and everything imported and warm before processes are forked."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0  # a thread, and forking is safe with one only
    of_rank(Shape(3, 16, 256, 4), 0)


if __name__ == "__main__":
    main()
