"""Runs too large for a benchmark, and how the cost grows: `scale.py CASE [--out FOLDER]`.

    deep         96 blocks of width 1,024 (3.2 GB of weights), 4 positions, all pairs of layers
    wide         3 blocks of width 8,192 (6.4 GB of weights), 2 positions, all pairs of layers
    moment       the stochastic effective rank of a second moment of d = 8,192 against all its eigenvalues
    stream       debiased CKA of all pairs of 12 layers of width 256 from 10^6 samples made on the way
    slopes       time of a whole probe over depth, width, positions and samples, one at a time, beside the
                 slope that counting operations predicts: a JSON and a figure
    eigenvalues  time per matrix of `eigvalsh` over d = 2 ... 1,024, beside PyTorch's: a JSON and a figure
    small        processor time per matrix of `effective_rank` (n = 4d, fp32) and `eigvalsh` on one thread,
                 beside PyTorch's, and the share of it that the products alone would take

`deep` and `wide` take 1,024 sequences. Values are compared with brute force. Times are those of single
calls on all threads but for `small`; memory is the peak of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import rgfast
from rgfast.bench.spectrum import batch_of, check_eigenvalues, check_ranks, svd_rank, symmetric
from rgfast.bench.timing import hold, on_one_thread, turns
from rgfast.files import write_text

# depth, positions, width, samples
LARGE = {"deep": (96, 4, 1024, 1024), "wide": (3, 2, 8192, 1024)}
BASE = {"depth": 8, "width": 64, "positions": 16, "samples": 1024}
STEPS = {
    "depth": [2, 4, 8, 16, 32, 64],
    "width": [16, 32, 64, 128, 256],
    "positions": [2, 4, 8, 16, 32, 64],
    "samples": [128, 256, 512, 1024, 2048, 4096],
}
DENSE = [2, 3, 4, 6, 8, 12, 16, 17, 24, 32, 33, 48, 64, 65, 96, 100, 128, 129, 160, 200, 256]
DENSE += [257, 300, 384, 512, 640, 768, 1024]
OPTIONS: dict[str, Any] = {"views": ["position"], "pairs": "all", "route": "samples", "progress": False}


def made(depth: int, positions: int, width: int, samples: int) -> tuple[rgfast.ResidualStack, torch.Tensor]:
    torch.manual_seed(0)
    model = rgfast.ResidualStack(width, depth, mixing="none", w2_scale=0.5).eval()
    return model, torch.randn(samples, positions, width)


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def large(case: str) -> None:
    shape = LARGE[case]
    model, x = made(*shape)
    print(f"{case}: depth, positions, width, samples = {shape}; {peak():.1f} GiB with model and input")
    with torch.no_grad():
        bare, _ = seconds(lambda: model(x))
        bare = min(bare, seconds(lambda: model(x))[0])
        print(f"forward alone {bare:.1f} s, peak {peak():.1f} GiB")
        probed, result = seconds(lambda: rgfast.probe(model, x, **OPTIONS))
    print(f"probe {probed:.1f} s ({probed / bare:.2f} of the forward), peak {peak():.1f} GiB")
    rank = result.order_parameter()
    print(f"effective rank {float(rank[0]):.2f} -> {float(rank[-1]):.2f}, mean of {shape[1]} positions")
    rows = x[:, 0]
    with torch.no_grad():
        for block in model.blocks:
            rows = block(rows)
    want, got = float(svd_rank(rows.double())), float(result.dataset.effective_rank[0, -1, 0])
    print(f"last layer, position 0: {got:.8f}, by SVD of the stored rows {want:.8f}")
    if not abs(got - want) <= 1e-5 * want:
        raise SystemExit("these should agree")


def moment(d: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(d, d, generator=draw, dtype=torch.float64)
    x *= torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    formed = x.T @ x
    rgfast.effective_rank_estimate(formed[:256, :256])  # first calls pay for what is loaded once
    ours, estimate = seconds(lambda: rgfast.effective_rank_estimate(formed))
    library, eigenvalues = seconds(lambda: torch.linalg.eigvalsh(formed))
    sigma = eigenvalues.clamp_min(0).sqrt()
    truth = float(torch.special.entr(sigma / sigma.sum()).sum().exp())
    verb = "holds" if estimate.low <= truth <= estimate.high else "misses"
    print(f"d = {d}, {torch.get_num_threads()} threads: {ours / library:.3f} of the time of eigvalsh")
    print(
        f"[{estimate.low:.2f}, {estimate.high:.2f}] around {estimate.value:.2f} {verb} the truth {truth:.2f}"
    )


def batches(samples: int) -> Iterator[torch.Tensor]:
    """Layers ``[12, 2000, 256]`` of which the l-th is a sum of l + 1 independent Gaussians."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, samples, 2000):
        yield torch.randn(12, min(2000, samples - start), 256, generator=generator).cumsum_(0)


