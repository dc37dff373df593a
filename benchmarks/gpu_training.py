"""What a step of training the quick preset is predicted to take on an H100, beside one core of this CPU.

    python benchmarks/gpu_training.py [--cpu STEPS]

No GPU is needed and none is used: figures of the GPU are PREDICTED. The step of `rgfast.training.train` runs
on the CPU, and each operator is given the time that its launch, bytes and products would take there. Launches
decide, since the preset's tensors are small. The Triton block has half of the preset's blocks at most; the
others mix positions. Left out is what Python does between operators. With ``--cpu`` a step is timed here on
one thread, and apart from it what the CPU does in any case: drawing the sequences.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import gpu_block
import torch
from gpu_clock import LEAST_KERNEL, Clock, Cost
from torch import Tensor

import rgfast.ops.residual_mlp.gpu as package
from rgfast import training
from rgfast.experiments.config import ReproduceConfig
from rgfast.experiments.runs import build_model
from rgfast.masking import corrupt
from rgfast.ops.device import LAUNCH
from rgfast.ops.residual_mlp.api import OP
from rgfast.training import seeded_generator

CONFIG = ReproduceConfig.preset("quick")
# Sequences, their targets, and the rows and columns of hidden positions.
TRANSFERS = 4


class Training:
    """The quick preset's first model, a batch at a time."""

    def __init__(self) -> None:
        config = CONFIG.training
        self.model, self.chain = build_model(CONFIG, 0), CONFIG.chain(CONFIG.chains[0], CONFIG.xi[-1])
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, weight_decay=0.0, fused=True
        )
        self.draws = {name: seeded_generator(0, name) for name in ("tokens", "masks", "corruption")}

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the model is shown, what is hidden, and the true tokens."""
        config, model = CONFIG.training, self.model
        tokens = self.chain.sample(config.batch, model.length, self.draws["tokens"])
        mask = config.draw_mask(config.batch, model.length, self.draws["masks"])
        replaced = config.replacement, self.draws["corruption"]
        return corrupt(tokens, mask, model.mask_token, model.states, *replaced), mask, tokens

    def step(self, shown: Tensor, mask: Tensor, tokens: Tensor) -> None:
        training._step(self.model, self.optimiser, shown, mask, tokens, CONFIG.training.clip)


class _Kernels:
    """Triton's kernels in name, for a block of rows and 64 columns: a launch adds up its time."""

    def __init__(self, clock: Clock, rows: int) -> None:
        self.clock, self.rows = clock, rows

    def __getattr__(self, name: str) -> Any:
        way = {"block": "forward", "gradient": "backward"}.get(name)
        more = {"backward": True, "factors": True} if way == "backward" else {}
        seconds = LEAST_KERNEL if way is None else gpu_block.ours(way, "split", 64, self.rows, **more).seconds

        def launch(*args: Any, **constants: Any) -> None:
            self.clock.cost.host += LAUNCH
            self.clock.cost.device += seconds
            self.clock.cost.kernels += 1

        class Grid:
            def __getitem__(self, grid: Any) -> Any:
                return launch

        return Grid()


@contextmanager
def _only(*implementations: Any) -> Any:
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(OP, "impls", {each.name: each for each in implementations}))
        stack.enter_context(mock.patch.object(OP, "_chosen", {}))
        yield stack


def predicted(*, ours: bool) -> Cost:
    """Of a step, without drawing its batch: by eager PyTorch, or with our blocks where they can be."""
    state = Training()
    batches = [state.batch() for _ in range(2)]
    reference = OP.impls["reference"]
    triton = dataclasses.replace(
        OP.impls["triton"],
        devices=("cpu",),
        can_run=lambda call: "it does not mix positions" if call.mixes else None,
        cost=lambda call: 0.0,
        missing=lambda: None,
        by_name_only=lambda call: None,
        unproven=lambda call: None,
    )
    with _only(*([triton] if ours else []), reference) as stack:
        clock = Clock()
        rows = CONFIG.training.batch * CONFIG.length
        for name in ("forward", "backward") if ours else ():
            stack.enter_context(mock.patch.object(package, name, _Kernels(clock, rows), create=True))
        with Clock():  # the first step makes the optimizer's state
            state.step(*batches[0])
        clock.cost = Cost()
        with clock:
            state.step(*batches[1])
    clock.cost.host += TRANSFERS * LAUNCH
    return clock.cost


def table() -> str:
    """Both, in milliseconds."""
    lines = ["| blocks | launches | host, ms | device, ms | a step's, ms |", "|---|---|---|---|---|"]
    for name, ours in (("eager PyTorch", False), ("the Triton block where it can be", True)):
        cost = predicted(ours=ours)
        cells = [name, str(cost.kernels), *(f"{1e3 * each:.2f}" for each in (cost.host, cost.device))]
        lines.append(f"| {' | '.join([*cells, f'{1e3 * cost.seconds:.2f}'])} |")
    return "\n".join(lines)


def timed_here(steps: int) -> tuple[float, float]:
    """Median seconds of one thread for drawing a batch, and for the rest of a step."""
    torch.set_num_threads(1)
    state = Training()
    drawing, stepping = [], []
    for at in range(steps + 5):
        times = [time.process_time()]
        batch = state.batch()
        times.append(time.process_time())
        state.step(*batch)
        times.append(time.process_time())
        if at >= 5:
            drawing.append(times[1] - times[0])
            stepping.append(times[2] - times[1])
    return statistics.median(drawing), statistics.median(stepping)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", type=int, default=0, metavar="STEPS", help="time so many steps here")
    steps = parser.parse_args().cpu
    print("PREDICTED, not run on a GPU: a step of training the quick preset, without drawing its batch\n")
    print(table())
    if steps:
        drawing, rest = timed_here(steps)
        print(f"\nMeasured here on one thread: drawing {1e3 * drawing:.2f} ms, the rest {1e3 * rest:.2f} ms")


if __name__ == "__main__":
    main()
