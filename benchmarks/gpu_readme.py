"""The tables of whole probes in the README of the room `moments`, which `predict_gpu.py` predicts.

    python benchmarks/gpu_readme.py            # prints them
    python benchmarks/gpu_readme.py --write    # writes them into the README
    python benchmarks/gpu_readme.py --check    # compares them with the README, as `make gate` does

It takes some minutes, and no GPU. All figures are PREDICTED, for an H100.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import predict_gpu
import torch
from predict_gpu import Predicted

from rgfast.bench.probe import ON_A_GPU

README = Path(__file__).resolve().parents[1] / "rgfast" / "ops" / "moments" / "README.md"
# What was wanted of a stack in bf16 at the last shape, and of a ``ResidualStack`` at the first three.
HALF, OWN = (None,) * 4 + (6.0,), (1.5, 1.0, 1.0, None, None)
GPT2 = "GPT-2 12 × 768 in bf16, [64, 512] tokens with padding"
HEAD = [
    *("fp32, (L, T, d, n)", "bare forward", "library: forward", "reading", "spectra"),
    *("whole / bare", "wanted", "kernels: forward", "reading", "spectra", "whole / bare", "wanted"),
]


def milliseconds(seconds: float) -> str:
    """To three digits or so."""
    ms = 1e3 * seconds
    return f"{ms:.2f}" if ms < 9.995 else f"{ms:.1f}" if ms < 99.95 else f"{ms:,.0f}"


def parts(name: str, both: list[Predicted], wanted: list[float]) -> list[str]:
    """The cells of a probe by library parts and by kernels."""
    library, _ = both
    cells = [name, milliseconds(library.bare)]
    for found, aim in zip(both, wanted, strict=True):
        times = [found.forwards.seconds, found.reading.seconds, found.spectra]
        cells += [*map(milliseconds, times), f"{found.share:.1f} (predicted)", f"{aim:g}"]
    return cells


def of_shape(at: int) -> list[str]:
    """The cells of a plain stack in fp32 at one of the shapes."""
    shape = ON_A_GPU[at]
    both = [predict_gpu.predict(*shape, ours=ours) for ours in (False, True)]
    return parts(str(shape), both, [predict_gpu.WANTED[ours][at] for ours in (False, True)])


def share(found: Predicted, wanted: float | None) -> str:
    """The cell of a probe over the bare forward."""
    return f"{found.share:.1f}" + ("" if wanted is None else f" (wanted: {wanted:g})")


def tables() -> Iterator[str]:
    """Both."""

    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rows = [of_shape(at) for at in range(len(ON_A_GPU))]
    gpt2 = [predict_gpu.predict_gpt2(ours=ours) for ours in (False, True)]
    yield "\n".join(map(line, [HEAD, ["---"] * len(HEAD), *rows, parts(GPT2, gpt2, [3.0, 1.6])]))
    half = functools.partial(predict_gpu.predict, dtype=torch.bfloat16)
    shares = [
        ["plain stack in bf16, library parts", *(share(half(*shape), None) for shape in ON_A_GPU)],
        [
            "plain stack in bf16, kernels",
            *(share(half(*shape, ours=True), aim) for shape, aim in zip(ON_A_GPU, HALF, strict=True)),
        ],
        [
            "`ResidualStack` in fp32, kernels, over the plain stack",
            *(share(predict_gpu.predict_own(*shape), aim) for shape, aim in zip(ON_A_GPU, OWN, strict=True)),
        ],
    ]
    head = ["whole / bare (predicted)", *map(str, ON_A_GPU)]
    yield "\n".join(map(line, [head, ["---"] * len(head), *shares]))


def written() -> list[list[list[str]]]:
    """The cells of both tables as the README has them, without their heads."""
    found = []
    for table in _TABLE.findall(README.read_text(encoding="utf-8")):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
        found.append(rows[2:])
    return found


_TABLE = re.compile(r"^\| (?:fp32, \(L, T, d, n\)|whole / bare \(predicted\)) \|.*(?:\n\|.*)+", re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write them into the README")
    parser.add_argument("--check", action="store_true", help="compare them with the README")
    args = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    made = list(tables())
    assert len(made) == len(_TABLE.findall(before))
    rest = iter(made)
    after = _TABLE.sub(lambda _: next(rest), before)
    print("\n\n".join(made))
    if args.write:
        README.write_text(after, encoding="utf-8")
    elif args.check and after != before:
        print(
            "the README of the room moments has other figures: python benchmarks/gpu_readme.py --write",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
