"""Does the interval of `effective_rank_estimate` hold the truth? `coverage_spectrum.py [--seed N]`

Second moments with known eigenvalues, applied as an operator in their own basis (the probes are isotropic, so
the basis does not matter), the trials spread over five spectra, each with another seed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch

import rgfast


def spectra(d: int) -> dict[str, torch.Tensor]:
    """Singular values of every kind, fp64 `[d]`."""
    i = torch.arange(1, d + 1, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(d, 2 * d, generator=draw, dtype=torch.float64) / math.sqrt(2 * d)
    sample = rgfast.singular_values(noise, centering="none", method="gram")
    rank = d // 64
    return {
        "isotropic": sample,
        "1/i": 1 / i,
        "1/i^2": i**-2,
        "exponential": torch.exp(-20 * i / d),
        "low rank + noise": torch.cat(
            [torch.linspace(2, 1, rank, dtype=torch.float64), 1e-2 * sample[rank:]]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d", type=int, default=2048)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial of every spectrum")
    args = parser.parse_args()
    held = done = 0
    for name, sigma in spectra(args.d).items():
        eigenvalues = sigma.square()[:, None]
        truth = math.exp(float(torch.special.entr(sigma / sigma.sum()).sum()))
        inside, errors, widths, start = 0, [], [], time.perf_counter()
        trials = args.trials // 5
        for seed in range(args.seed, args.seed + trials):
            e = rgfast.effective_rank_estimate(
                lambda v, eigenvalues=eigenvalues: eigenvalues * v, args.d, seed=seed
            )
            inside += e.low <= truth <= e.high
            errors.append(abs(e.value / truth - 1))
            widths.append((e.high - e.low) / (2 * truth))
        held, done = held + inside, done + trials
        each = (time.perf_counter() - start) / trials
        print(
            f"{name:18s} truth {truth:9.3f}  held {inside}/{trials}  error "
            f"{statistics.median(errors):.1e}  half-width {statistics.median(widths):.1e}  {each:.1f} s each",
            flush=True,
        )
    print(f"d={args.d}: the 95% interval held the truth in {held}/{done} trials ({held / done:.1%})")


if __name__ == "__main__":
    main()
