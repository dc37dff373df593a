"""Run by test_cluster: probes by forked ranks whose memory and traffic are measured; prints them, and what
the plan says of the same numbers, as JSON."""

import json
import os
import re
import tempfile
import threading
from pathlib import Path

import torch
from ranks_in_forks import TIMEOUT, forked
from torch import nn
from tqdm import tqdm

import rgfast

CASES = {
    "pooled": (2, 300, {"layers": 7, "width": 416, "length": 4}, {"views": ["pooled"], "refine": False}),
    "in groups": (
        4, 160, {"layers": 5, "width": 150, "length": 6},
        {"views": ["position", "pooled", "mean_pooled"], "groups": 2, "refine": False},
    ),
    "factors": (2, 200, {"layers": 5, "width": 330, "length": 3}, {"views": ["pooled"], "refine": True}),
    "all pairs": (
        2, 120, {"layers": 6, "width": 290, "length": 2},
        {"views": ["pooled"], "pairs": "all", "refine": False},
    ),
    "shared out": (
        2, 300, {"layers": 11, "width": 430, "length": 3},
        {"views": ["pooled"], "refine": False, "owner": "layers", "memory": "96MiB"},
    ),
}  # fmt: skip


class Scaled(nn.Module):
    """Blocks without products, so that a forward takes next to no memory."""

    def __init__(self, depth):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Softsign() for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = x + 0.1 * block(x)
        return x


def resident(name):
    """``VmRSS`` or ``VmHWM`` of this process, bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1])


def measured(number, shape, asked):
    layers, width, length = shape["layers"], shape["width"], shape["length"]
    layer = ["blocks.0:input", *(f"blocks.{k}" for k in range(layers - 1))]

    def work(rank, size):
        model = Scaled(layers - 1)
        x = torch.randn(
            number, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)
        )
        if asked.get("refine"):
            x[..., 0] = x[..., 1:].sum(-1)  # deficient, so that factors are kept
        rgfast.probe(
            Scaled(2),
            torch.randn(64, 2, 16),
            layers=["blocks.0", "blocks.1"],
            distributed=False,
            progress=False,
        )
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins here
        before = resident("VmRSS")
        with (
            rgfast.Probe(model, layers=layer, progress=False, timeout=TIMEOUT, **asked) as p,
            torch.no_grad(),
        ):
            for part in x.split(20):
                model(part)
        # Rows on their way are no part of what the probe says that it holds.
        state = resident("VmHWM") - before if asked.get("owner") else p.nbytes
        p.result()
        return state, resident("VmHWM") - before, p.ranks.sent, p.ranks.received

    return work


def main():
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (size, number, shape, asked) in CASES.items():
            owner = asked.get("owner", "ranks")
            plan = rgfast.plan_cluster(
                ranks=size,
                tokens=size * number * shape["length"],
                device="cpu",
                activation_bytes=8,
                batch=20 * shape["length"],
                **shape,
                **{name: value for name, value in asked.items() if name != "owner"},
            )
            ranks = forked(size, measured(number, shape, asked), folder)
            assert all(error is None for _, error, _, _ in ranks), ranks
            states, peaks, sent, received = zip(*(value for value, _, _, _ in ranks), strict=True)
            options = [one for one in plan.options if ("owner='layers'" in one.call) == (owner == "layers")]
            first = options[0]
            out[name] = {
                "state": [max(states), first.state_bytes],
                "peak": [max(peaks), first.peak_bytes],
                "network": [sum(sent), first.network_bytes],
                "through": [max(a + b for a, b in zip(sent, received, strict=True)), first.through_bytes],
            }
    print(json.dumps(out))


if __name__ == "__main__":
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    main()
