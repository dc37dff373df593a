"""A whole probe against the bare forward: `bench_probe.py [--cases NAME ...] [--seconds S] [--shares]`.

n = 1,024 sequences, all measures at every position, fp32 models. The denominator is a bare PyTorch eager
forward of the same weights that measures nothing. Every case runs in a fresh process, once under the default
allocator and once with glibc's held to its heap, which spares eager PyTorch its page faults; forward and
probe take turns, and figures are ratios of medians, the quartiles of the turn-by-turn ratio in brackets.
Values are checked against fp64 brute force on stored activations in the same process before anything is
timed; one that is wrong ends the run. Memory is what a process took at its peak beyond model and input: of
the forward, of the probe, and of hooks that store every layer's output.

    none       our stack without mixing, debiased CKA of all pairs of layers
    collapsed  the same, of layers that are of rank one but for noise
    groups     the same with a jackknife over 8 groups
    mixer      our stack with mixing across positions, all pairs
    foreign    a plain torch module of the same blocks, pairs of neighbours: the time added to its own forward
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import pstats
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rgfast
from rgfast.bench.probe import SHAPES, stack, states

PINNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
CASES = ("none", "collapsed", "groups", "mixer", "foreign")
SAMPLES = 1024


class Plain(nn.Module):
    """The blocks of a stack as anyone would write them."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        mlp = block.mlp
        self.norm = nn.LayerNorm(mlp.w1.shape[1])
        self.up, self.down = (nn.Linear(w.shape[1], w.shape[0]) for w in (mlp.w1, mlp.w2))
        with torch.no_grad():
            for linear, weight, bias in ((self.up, mlp.w1, mlp.b1), (self.down, mlp.w2, mlp.b2)):
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def mixed(model: Any, x: Tensor) -> Iterator[Tensor]:
    """The stream of a mixer stack by eager PyTorch on its weights."""
    yield x
    for block in model.blocks:
        for mlp, across in ((block.mix, True), (block.mlp, False)):
            z = F.layer_norm(x, x.shape[-1:], mlp.norm.weight, mlp.norm.bias, 1e-5)
            z = z.transpose(-1, -2) if across else z
            z = F.linear(F.gelu(F.linear(z, mlp.w1, mlp.b1)), mlp.w2, mlp.b2)
            x = x + (z.transpose(-1, -2) if across else z)
        yield x