def streamed(samples: int) -> tuple[rgfast.CKAResult, float]:
    running = rgfast.CKAAccumulator(pairs="all")
    spent = sum(seconds(partial(running.update, batch))[0] for batch in batches(samples))
    return running.finalize(), spent


def stream(samples: int) -> None:
    whole, (result, spent) = seconds(lambda: streamed(samples))
    most = 1024 * peak()
    # At infinite n, CKA(l, m) = (l + 1)/(m + 1) for l <= m.
    sizes = torch.arange(1.0, 13.0, dtype=torch.float64)
    limit = torch.minimum(sizes[:, None], sizes) / torch.maximum(sizes[:, None], sizes)
    away = float((result.matrix - limit).abs().max())
    expected = rgfast.cka_matrix(torch.cat(list(batches(6000)), 1), precision="double")
    error = float((streamed(6000)[0].matrix - expected).abs().max())
    if not error <= 1e-10:
        raise SystemExit(f"the stream of 6,000 samples is off by {error:.2e}")
    print(f"{int(result.count):,} samples by {result.route}: {whole:.0f} s, {spent:.0f} of them updates")
    print(f"peak {most:.0f} MB, {away:.1e} from n = infinity, 6,000 samples {error:.1e} from the exact value")


def operations(depth: int, width: int, positions: int, samples: int) -> float:
    """Of a whole probe, fp64 ones counted twice: forward, moments, eigenvalues, Grams and their products."""
    layers, n, d = depth + 1, samples, width
    forward = 16.0 * depth * n * d * d
    spectra = 2 * layers * (min(n, d) * n * d + 4 / 3 * min(n, d) ** 3)
    by_samples = n * n * layers * d + n * n * layers * (layers + 1) / 2
    by_features = n * d * d * layers * layers
    return positions * (forward + spectra + min(by_samples, by_features))


def slopes(folder: Path) -> None:
    found: dict[str, list[list[float]]] = {}
    for axis, steps in STEPS.items():
        found[axis] = []
        for step in steps:
            at = BASE | {axis: step}
            model, x = made(at["depth"], at["positions"], at["width"], at["samples"])
            run = partial(rgfast.probe, model, x, **OPTIONS)
            run()
            median = statistics.median(seconds(run)[0] for _ in range(3))
            found[axis].append([step, median, operations(**at)])
            print(f"{axis} {step}: {median:.3f} s", flush=True)
    write_text(folder / "scaling.json", json.dumps({"base": BASE, "found": found}, indent=1) + "\n")
    # One rate for all panels: the median of operations over seconds.
    rate = statistics.median(flops / spent for rows in found.values() for _, spent, flops in rows)
    figure, axes = subplots(ncols=len(found), figsize=(12, 3.2), sharey=True)
    for ax, (name, rows) in zip(axes, found.items(), strict=True):
        steps, spent, flops = zip(*rows, strict=True)
        counted = f"counted, at {rate / 1e9:.0f} Gflop/s"
        ax.loglog(steps, [f / rate for f in flops], color="0.6", label=counted)
        ax.loglog(steps, spent, "o", color="#0072B2", label="measured")
        fixed = ", ".join(f"{key} {value}" for key, value in BASE.items() if key != name)
        ax.set_title(fixed, fontsize=8)
        ax.set_xlabel(name)
        ax.set_xticks(steps, [str(step) for step in steps])
        ax.minorticks_off()
    axes[0].set_ylabel("whole probe (s)")
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(folder / "scaling.png", dpi=150)


