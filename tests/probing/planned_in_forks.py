"""Run by test_cluster: probes by forked ranks whose memory and traffic are measured; prints them, and what
the plan and the run's own note say of the same numbers, as JSON."""

import json
import os
import re
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from launch import make_forkable
from ranks_in_forks import TIMEOUT, forked
from torch import nn

import rgfast
from rgfast.probing.options import parse_memory

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


class Counted(dist.ProcessGroupGloo):
    """Counts the bytes that move, by whatever way there is."""

    sent = received = 0

    def send(self, tensors, *args):
        Counted.sent += sum(x.nbytes for x in tensors)
        return super().send(tensors, *args)

    def recv(self, tensors, *args):
        Counted.received += sum(x.nbytes for x in tensors)
        return super().recv(tensors, *args)

    def alltoall_base(self, into, out, coming, going, *args):
        Counted.sent += out.nbytes - going[self.rank()] * out.element_size()
        Counted.received += into.nbytes - coming[self.rank()] * into.element_size()
        return super().alltoall_base(into, out, coming, going, *args)

    def _uncounted(self, *args, **more):
        raise AssertionError("count this way of moving bytes, too")

    allgather = allreduce = alltoall = broadcast = gather = reduce = reduce_scatter = scatter = _uncounted


def stated(notes, size, sequences):
    """The peak, the bytes between all ranks and those through the busiest, that a run's notes state."""
    amount = r"([\d.]+ \w*B)"
    for note in notes:
        if found := re.search(
            rf"takes at most {amount} on each and moves about {amount} between all of them, {amount} through",
            note,
        ):
            return [parse_memory(text) for text in found.groups()]
        if found := re.search(
            rf"at most {amount} with what solves spectra; about {amount} per sequence .* and {amount} in the",
            note,
        ):
            peak, each, end = (parse_memory(text) for text in found.groups())
            return [peak, each * sequences + end, None]


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
        dist.distributed_c10d.ProcessGroupGloo = Counted
        with (
            rgfast.Probe(model, layers=layer, progress=False, timeout=TIMEOUT, **asked) as p,
            torch.no_grad(),
        ):
            for part in x.split(20):
                model(part)
        # Rows on their way are no part of what the probe says that it holds.
        state = resident("VmHWM") - before if asked.get("owner") else p.nbytes
        found, peak = p.result(), resident("VmHWM") - before
        assert (p.ranks.sent, p.ranks.received) == (Counted.sent, Counted.received)
        return state, peak, Counted.sent, Counted.received, stated(found.notes, size, size * number)

    return work


def main():
    make_forkable()
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
            states, peaks, sent, received, notes = zip(*(value for value, _, _, _ in ranks), strict=True)
            options = [one for one in plan.options if ("owner='layers'" in one.call) == (owner == "layers")]
            first, (peak, network, through) = options[0], notes[0]
            assert notes == (notes[0],) * size
            busiest = max(a + b for a, b in zip(sent, received, strict=True))
            out[name] = {
                "state": [max(states), first.state_bytes],
                "peak": [max(peaks), first.peak_bytes, peak],
                "network": [sum(sent), first.network_bytes, network],
                "through": [busiest, first.through_bytes, *([] if through is None else [through])],
            }
    print(json.dumps(out))


if __name__ == "__main__":
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    main()
