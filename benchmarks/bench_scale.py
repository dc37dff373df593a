"""Very deep, very wide, and how the cost grows: `bench_scale.py deep|wide|slopes [--out FOLDER]`.

    deep    96 blocks of width 1,024 (3.2 GB of weights), 1,024 sequences of 4 positions, all pairs of layers
    wide    3 blocks of width 8,192 (6.4 GB of weights), 1,024 sequences of 2 positions, all pairs of layers
    slopes  time of a whole probe over depth, width, positions and samples, one at a time, beside the slope
            that counting operations predicts: a JSON and a figure

`deep` and `wide` give seconds and the peak memory of the process, and the probe over its own bare forward;
what they found is checked at one position against fp64 brute force. Each runs in the process it is called in.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rgfast
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
OPTIONS: dict[str, Any] = {"views": ["position"], "pairs": "all", "route": "samples"}


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
    sigma = torch.linalg.svdvals(rows.double() - rows.double().mean(0))
    p = sigma / sigma.sum()
    want, got = float(torch.special.entr(p).sum().exp()), float(result.dataset.effective_rank[0, -1, 0])
    print(f"last layer, position 0: {got:.8f}, by SVD of the stored rows {want:.8f}")
    if not abs(got - want) <= 1e-5 * want:
        raise SystemExit("these should agree")


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
            run = lambda model=model, x=x: rgfast.probe(model, x, progress=False, **OPTIONS)  # noqa: E731
            run()
            median = statistics.median(seconds(run)[0] for _ in range(3))
            found[axis].append([step, median, operations(**at)])
            print(f"{axis} {step}: {median:.3f} s", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "scaling.json", json.dumps({"base": BASE, "found": found}, indent=1) + "\n")
    draw(found, folder / "scaling.png")


def draw(found: dict[str, list[list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    # One rate for all panels: the median of operations over seconds.
    rate = statistics.median(flops / spent for rows in found.values() for _, spent, flops in rows)
    figure, axes = plt.subplots(1, len(found), figsize=(12, 3.2), sharey=True, layout="constrained")
    for ax, (name, rows) in zip(axes, found.items(), strict=True):
        steps, spent, flops = zip(*rows, strict=True)
        ax.loglog(
            steps, [f / rate for f in flops], color="0.6", label=f"counted, at {rate / 1e9:.0f} Gflop/s"
        )
        ax.loglog(steps, spent, "o", color="#0072B2", label="measured")
        fixed = ", ".join(f"{key} {value}" for key, value in BASE.items() if key != name)
        ax.set_title(fixed, fontsize=8)
        ax.set_xlabel(name)
        ax.set_xticks(steps, [str(step) for step in steps])
        ax.minorticks_off()
    axes[0].set_ylabel("whole probe (s)")
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=(*LARGE, "slopes"))
    parser.add_argument("--out", type=Path, default=Path("runs/scale"), help="folder for `slopes`")
    options = parser.parse_args()
    if options.case == "slopes":
        slopes(options.out)
    else:
        large(options.case)


if __name__ == "__main__":
    main()
