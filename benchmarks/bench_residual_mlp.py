"""The residual block against eager PyTorch, torch.compile and its two bare products.

    bench_residual_mlp.py [--widths 64 128 ...] [--rows N] [--threads N] [--seconds S] [--out FILE]

H = 4 D, LayerNorm, exact GELU, fp32, rows * D about 2^21 unless given. Every width runs in a fresh process,
once under the default allocator and once with glibc's held to its heap (MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_, which spares eager PyTorch its page faults); the candidates take turns, and figures
are ratios of medians, the quartiles of the turn-by-turn ratio in brackets. "bare" is the two products alone,
by torch.mm(out=); "route" is which implementation took the forward pass, and which the one with gradients.
Results are checked against fp64 first, and a wrong one ends the run. Where torch.compile fails it is left
out, and the reason told. The table is Markdown; all of it takes about five minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import rgfast
from rgfast import native
from rgfast.bench import residual_mlp as block
from rgfast.bench.timing import WrongResult, hold, turns

PINNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
# share of the bare products, forward over eager, over torch.compile, forward + backward over eager
TARGETS = {
    64: (0.80, 3.0, 1.8, 1.6),
    128: (0.90, 2.0, 1.5, 1.3),
    256: (1.0, 1.5, 1.4, 1.25),
    512: (1.05, 1.1, 1.1, 1.1),
    1024: (1.05, 1.05, 1.0, 1.0),
    2048: (1.05, 1.05, 1.0, 1.0),
    4096: (1.05, 1.05, 1.0, 1.0),
}


def ratio(spent: dict[str, list[float]], over: str, under: str) -> tuple[float, float, float]:
    """Median over median, with the quartiles of the turn-by-turn ratios."""
    each = sorted(a / b for a, b in zip(spent[over], spent[under], strict=True))
    low, _, high = statistics.quantiles(each, n=4)
    return statistics.median(spent[over]) / statistics.median(spent[under]), low, high


def measure(d: int, rows: int, seconds: float, with_compile: bool) -> dict[str, tuple[float, float, float]]:
    tensors = block.leaves(rows, d)
    hold(block.check(tensors))
    candidates: dict[str, Callable[[], object]] = {
        "ours": lambda: block.ours(*tensors),
        "eager": lambda: block.eager(*tensors),
        "bare": block.bare(tensors),
    }
    if with_compile:
        try:
            graph = block.compiled(tensors)
        except RuntimeError as error:
            print(f"torch.compile skipped at D={d}: {error}", file=sys.stderr)
        else:
            candidates["compile"] = lambda: graph(*tensors)
    with torch.no_grad():
        spent = turns(candidates, seconds, least=5)
    found = {"share of bare": ratio(spent, "ours", "bare"), "over eager": ratio(spent, "eager", "ours")}
    if "compile" in spent:
        found["over compile"] = ratio(spent, "compile", "ours")
    steps = {"ours": block.step(block.ours, tensors), "eager": block.step(block.eager, tensors)}
    found["forward+backward over eager"] = ratio(turns(steps, seconds, least=5), "eager", "ours")
    return found


def route(d: int, rows: int, recorded: bool) -> str:
    """The implementation that ``auto`` takes."""
    w1, w2 = torch.empty(4 * d, d, requires_grad=recorded), torch.empty(d, 4 * d)
    return str(rgfast.explain("residual_mlp", torch.empty(rows, d), w1, None, w2, None).chosen)


def in_fresh_process(d: int, args: argparse.Namespace, pinned: bool) -> dict[str, tuple[float, float, float]]:
    command = [sys.executable, __file__, "--one", str(d), "--seconds", str(args.seconds)]
    command += ["--threads", str(args.threads), "--rows", str(args.rows or 0)]
    if pinned or args.no_compile:
        command.append("--no-compile")
    environment = {**os.environ, **(PINNED if pinned else {})}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)
    found: dict[str, tuple[float, float, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def told(value: tuple[float, float, float] | None, target: float | None, least: bool) -> str:
    if value is None:
        return "-"
    text = f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"
    if target is not None:
        met = value[0] >= target if least else value[0] <= target
        text += f" ({'meets' if met else 'misses'} {target:g})"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="for each of the comparisons")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="also write the figures as JSON")
    parser.add_argument("--one", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one is not None:
        rows = args.rows or max(1, (1 << 21) // args.one)
        print(json.dumps(measure(args.one, rows, args.seconds, not args.no_compile)))
        return
    print(
        f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}, "
        f"isa {native.active_isa()}, fp32, H = 4 D, LayerNorm, exact GELU"
    )
    heads = "share of bare | over eager | pinned | over compile | fwd+bwd over eager | pinned"
    print(f"\n| D | rows | route | {heads} |")
    print("|---" * 9 + "|")
    everything: dict[int, dict[str, object]] = {}
    for d in args.widths:
        default, pinned = (in_fresh_process(d, args, flag) for flag in (False, True))
        rows = args.rows or max(1, (1 << 21) // d)
        routes = " / ".join(route(d, rows, recorded) for recorded in (False, True))
        everything[d] = {"route": routes, "default": default, "pinned": pinned}
        target: tuple[float | None, ...] = TARGETS.get(d, (None,) * 4)
        cells = [
            told(default["share of bare"], target[0], False),
            told(default["over eager"], target[1], True),
            told(pinned["over eager"], None, True),
            told(default.get("over compile"), target[2], True),
            told(default["forward+backward over eager"], target[3], True),
            told(pinned["forward+backward over eager"], None, True),
        ]
        print(f"| {d} | {rows} | {routes} | {' | '.join(cells)} |", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    try:
        main()
    except WrongResult as error:
        sys.exit(str(error))
