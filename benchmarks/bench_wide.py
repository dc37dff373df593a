"""Very wide: the stochastic effective rank of a formed second moment against every eigenvalue of it.

`bench_wide.py [--d 8192]`; one run each, both on all threads; the moment is formed outside of the timings.
"""

from __future__ import annotations

import argparse
import time

import torch

import rgfast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    d = args.d
    draw = torch.Generator().manual_seed(args.seed)
    scale = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    x = torch.randn(d, d, generator=draw, dtype=torch.float64) * scale
    moment = x.T @ x
    rgfast.effective_rank_estimate(moment[:256, :256])  # first calls pay for what is loaded once

    start = time.perf_counter()
    estimate = rgfast.effective_rank_estimate(moment)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    eigenvalues = torch.linalg.eigvalsh(moment)
    library = time.perf_counter() - start

    sigma = eigenvalues.clamp_min(0).sqrt()
    truth = float(torch.special.entr(sigma / sigma.sum()).sum().exp())
    held = "holds" if estimate.low <= truth <= estimate.high else "misses"
    print(f"d = {d}, {torch.get_num_threads()} threads: {ours / library:.3f} of the time of eigvalsh")
    print(
        f"[{estimate.low:.2f}, {estimate.high:.2f}] around {estimate.value:.2f} {held} the truth {truth:.2f}"
    )


if __name__ == "__main__":
    main()
