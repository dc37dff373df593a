"""Tokens a second that a 16-state chain samples, by number of sequences: many short ones to few long ones.

python benchmarks/bench_sampling.py [--threads N]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from rgfast import MarkovChain

SHAPES = ((100_000, 12), (2_048, 12), (1_000, 1_000), (256, 1_000), (128, 12), (32, 10_000))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chain = MarkovChain.from_correlation_length(7.0)
    generator = torch.Generator().manual_seed(0)
    seconds: dict[tuple[int, int], list[float]] = {shape: [] for shape in SHAPES}
    for _ in range(args.rounds + 1):
        for shape in SHAPES:
            start = time.perf_counter()
            tokens = chain.sample(*shape, generator)
            seconds[shape].append(time.perf_counter() - start)
            assert tokens.shape == shape
    print(f"threads {args.threads}, torch {torch.__version__}, median of {args.rounds} interleaved rounds")
    for (n, length), taken in seconds.items():
        rate = n * length / statistics.median(taken[1:]) / 1e6
        print(f"{n:>7} x {length:<6} {rate:6.1f} M tokens/s{'' if rate >= 10 else '  below the aim of 10'}")


if __name__ == "__main__":
    main()
