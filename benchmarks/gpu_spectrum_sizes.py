"""The eigenvalue kernels by size: PREDICTED microseconds on an H100, beside what cuSOLVER took there.

    python benchmarks/gpu_spectrum_sizes.py [--out docs/images/gpu_eigenvalues.png]
    python benchmarks/gpu_spectrum_sizes.py --times    # what rgfast/ops/spectrum/impl/cuda.py chooses by

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

from rgfast.ops.device import LAUNCH
from rgfast.ops.spectrum.impl.cuda import KERNELS
from rgfast.ops.spectrum.stages import BANDS

SIZES = (*range(2, 300), *range(300, 1025, 4))
ROOM = {8 * dtype.itemsize: kernels[-1].rows for dtype, kernels in KERNELS.items()}
KINDS = {64: 8, 32: 4}  # bytes of an entry
DTYPES = {8 * dtype.itemsize: dtype for dtype in KERNELS}


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


def times(bits: int) -> dict[int, tuple[float, float]]:
    """Microseconds of a batch, however small, and of a matrix more, at the first and last rows of kernels."""
    ends = [0, *(kernel.rows for kernel in KERNELS[DTYPES[bits]]), *(band.rows for band in BANDS)]
    found = {}
    for n in sorted({1, *ends[1:], *(end + 1 for end in ends[1:-1])}):
        most = 8192 if n <= ROOM[bits] else 1024
        alone = predicted(n, 1, bits) - 1e6 * LAUNCH
        each = (predicted(n, most, bits) * most - 1e6 * LAUNCH - alone) / (most - 1)
        found[n] = (float(f"{alone:.2g}"), float(f"{each:.2g}"))
    return found


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
    parser.add_argument("--times", action="store_true")
    options = parser.parse_args()
    if options.times:
        for bits in KINDS:
            print(f"    {DTYPES[bits]}: {times(bits)},")
        return
    for bits in KINDS:
        for batch in gpu_spectrum.BATCHES:
            listed = ", ".join(f"{n} ({ratio:.1f})" for n, ratio in jumps(batch, bits))
            print(f"PREDICTED, fp{bits}, batch {batch}, longer by a quarter than one row less: {listed}")
    draw(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
