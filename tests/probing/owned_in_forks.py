"""Run by test_probe_owners: forked ranks that share out the layers; prints what came of them as JSON.

Several cases share one start of the ranks, which is what takes time."""

import hashlib
import json
import sys
import tempfile
import time

import numpy as np
import torch
from launch import make_forkable
from ranks_in_forks import TIMEOUT, batches, build, forked, furthest
from torch import nn
from torch.distributed.fsdp import fully_shard

import rgfast

TOKENS = {
    "mask": "mask", "rows": {"label 1": ("label", 1), "last": "last"}, "positions": [0, 3],
    "progress": False, "timeout": TIMEOUT,
}  # fmt: skip
# With a sixteenth of this for rows held back, every few batches are handed over.
SHARED = {"owner": "layers", "memory": "400KiB"}


class Blocks(nn.Module):
    """Layers of several widths: one deficient, one nearly so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.Sequential(
            nn.Linear(5, 9), nn.LayerNorm(9), nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 7)
        ).double()

    def forward(self, x):
        return self.layers(x)


WIDTHS = {
    "layers": ["layers.0", "layers.1", "layers.3", "layers.4"],
    "views": ["position", "pooled", "mean_pooled"], "progress": False,
}  # fmt: skip
CUTS = {2: [0, 17, 60], 4: [0, 11, 11, 12, 60]}


def rows():
    torch.manual_seed(6)
    return torch.randn(60, 8, 5, dtype=torch.float64) * torch.tensor([1.0, 1.0, 1.0, 1e-1, 2e-4]).double()


class Step(nn.Module):
    """Keeps its input well conditioned."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + 0.1 * torch.tanh(self.linear(x))


