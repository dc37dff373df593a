"""The eigenvalue kernels by size: PREDICTED microseconds on an H100, beside what cuSOLVER took there.

    python benchmarks/gpu_spectrum_sizes.py [--out docs/images/gpu_eigenvalues.png]

No GPU is used. The models are those of gpu_spectrum.py and gpu_spectrum_stages.py. Prints where one more row
makes a batch take longer by more than a quarter: there the next kernel begins, which has room for more rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import gpu_spectrum
import gpu_spectrum_stages
import matplotlib

from rgfast.ops.spectrum.impl.cuda import KERNELS

SIZES = (*range(2, 300), *range(300, 1025, 4))
ROOM = {8 * dtype.itemsize: kernels[-1].rows for dtype, kernels in KERNELS.items()}
KINDS = {64: 8, 32: 4}  # bytes of an entry


def predicted(n: int, batch: int, bits: int) -> float:
    """Microseconds per matrix."""
    by_one_launch = n <= ROOM[bits]
    model = gpu_spectrum if by_one_launch else gpu_spectrum_stages
    return 1e6 * model.predicted(n, batch, KINDS[bits]) / batch


def library(batch: int, bits: int) -> list[tuple[int, float]]:
    """Rows and microseconds per matrix of cuSOLVER, as measured."""
    table = gpu_spectrum.measured()
    found = [*table["cusolver"], *table["cusolver_staged"]]
    return [(n, each) for size, n, b, each, _ in found if (size, b) == (KINDS[bits], batch)]


def jumps(batch: int, bits: int, over: float = 1.25) -> Iterator[tuple[int, float]]:
    """Rows at which a matrix takes so many times what one of a row less takes."""
    for n in range(3, 300):
        ratio = predicted(n, batch, bits) / predicted(n - 1, batch, bits)
        if ratio > over:
            yield n, ratio


def draw(path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axes, bits in zip(panels, KINDS, strict=True):
        for batch, color in ((64, "#CC6677"), (400, "#117733"), (2048, "#332288")):
            sizes = [n for n in SIZES if batch < 2048 or n <= 300]
            axes.loglog(
                sizes, [predicted(n, batch, bits) for n in sizes], color=color, label=f"batch {batch:,}"
            )
            axes.plot(*zip(*library(batch, bits), strict=True), "x", color=color)
        axes.set(title=f"fp{bits}", xlabel="rows of a matrix")
        axes.grid(alpha=0.3)
    panels[0].plot([], [], "x", color="0.4", label="cuSOLVER, measured on an H100")
    panels[0].set_ylabel("us per matrix (lines: predicted)")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_eigenvalues.png"))
    options = parser.parse_args()
    for bits in KINDS:
        for batch in gpu_spectrum.BATCHES:
            listed = ", ".join(f"{n} ({ratio:.1f})" for n, ratio in jumps(batch, bits))
            print(f"PREDICTED, fp{bits}, batch {batch}, longer by a quarter than one row less: {listed}")
    draw(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