def build(
    case: str, depth: int, length: int, width: int
) -> tuple[nn.Module, Tensor, Callable[..., Any], dict]:
    """The model, its input, its stream by eager PyTorch, and the options of the probe."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, length, width, generator=generator)
    options: dict[str, Any] = {"views": ["position"], "progress": False, "pairs": "all"}
    if case == "mixer":
        torch.manual_seed(0)
        mixer = rgfast.ResidualStack(width, depth, mixing="mixer", length=length, w2_scale=0.5).eval()
        return mixer, x, mixed, options
    model = stack(depth, length, width, "cpu", collapsed=case == "collapsed")
    if case == "groups":
        options["groups"] = 8
    if case == "foreign":
        options |= {"pairs": "adjacent"}
        plain = nn.Sequential(*(Plain(block) for block in model.blocks)).eval()
        return plain, x, lambda module, x: _layers(module, x), options
    return model, x, states, options


def _layers(module: nn.Sequential, x: Tensor) -> Iterator[Tensor]:
    yield x
    for block in module:
        x = block(x)
        yield x


def last(stream: Callable[..., Any], model: nn.Module, x: Tensor) -> Tensor:
    y = x
    with torch.no_grad():
        for layer in stream(model, x):
            y = layer
    return y


def seen(model: nn.Module, x: Tensor, stream: Callable[..., Any]) -> Iterator[Tensor]:
    """What the probe sees: of our stacks the stream of the compiled forward."""
    with torch.no_grad():
        if not isinstance(model, rgfast.ResidualStack):
            yield from stream(model, x)
            return
        kept: list[Tensor] = []
        handle = model.stream_tiles(lambda first, states: kept.extend(states.clone()), len(x))
        model(x)
        handle.remove()
        yield from kept


def gate(model: nn.Module, x: Tensor, stream: Callable[..., Any], options: dict[str, Any]) -> None:
    """End the run unless ranks and CKA at three positions are those of fp64 brute force."""
    found = rgfast.probe(model, x, **options).dataset
    stored = list(seen(model, x, stream))
    for t in {0, x.shape[1] // 2, x.shape[1] - 1}:
        units = []
        for layer, y in enumerate(stored):
            rows = y[:, t].double()
            rows = rows - rows.mean(0)
            sigma = torch.linalg.svdvals(rows)
            p = sigma / sigma.sum()
            want, got = float(torch.special.entr(p).sum().exp()), float(found.effective_rank[0, layer, t])
            if not abs(got - want) <= 1e-6 * want:
                sys.exit(f"effective rank {got} of layer {layer} at {t} should be {want}; nothing was timed")
            k = rows @ rows.T
            k.fill_diagonal_(0.0)
            n, sums = len(k), k.sum(1)
            k = k - (sums[:, None] + sums) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
            k = k.fill_diagonal_(0.0).reshape(-1)
            units.append(k / k.norm())
        for i, a in enumerate(units):
            for j, b in enumerate(units):
                got = float(found.cka[0, i, j, t])
                if (options["pairs"] == "all" or abs(i - j) < 2) and not abs(got - float(a @ b)) <= 1e-6:
                    sys.exit(
                        f"CKA {got} of layers {i}, {j} at {t} should be {float(a @ b)}; nothing was timed"
                    )


def turns(candidates: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    for run in candidates.values():
        run()
    spent: dict[str, list[float]] = {name: [] for name in candidates}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(spent["eager"]) < 5:
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            spent[name].append(time.perf_counter() - start)
    return spent


def timed(case: str, shape: tuple[int, int, int], seconds: float) -> list[float]:
    """Probe over eager forward: ratio of medians, quartiles of the turn-by-turn ratio."""
    model, x, stream, options = build(case, *shape)
    gate(model, x, stream, options)
    eager = (lambda: last(stream, model, x)) if case != "foreign" else (lambda: model(x))
    with torch.no_grad():
        spent = turns({"eager": eager, "probe": lambda: rgfast.probe(model, x, **options)}, seconds)
    each = sorted(a / b for a, b in zip(spent["probe"], spent["eager"], strict=True))
    low, _, high = statistics.quantiles(each, n=4)
    return [statistics.median(spent["probe"]) / statistics.median(spent["eager"]), low, high]


def memory(case: str, shape: tuple[int, int, int], what: str) -> float:
    """MiB at the peak of one forward, one probe, or one forward that stores its stream."""
    model, x, stream, options = build(case, *shape)
    rgfast.probe(stack(2, 3, 4, "cpu"), x[:16, :3, :4], progress=False)  # imports all that a probe needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if what == "probe":
        rgfast.probe(model, x, **options)
    elif what == "hooks":
        with torch.no_grad():
            kept = list(stream(model, x))
        assert len(kept) == shape[0] + 1
    else:
        last(stream, model, x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


# What a probe spends its time in, by the function whose own time counts.
PARTS = {
    "forward": ("residual_stack_forward", "residual_stack_pack", "residual_mlp_forward"),
    "CKA of all pairs": ("cka_products",),
    "second moments and eigenvalues": ("moments", "left_out_moments", "eigvalsh", "eigvalsh_plain"),
    "copies": ("copy_", "cat", "clone"),
}


def shares(case: str, shape: tuple[int, int, int]) -> dict[str, float]:
    """The parts of one probe in per cent of its time, by a profile (all of these are long calls)."""
    model, x, _, options = build(case, *shape)
    rgfast.probe(model, x, **options)
    profile = cProfile.Profile()
    profile.enable()
    rgfast.probe(model, x, **options)
    profile.disable()
    spent, total = dict.fromkeys(PARTS, 0.0), 0.0
    for (_, _, function), (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        total += own
        name = function.rpartition(".")[2].rstrip(">").partition("'")[0] or function
        for part, names in PARTS.items():
            if any(f".{n}>" in function or f"'{n}'" in function for n in names) or name in names:
                spent[part] += own
    return {part: 100 * value / total for part, value in spent.items()} | {
        "rest": 100 * (1 - sum(spent.values()) / total)
    }


def worker(arguments: list[str], threads: int, pinned: bool) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, "--threads", str(threads), "--worker", *arguments],
        env=os.environ | (PINNED if pinned else {}),
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def told(ratio: list[float]) -> str:
    return f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--shapes", nargs="+", type=int, choices=range(len(SHAPES)), default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=10.0, help="per case and allocator")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shares", action="store_true", help="where the time goes, instead")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        task, case, number, *rest = options.worker
        shape = SHAPES[int(number)]
        found: Any
        if task == "time":
            found = timed(case, shape, float(rest[0]))
        else:
            found = memory(case, shape, rest[0]) if task == "memory" else shares(case, shape)
        print(json.dumps(found))
        return
    if options.shares:
        print("| case | L, T, d | where the time of a probe goes |\n|---|---|---|")
        for case in options.cases:
            for number in options.shapes:
                parts = worker(["shares", case, str(number)], options.threads, False)
                text = ", ".join(f"{part} {value:.0f}%" for part, value in parts.items())
                print(f"| {case} | {', '.join(str(k) for k in SHAPES[number])} | {text} |", flush=True)
        return
    print(
        f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, ISA "
        f"{rgfast.native.active_isa()}, n = {SAMPLES}, fp32 models, probe over bare eager forward\n"
    )
    print("| case | L, T, d | default malloc | pinned malloc | peak MiB: forward / probe / storing hooks |")
    print("|---|---|---|---|---|")
    for case in options.cases:
        for number in options.shapes:
            ratios = [
                worker(["time", case, str(number), str(options.seconds)], options.threads, pinned)
                for pinned in (False, True)
            ]
            peaks = [
                worker(["memory", case, str(number), what], options.threads, False)
                for what in ("forward", "probe", "hooks")
            ]
            shape = ", ".join(str(k) for k in SHAPES[number])
            print(
                f"| {case} | {shape} | {told(ratios[0])} | {told(ratios[1])} "
                f"| {' / '.join(f'{peak:.0f}' for peak in peaks)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