def eigenvalues(folder: Path) -> None:
    figure, ax = subplots(figsize=(8, 5))
    found: dict[str, list[list[float]]] = {}
    for color, dtype in (("C0", torch.float64), ("C1", torch.float32)):
        name = str(dtype).removeprefix("torch.")
        rows = found[name] = []
        for d in DENSE:
            a = symmetric(batch_of(d), d, dtype)
            hold(check_eigenvalues(a))
            theirs = partial(torch.linalg.eigvalsh, a)
            candidates = {
                "ours": partial(rgfast.eigvalsh, a),
                "torch": theirs,
                "alone": on_one_thread(theirs),
            }
            medians = {key: statistics.median(spent) for key, spent in turns(candidates, 0.5).items()}
            ours, theirs_best = medians.pop("ours"), min(medians.values())
            rows.append([d, 1e6 * ours / len(a), 1e6 * theirs_best / len(a)])
            print("{} d={}: {:.1f} us, PyTorch {:.1f} us".format(name, *rows[-1]), flush=True)
        steps, mine, library = zip(*rows, strict=True)
        ax.loglog(steps, mine, "-o", ms=3, color=color, label=f"rgfast {name}")
        ax.loglog(steps, library, "--", color=color, label=f"torch {name}")
    write_text(folder / "eigvalsh.json", json.dumps(found, indent=1) + "\n")
    ax.set(xlabel="d", ylabel="µs per matrix", title="eigvalsh, batched")
    ax.grid(True, which="both", alpha=0.3)
    ax.legend()
    figure.savefig(folder / "eigvalsh.png", dpi=130)


def processor_turns(calls: dict[str, Callable[[], Any]], turn: float) -> dict[str, float]:
    """Median processor seconds of a call; the contenders take seven turns of about `turn` seconds."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.process_time()
        call()
        repeats[name] = max(1, int(turn / max(time.process_time() - start, 1e-6)))
    for _ in range(7):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(repeats[name]):
                call()
            spent[name].append((time.process_time() - start) / repeats[name])
    return {name: statistics.median(each) for name, each in spent.items()}


def small() -> None:
    torch.set_num_threads(1)
    a, b = torch.randn(2, 512, 512, dtype=torch.float64)
    rate = 2 * 512**3 / processor_turns({"mm": lambda: a @ b}, 0.02)["mm"]
    print(f"fp64 products of PyTorch: {rate / 1e9:.0f} GF/s")
    print("d, us per matrix and times faster: effective_rank, share of products; eigvalsh fp32; fp64")
    for d in (12, 24, 48, 64, 128, 200, 256, 512):
        count = batch_of(d)
        x = torch.randn(count, 4 * d, d, generator=torch.Generator().manual_seed(d))
        hold(check_ranks(x))
        cases: list[tuple[Callable[..., Any], Callable[..., Any], torch.Tensor]] = [
            (rgfast.effective_rank, svd_rank, x)
        ]
        for dtype in (torch.float32, torch.float64):
            cases.append((rgfast.eigvalsh, torch.linalg.eigvalsh, symmetric(count, d, dtype)))
            hold(check_eigenvalues(cases[-1][2]))
        line = [f"{d:4}"]
        for ours, theirs, data in cases:
            found = processor_turns({"ours": partial(ours, data), "theirs": partial(theirs, data)}, 0.02)
            line.append(f"{found['ours'] / count * 1e6:9.2f} {found['theirs'] / found['ours']:6.2f}")
            if ours is rgfast.effective_rank:
                line.append(f"{(4 + 4 / 3) * d**3 / rate * count / found['ours']:5.0%}")
        print(*line, sep="  ", flush=True)


def subplots(**options: Any) -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained", **options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=(*LARGE, "moment", "stream", "slopes", "eigenvalues", "small"))
    parser.add_argument("--out", type=Path, default=Path("runs/scale"), help="folder for figures")
    parser.add_argument("--d", type=int, default=8192, help="of `moment`")
    parser.add_argument("--seed", type=int, default=0, help="of `moment`")
    parser.add_argument("--samples", type=int, default=1_000_000, help="of `stream`")
    args = parser.parse_args()
    if args.case in LARGE:
        large(args.case)
    elif args.case == "moment":
        moment(args.d, args.seed)
    elif args.case == "small":
        small()
    elif args.case == "stream":
        stream(args.samples)
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        (slopes if args.case == "slopes" else eigenvalues)(args.out)


if __name__ == "__main__":
    main()
