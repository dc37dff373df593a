"""Probe activations that are generated as they are read, more than memory holds, and print the peak.

    python benchmarks/saved_activations.py [--gigabytes 20] [--memory 512MiB]

Each layer is an object with a shape, a dtype and ``[...]``, as readers of other formats are.
No two batches are equal.
"""

import argparse
import json
import resource
import sys
import time

import numpy as np
import torch

import rgfast

LAYERS, LENGTH, WIDTH = 12, 64, 64


class Generated:
    """Rows ``[n, T, D]`` of a layer that are drawn when they are asked for: a few directions and noise."""

    dtype = np.float32

    def __init__(self, layer: int, sequences: int) -> None:
        self.shape = (sequences, LENGTH, WIDTH)
        draw = np.random.default_rng(layer)
        self.noise = draw.standard_normal((256, LENGTH, WIDTH), dtype=np.float32)
        self.read = 0

    def __getitem__(self, part: slice) -> np.ndarray:
        sequences = np.arange(*part.indices(self.shape[0]))
        scale = 1 + 0.5 * np.sin(sequences, dtype=np.float32)
        self.read += len(sequences)
        return self.noise[sequences % 256] * scale[:, None, None]


def measured(gigabytes: float, memory: str) -> dict[str, float]:
    """Seconds, bytes read and bytes that the process took at most, before and after."""
    sequences = int(gigabytes * 1e9 / (4 * LAYERS * LENGTH * WIDTH))
    layers = {f"layer.{k}": Generated(k, sequences) for k in range(LAYERS)}
    # Of all that is read, what is measured takes little time: it is memory that is looked at.
    options = {"positions": ["last"], "views": ["position"], "memory": memory, "progress": False}
    rgfast.probe(rgfast.Activations({k: torch.randn(300, LENGTH, WIDTH) for k in layers}), **options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    acts = rgfast.Activations(layers, "N T D")
    result = rgfast.probe(acts, **options)
    assert {x.read for x in layers.values()} == {sequences}
    assert int(result.dataset.n.max()) == sequences
    return {
        "seconds": time.perf_counter() - start,
        "read": float(acts.nbytes),
        "before": float(before),
        "peak": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        "effective_rank": float(result.order_parameter("position")[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--memory", default="512MiB")
    args = parser.parse_args()
    json.dump(measured(args.gigabytes, args.memory), sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