class Wide(nn.Module):
    """Its state fits four ranks, or two, and not one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.blocks = nn.ModuleList(Step(48) for _ in range(11)).double()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


WIDE = {
    "views": ["pooled"], "refine": False, "memory": "400KiB", "progress": False,
}  # fmt: skip


def wide_rows():
    torch.manual_seed(8)
    return torch.randn(256, 2, 48, dtype=torch.float64)


def found(result):
    """All arrays of a result, and a digest of them."""
    arrays = {name: result.dataset[name].values.astype(float) for name in sorted(result.dataset.data_vars)}
    total = hashlib.sha256()
    for name, array in arrays.items():
        total.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return arrays, total.hexdigest()


def refused(work):
    """What ``work`` raises."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def loop(rank, size):
    """A loop of one's own, read in the midst and at the end."""
    model, part = Blocks().eval(), rows()[CUTS[size][rank] : CUTS[size][rank + 1]]
    asked = {**WIDTHS, "owner": "layers", "memory": "200KiB", "timeout": TIMEOUT}
    with rgfast.Probe(model, **asked) as p, torch.no_grad():
        for some in part[: len(part) // 2].split(3):
            model(some)
        early = p.result()
        for some in part[len(part) // 2 :].split(3):
            model(some)
    return int(early.dataset.attrs["sequences"]), found(p.result())


def sharded(rank, size):
    model = build()
    for block in model.stack.blocks:
        fully_shard(block)
    return found(rgfast.probe(fully_shard(model), batches(rank, size, 30), **TOKENS, **SHARED))


def wide(rank, size):
    """What does not fit one rank, by itself and with the others; and what each of them held and sent."""
    part, model = wide_rows().chunk(size)[rank], Wide()
    asked = {**WIDE, "batch_size": 8, "timeout": TIMEOUT}
    alone = refused(lambda: rgfast.probe(model, part, distributed=False, **asked))
    copies = refused(lambda: rgfast.probe(model, part, owner="ranks", **asked))
    held = []
    with rgfast.Probe(model, **WIDE, timeout=TIMEOUT) as p, torch.no_grad():
        for some in part.split(1):
            model(some)
            held.append(p.nbytes)
        p.result()
    handed = p.ranks.sent
    grouped = refused(lambda: rgfast.probe(model, part, groups=2, **asked))
    return alone, copies, grouped, max(held), handed, found(rgfast.probe(model, part, **asked))


def uneven(rank, size):
    """A layer that is not finite on one rank."""
    model = Blocks()
    asked = {**WIDTHS, "owner": "layers", "timeout": TIMEOUT}
    if rank == 1:
        model.layers[3].register_forward_hook(lambda *args: args[2] * float("nan"))
    part = rows()[:20] if rank < 2 else rows()[:0]
    return refused(lambda: rgfast.probe(model, part, batch_size=4, **asked))


class Leaves(Blocks):
    """Leaves out a layer of a batch of one sequence."""

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            if number != 3 or len(x) > 1:
                x = layer(x)
        return x


def left_out(rank, size):
    """A layer that does not run in one rank's last forward."""
    asked = {**WIDTHS, "owner": "layers", "timeout": TIMEOUT}
    part = rows()[:9] if rank == 1 else rows()[:8]
    return refused(lambda: rgfast.probe(Leaves(), part, batch_size=4, **asked))


def work(rank, size):
    """All cases; every rank goes through them in the same order."""
    first = rgfast.probe(build(), batches(rank, size), **TOKENS, **SHARED)
    again = rgfast.probe(build(), batches(rank, size), **TOKENS, **SHARED)
    part = rows()[CUTS[size][rank] : CUTS[size][rank + 1]]
    asked = {**WIDTHS, "owner": "layers", "batch_size": 4, "timeout": TIMEOUT}
    few = {**asked, "layers": ["layers.0", "layers.4"], "measures": "effective_rank"}
    return {
        "tokens": found(first),
        "again": found(again)[1],
        "kept": [first.moments is None, first.notes[-1]],
        "sharded": sharded(rank, size),
        "widths": found(rgfast.probe(Blocks(), part, memory="200KiB", **asked)),
        "few layers": found(rgfast.probe(Blocks(), part, **few)),
        "loop": loop(rank, size),
        "wide": wide(rank, size),
        "snapshot": refused(lambda: snapshot(part)),
        "not finite": uneven(rank, size),
        "left out": left_out(rank, size),
    }


def snapshot(part):
    with rgfast.Probe(Blocks(), **WIDTHS, owner="layers", timeout=TIMEOUT) as p:
        p.run(part)
    p.result()
    p.snapshot()


def alone():
    """The same of one process."""
    whole = rows()
    few = {**WIDTHS, "layers": ["layers.0", "layers.4"], "measures": "effective_rank"}
    both = {
        "tokens": rgfast.probe(build(), batches(0, 1, 64), **TOKENS),
        "widths": rgfast.probe(Blocks(), whole, **WIDTHS),
        "few layers": rgfast.probe(Blocks(), whole, **few),
        "wide": rgfast.probe(Wide(), wide_rows(), **{**WIDE, "memory": "4GiB", "route": "moments"}),
    }
    out = {name: found(result)[0] for name, result in both.items()}
    return out | {"sharded": out["tokens"], "loop": out["widths"]}


def main():
    make_forkable()
    want, out = alone(), {}
    plan = rgfast.plan_cluster(
        layers=12, width=48, tokens=512, length=2, ranks=4, views=["pooled"], refine=False, device="cpu",
        memory="400KiB", activation_bytes=8, batch=2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for size in CUTS:
            start = time.monotonic()
            ranks = forked(size, work, folder)
            assert all(error is None for _, error, _, _ in ranks), [error for _, error, _, _ in ranks]
            got = [value for value, _, _, _ in ranks]
            results = {
                name: [one[name] for one in got] for name in ("tokens", "sharded", "widths", "few layers")
            }
            results |= {name: [one[name][-1] for one in got] for name in ("loop", "wide")}
            out[size] = {
                "furthest": {name: furthest(of[0][0], want[name]) for name, of in results.items()},
                "digests": {name: len({digest for _, digest in of}) for name, of in results.items()},
                "again": [one["tokens"][1] == one["again"] for one in got],
                "early": [one["loop"][0] for one in got],
                "refused": [one["wide"][:3] for one in got],
                "held": [one["wide"][3] for one in got],
                "handed": sum(one["wide"][4] for one in got),
                **{
                    name: [one[name] for one in got]
                    for name in ("kept", "snapshot", "not finite", "left out")
                },
            }
            print(size, "ranks", round(time.monotonic() - start, 2), "s", file=sys.stderr)
    shared = next(option for option in plan.options if "owner='layers'" in option.call)
    out["plan"] = {"state": shared.state_bytes, "network": shared.network_bytes, "best": plan.best is shared}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
