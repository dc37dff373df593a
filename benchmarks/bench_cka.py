"""Speed of rgfast's CKA beside Gram + einsum in plain torch, pytorch-cka and the loop over pairs.

    python benchmarks/bench_cka.py [--case NAME ...] [--threads 2] [--rounds 5] [--positions N] [--clock cpu]
    python benchmarks/bench_cka.py --case stream [--samples 1000000]

Within a round every contender runs once, in turn, on the same data, in an order that moves on by one from
round to round (with two threads, PyTorch's own workers spin for a while after they are done and hold up
whoever comes next); the ratio of medians is reported together with the spread of the ratios over rounds.
Values are checked against fp64 brute force before anything is timed: nothing is reported for a contender of
ours that errs. pytorch-cka is skipped by name where it is not installed (``pip install "rgfast[bench]"``).

``--positions`` measures fewer positions (the work is the same at each), ``--clock cpu`` with ``--threads 1``
counts processor time, which other load on the machine disturbs least. The case ``stream`` has no peer: it
makes its samples as it goes, prints the time and the peak memory of the whole process, and holds a shorter
stream against the exact value.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import rgfast
from rgfast import native
from rgfast.bench import cka as bench
from rgfast.bench.timing import WrongResult, hold

os.environ.setdefault("RGFAST_STRICT", "1")


TARGETS: dict[str, dict[tuple[str, str], float]] = {
    "deep": {
        ("single", "gram+einsum"): 2.5,
        ("double", "gram+einsum"): 1.7,
        ("single", "pytorch-cka"): 4.0,
        ("double", "pytorch-cka"): 2.0,
        ("single", "pair loop"): 60.0,
        ("double", "pair loop"): 60.0,
    },
    "positions": {
        ("auto", "gram+einsum"): 10.0,
        ("auto", "pytorch-cka"): 14.0,
        ("auto", "pair loop"): 4.0,
    },
    "adjacent": {
        ("auto", "gram+einsum"): 4.0,
        ("auto", "pytorch-cka"): 6.0,
        ("auto", "pair loop"): 1.4,
    },
}


def peak_megabytes() -> float:
    """Most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what this process was forked from
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 1024
    import resource

    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def batches(samples: int) -> Iterator[Tensor]:
    """Layers ``[12, 2000, 256]`` of which the l-th is a sum of l + 1 independent Gaussians."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, samples, 2000):
        yield torch.randn(12, min(2000, samples - start), 256, generator=generator).cumsum_(0)


def stream(samples: int) -> None:
    """Debiased CKA of all pairs of 12 layers of 256 features, and the memory that it took."""
    running = rgfast.CKAAccumulator(pairs="all")
    begin = time.perf_counter()
    spent = 0.0
    for batch in batches(samples):
        begin_update = time.perf_counter()
        running.update(batch)
        spent += time.perf_counter() - begin_update
    result = running.finalize()
    seconds, peak = time.perf_counter() - begin, peak_megabytes()
    # At infinite n, CKA(l, m) = (l + 1)/(m + 1) for l <= m.
    sizes = torch.arange(1.0, 13.0, dtype=torch.float64)
    limit = torch.minimum(sizes[:, None], sizes) / torch.maximum(sizes[:, None], sizes)
    away = float((result.matrix - limit).abs().max())
    few = list(batches(6000))
    short = rgfast.CKAAccumulator(pairs="all")
    for batch in few:
        short.update(batch)
    expected = rgfast.cka_matrix(torch.cat(few, 1), precision="double")
    error = float((short.finalize().matrix - expected).abs().max())
    if not error <= 1e-10:
        raise SystemExit(f"the stream of 6,000 samples is off by {error:.2e}")
    print(
        "| samples | route | seconds | of them updates | peak MB in all | from n = ∞ | 6,000 against exact |"
    )
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {int(result.count):,} | {result.route} | {seconds:.0f} | {spent:.0f} | {peak:.0f} "
        f"| {away:.1e} | {error:.1e} |"
    )


def run(
    name: str, case: bench.Case, rounds: int, clock: Callable[[], float]
) -> list[tuple[str, str, float, float, float, float]]:
    """(ours, peer, ratio of medians, least and largest ratio of a round, target or NaN)."""
    layers = case.data()
    calls: dict[str, Callable[[Tensor, bool], Tensor]] = {
        "auto": bench.ours(None, "native"),
        "single": bench.ours("single", "native"),
        "double": bench.ours("double", "native"),
        "gram+einsum": bench.gram_einsum,
        "pair loop": bench.pair_loop,
    }
    found = bench.peer()
    if found is None:
        print(f"{name}: pytorch-cka is not installed, skipped")
    else:
        calls["pytorch-cka"] = found
    for kind, bound in (("auto", 1e-6), ("single", 1e-6), ("double", 1e-10)):
        hold(bench.check(layers[:, :1], calls[kind], case.adjacent, bound))
    seconds: dict[str, list[float]] = {kind: [] for kind in calls}
    order = list(calls)
    for turn in range(rounds + 1):
        for kind in order[turn % len(order) :] + order[: turn % len(order)]:
            begin = clock()
            calls[kind](layers, case.adjacent)
            seconds[kind].append(clock() - begin)
    rows: list[tuple[str, str, float, float, float, float]] = []
    for kind in ("single", "double", "auto"):
        for other in ("gram+einsum", "pytorch-cka", "pair loop"):
            if other in calls:
                mine, theirs = seconds[kind][1:], seconds[other][1:]
                each = [b / a for a, b in zip(mine, theirs, strict=True)]
                ratio = statistics.median(theirs) / statistics.median(mine)
                target = TARGETS[name].get((kind, other), float("nan"))
                rows.append((kind, other, ratio, min(each), max(each), target))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=[*bench.CASES, "stream"], default=list(bench.CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--positions", type=int, default=None)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--samples", type=int, default=1_000_000)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, {platform.machine()}, isa {native.active_isa()}, "
        f"threads {torch.get_num_threads()}, fp32 data, "
        f"{options.rounds} interleaved rounds, {options.clock} time"
    )
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    for name in options.case:
        if name == "stream":
            stream(options.samples)
            continue
        case = bench.CASES[name]
        if options.positions is not None:
            case = replace(case, positions=min(case.positions, options.positions))
        print(f"\n{name}: {case}\n")
        print("| products | over | ratio | rounds | aim |")
        print("|---|---|---|---|---|")
        for kind, other, ratio, least, most, target in run(name, case, options.rounds, clock):
            aim = "" if target != target else f"{target:g}{'' if ratio >= target else ' missed'}"
            print(f"| {kind} | {other} | {ratio:.2f} | {least:.2f} to {most:.2f} | {aim} |", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WrongResult as error:
        sys.exit(str(error))
