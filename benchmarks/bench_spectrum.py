"""Eigenvalues and effective ranks against PyTorch: `bench_spectrum.py [--quick] [--out DIR]`.

Every figure is the median of interleaved rounds in this one process (ours, PyTorch on one thread, PyTorch on
all threads, ours, ...), and PyTorch counts with its better thread count. Values are checked in the same run,
and a wrong one ends it. With `--out`, the numbers go to `spectrum.json`, the table for the README to
`spectrum.md` and a plot of the time per matrix over d = 2 ... 1024 to `spectrum.png`: about five minutes on
two idle cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rgfast
from rgfast import native
from rgfast.bench.spectrum import batch_of, check_eigenvalues, check_ranks, svd_rank, symmetric
from rgfast.bench.timing import WrongResult, hold, threads, turns

TARGET_FP64 = {8: 8, 16: 8, 17: 8, 32: 8, 33: 8, 48: 8, 64: 8, 128: 6, 256: 4, 512: 2, 1024: 2}
TARGET_FP32 = {8: 14, 16: 14, 17: 14, 32: 14, 33: 10, 48: 10, 64: 10, 128: 8, 256: 6, 512: 2, 1024: 2}
TARGET_RANK = {8: 20, 16: 20, 17: 20, 32: 20, 33: 20, 48: 20, 64: 15, 128: 11, 256: 6.5, 512: 4.5, 1024: 3.5}


def against_torch(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor], seconds: float, all_threads: int
) -> tuple[float, float]:
    """(our time, PyTorch's at its better thread count)."""

    def with_threads(count: int, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with threads(count):
                return run()

        return call

    candidates: dict[str, Callable[[], object]] = {"ours": with_threads(all_threads, ours)}
    for count in sorted({1, all_threads}):
        candidates[f"torch {count}"] = with_threads(count, theirs)
    took = {name: statistics.median(spent) for name, spent in turns(candidates, seconds).items()}
    return took.pop("ours"), min(took.values())


def bench_eigvalsh(
    d: int, dtype: torch.dtype, batch: int, seconds: float, all_threads: int
) -> tuple[float, float]:
    a = symmetric(batch, d, dtype)
    hold(check_eigenvalues(a))
    ours, theirs = against_torch(
        lambda: rgfast.eigvalsh(a), lambda: torch.linalg.eigvalsh(a), seconds, all_threads
    )
    return ours / batch, theirs / batch


def bench_rank(d: int, batch: int, seconds: float, all_threads: int) -> tuple[float, float]:
    x = torch.randn(batch, 4 * d, d)
    hold(check_ranks(x[:4]))
    ours, theirs = against_torch(lambda: rgfast.effective_rank(x), lambda: svd_rank(x), seconds, all_threads)
    return ours / batch, theirs / batch


def table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n{'d':>6} {'batch':>6} {'ours':>10} {'torch':>10} {'ratio':>7} {'aim':>6}")
    for row in rows:
        aim = "" if row["aim"] is None else f"{row['aim']:.1f}"
        note = "" if row["aim"] is None or row["ratio"] >= row["aim"] else "  below"
        print(
            f"{row['d']:>6} {row['batch']:>6} {row['ours'] * 1e6:>8.2f}us {row['torch'] * 1e6:>8.2f}us "
            f"{row['ratio']:>6.2f}x {aim:>6}{note}",
            flush=True,
        )


def markdown(report: dict[str, Any], sizes: list[int]) -> str:
    """How many times faster than PyTorch, one row a size, with what is aimed at in brackets."""
    columns = {
        "`eigvalsh` fp64": "eigvalsh float64",
        "`eigvalsh` fp32": "eigvalsh float32",
        "one matrix, fp64": "eigvalsh float64, one",
        "one matrix, fp32": "eigvalsh float32, one",
        "`effective_rank`": "effective_rank",
    }

    def cell(name: str, d: int) -> str:
        row = next(row for row in report[name] if row["d"] == d)
        aim = "" if row["aim"] is None or name.endswith("one") else f" ({row['aim']:g})"
        return f"{row['ratio']:.3g}{aim}"

    machine = report["machine"]
    lines = [
        f"`{machine['command']}`: times faster than PyTorch {machine['torch']} at its better thread count, "
        f"aims in brackets; {machine['cpu']}, {machine['isa']}, {machine['threads']} threads; batches of 64 "
        "(8 from d = 512).",
        "",
        "| d | " + " | ".join(columns) + " |",
        "|" + "---|" * (len(columns) + 1),
    ]
    lines += [f"| {d} | " + " | ".join(cell(name, d) for name in columns.values()) + " |" for d in sizes]
    return "\n".join(lines) + "\n"


def plot(path: Path, series: dict[str, list[dict[str, Any]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for color, (name, rows) in zip(("C0", "C1"), series.items(), strict=True):
        d = [row["d"] for row in rows]
        axes.loglog(d, [row["ours"] * 1e6 for row in rows], "-o", ms=3, color=color, label=f"rgfast {name}")
        axes.loglog(d, [row["torch"] * 1e6 for row in rows], "--", color=color, label=f"torch {name}")
    axes.set(xlabel="d", ylabel="µs per matrix", title="eigvalsh, batched")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="eigvalsh and effective_rank against PyTorch on the CPU")
    parser.add_argument("--quick", action="store_true", help="few sizes, short rounds: about a minute")
    parser.add_argument("--sizes", type=int, nargs="+", help="d to measure, instead of the usual ones")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: PyTorch's")
    parser.add_argument("--out", type=Path, help="folder for spectrum.json and spectrum.png")
    options = parser.parse_args()
    torch.manual_seed(0)
    seconds = 0.2 if options.quick else 1.5
    sizes = options.sizes or ([8, 32, 64, 128, 256] if options.quick else list(TARGET_FP64))
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    header = {
        "cpu": cpu,
        "isa": native.active_isa(),
        "threads": options.threads,
        "torch": torch.__version__,
        "rgfast": rgfast.__version__,
        "command": " ".join(["python", *sys.argv]),
    }
    print(", ".join(f"{key}: {value}" for key, value in header.items()))
    report: dict[str, Any] = {"machine": header}

    def measure(
        name: str,
        title: str,
        aims: dict[int, float],
        one: Callable[..., tuple[float, float]],
        batch: int | None,
    ) -> None:
        rows = []
        for d in sizes:
            count = batch or batch_of(d)
            ours, theirs = one(d, count)
            aim = aims.get(d)
            rows.append(
                {"d": d, "batch": count, "ours": ours, "torch": theirs, "ratio": theirs / ours, "aim": aim}
            )
        report[name] = rows
        table(title, rows)

    for dtype, aims in ((torch.float64, TARGET_FP64), (torch.float32, TARGET_FP32)):
        short = str(dtype).removeprefix("torch.")

        def eigen(d: int, batch: int, dtype: torch.dtype = dtype) -> tuple[float, float]:
            return bench_eigvalsh(d, dtype, batch, seconds, options.threads)

        measure(f"eigvalsh {short}", f"eigvalsh, {short}, per matrix", aims, eigen, None)
        one_aim = dict.fromkeys(sizes, 0.9)
        measure(f"eigvalsh {short}, one", f"eigvalsh, {short}, a batch of one", one_aim, eigen, 1)

    def rank(d: int, batch: int) -> tuple[float, float]:
        return bench_rank(d, batch, seconds, options.threads)

    measure("effective_rank", "effective_rank, fp32 data, n = 4d, per matrix", TARGET_RANK, rank, None)

    print(f"\n{markdown(report, sizes)}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        dense = [2, 3, 4, 6, 8, 12, 16, 17, 24, 32, 33, 48, 64, 65, 96, 100, 128, 129, 160, 200, 256]
        dense += [] if options.quick else [257, 300, 384, 512, 640, 768, 1024]
        series: dict[str, list[dict[str, Any]]] = {}
        for dtype in (torch.float64, torch.float32):
            short = str(dtype).removeprefix("torch.")
            rows = []
            for d in dense:
                ours, theirs = bench_eigvalsh(d, dtype, batch_of(d), seconds / 3, options.threads)
                rows.append({"d": d, "ours": ours, "torch": theirs, "ratio": theirs / ours, "aim": None})
                rows[-1]["batch"] = batch_of(d)
            series[short] = rows
            table(f"time per matrix over d, {short}", rows)
        report["over d"] = series
        plot(options.out / "spectrum.png", series)
        (options.out / "spectrum.md").write_text(markdown(report, sizes))
        (options.out / "spectrum.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except WrongResult as error:
        sys.exit(str(error))
