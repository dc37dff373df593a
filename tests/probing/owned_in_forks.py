"""Run by test_probe_owners: forked ranks that share out the layers; prints what came of them as JSON.

Several cases share one start of the ranks, which is what takes time."""

import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from launch import SHORT, TIMEOUT, make_forkable
from ranks_in_forks import batches, build, data, forked, furthest, options
from torch import nn
from torch.distributed.fsdp import fully_shard

import rgfast
from rgfast.probing import checkpoint as checkpoints
from rgfast.probing.exchange import Exchange
from rgfast.probing.owners import Owners

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
FOLDER = ""
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
    listed = refused(
        lambda: rgfast.probe(model, part, pairs=[(0, 2), *((k, k + 1) for k in range(11))], **asked)
    )
    return alone, copies, listed, max(held), handed, found(rgfast.probe(model, part, **asked))


def in_background(rank, size):
    """Forwards that rank 0 runs while rows are on their way to ranks that do not take them yet, and the most
    that any rank held."""
    flag, peak = Path(tempfile.gettempdir()) / f"rgfast-beside-{os.getppid()}-{size}", Peak()
    flag.unlink(missing_ok=True) if rank == 0 else None
    beside, part, model = 0, wide_rows().chunk(size)[rank], Wide()
    asked = {**WIDE, "owner": "layers", "memory": "1MiB"}
    with peak, rgfast.Probe(model, **asked, timeout=TIMEOUT) as p, torch.no_grad():
        for number, some in enumerate(part.split(1)):
            if number == 1 and rank:
                until(flag.exists)
            pending = peak.pending
            model(some)
            beside += pending
            if rank == 0 and beside == 2:
                flag.touch()
    result = p.result()
    flag.unlink(missing_ok=True)
    return beside, peak.bytes, result.notes[-1]


class Peak:
    """The most bytes that :class:`Owners` say they hold, asked whenever rows go out or are summed up."""

    def __init__(self):
        self.bytes, self.owners = 0, None

    @property
    def pending(self):
        return self.owners is not None and self.owners._exchange.pending

    def __enter__(self):
        self._was = Owners._turn, Owners._sum_up, Exchange.start
        turn, sums, start = self._was

        def turning(owners, what):
            self.owners = owners
            turn(owners, what)

        def starting(exchange, said, messages):
            going = sum(message.nbytes for message in messages if message is not None)
            if self.owners is not None:
                self.bytes = max(self.bytes, self.owners.nbytes + going)
            start(exchange, said, messages)

        def summing(owners, came):
            if came and owners._exchange.pending:
                owners._exchange.said()  # so that what comes next is counted
            self.bytes = max(self.bytes, owners.nbytes)
            sums(owners, came)

        Owners._turn, Owners._sum_up, Exchange.start = turning, summing, starting
        return self

    def __exit__(self, *args):
        Owners._turn, Owners._sum_up, Exchange.start = self._was


def until(true):
    end = time.monotonic() + 5 * SHORT
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def left(rank, size, leaves):
    """What every rank raises if one leaves while rows are on their way, and what is still at work then."""
    peak, flag = Peak(), Path(tempfile.gettempdir()) / f"rgfast-left-{os.getppid()}-{leaves.__name__}"

    def loop():
        with rgfast.Probe(Wide(), **WIDE, timeout=SHORT) as p, torch.no_grad():
            for number, some in enumerate(wide_rows().split(1) * 100):
                p.model(some)
                if rank == 0 and peak.pending:
                    flag.touch()
                    time.sleep(0.01)
                if rank == 1 and number == 1:
                    until(flag.exists)
                    leaves()

    with peak:
        said = refused(loop)
    flag.unlink(missing_ok=True)
    return said, [thread.name for thread in threading.enumerate() if thread.name == "rgfast-rows"]


def raises():
    raise ValueError("enough")


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


def uneven(rank, size):
    """A layer that is not finite on one rank."""
    model = Blocks()
    asked = {**WIDTHS, "owner": "layers", "timeout": TIMEOUT}
    if rank == 1:
        model.layers[3].register_forward_hook(lambda *args: args[2] * float("nan"))
    part = rows()[:20] if rank < 2 else rows()[:0]
    return refused(lambda: rgfast.probe(model, part, batch_size=4, **asked))


def grouped(rank, size):
    """Error bars and fits: of batches whose number is known, and of others; stopped and gone on with; and
    more groups than a rank has sequences."""
    asked = options(rank, size) | {"pairs": "adjacent", "owner": "layers", "memory": "1MiB"}
    known = rgfast.probe(build(), list(batches(rank, size)), **asked)
    path = Path(FOLDER) / f"grouped{size}.checkpoint"

    def stream(stops=None):
        for number, batch in enumerate(batches(rank, size)):
            if number == stops and rank == 0:
                raise ValueError("stopped")
            yield batch

    def run(stops=None):
        return rgfast.probe(build(), stream(stops), checkpoint=path, checkpoint_every=1, **asked)

    stopped = refused(lambda: run(3))
    unknown, asked = run(), {**WIDTHS, "owner": "layers", "groups": 5, "timeout": TIMEOUT}
    few = refused(lambda: rgfast.probe(Blocks(), iter([rows()[: 8 if rank == 0 else 3]]), **asked))
    return found(known), list(known.notes), stopped, found(unknown), list(unknown.notes), few


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


def saved(rank, size):
    """Checkpoints of runs that are stopped in the midst, of one that fails while the files are written, and
    of one whose files are no longer all there."""
    part = rows()[CUTS[size][rank] : CUTS[size][rank + 1]]
    asked = {**WIDTHS, "owner": "layers", "memory": "200KiB", "batch_size": 2, "timeout": TIMEOUT}
    folder, out = Path(FOLDER), {}

    def run(name, stops=None, **more):
        def stream():
            for number, batch in enumerate(part.split(2)):
                if number == stops and rank == size - 1:
                    raise ValueError("stopped")
                if len(batch):
                    yield batch

        path, model, forwards = folder / f"{name}{size}.checkpoint", Blocks(), []
        model.register_forward_hook(lambda *args: forwards.append(0))
        result = rgfast.probe(model, stream(), checkpoint=path, checkpoint_every=3, **asked | more)
        return found(result)[1], len(forwards)

    write, calls = checkpoints.write, []

    def failing(path, header, arrays):
        calls.append(path)
        if rank == 1 and len(calls) == 2:
            raise OSError("disk full")
        write(path, header, arrays)

    out["whole"] = found(rgfast.probe(Blocks(), part, **asked))[0]
    out["runs"] = [run("whole")]
    out["stopped"] = refused(lambda: run("cut", 13))
    out["runs"] += [run("cut"), run("cut")]
    checkpoints.write = failing
    out["failed"] = refused(lambda: run("torn"))
    checkpoints.write = write
    out["runs"].append(run("torn"))
    dist.barrier()
    out["files"] = sorted(path.name for path in folder.glob(f"*{size}.checkpoint*"))
    dist.barrier()
    if rank == 1:
        (folder / f"cut{size}.checkpoint.rank1of{size}").unlink()
    dist.barrier()
    out["missing"] = refused(lambda: run("cut"))
    out["other"] = refused(lambda: run("whole", owner="ranks"))

    def sharded(stops, name="sharded"):
        model = build()
        for block in model.stack.blocks:
            fully_shard(block)

        def stream():
            for number, batch in enumerate(batches(rank, size, 12)):
                if number == stops and rank == size - 1:
                    raise ValueError("stopped")
                yield batch

        path = folder / f"{name}{size}.checkpoint"
        asked = {**TOKENS, **SHARED, "checkpoint": path, "checkpoint_every": 2}
        return found(rgfast.probe(fully_shard(model), stream(), **asked))[1]

    out["sharded"] = [sharded(None, "straight"), refused(lambda: sharded(2)), sharded(None)]
    return out


def snapshots(rank, size):
    """A loop that goes on after a snapshot, and another from there."""
    part = rows()[CUTS[size][rank] : CUTS[size][rank + 1]]
    asked = {**WIDTHS, "owner": "layers", "memory": "200KiB", "timeout": TIMEOUT}

    def go(p, some):
        for batch in some.split(3):
            if len(batch):
                p.model(batch)

    half = len(part) // 2
    with rgfast.Probe(Blocks().eval(), **asked) as p, torch.no_grad():
        go(p, part[:half] if size == 2 or rank else part)
        header, arrays = p.snapshot()
        go(p, part[half:] if size == 2 or rank else part[:0])
    first = found(p.result())
    with rgfast.Probe(Blocks().eval(), **asked) as p, torch.no_grad():
        p.restore(json.loads(json.dumps(header)), arrays)
        go(p, part[half:] if size == 2 or rank else part[:0])
    second = found(p.result())

    def apart():
        with rgfast.Probe(Blocks().eval(), **asked) as p, torch.no_grad():
            go(p, part if rank else rows()[:4])
            p.snapshot() if rank else p.result()

    return first[0], first[1] == second[1], refused(apart)


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
        "grouped": grouped(rank, size),
        "beside": in_background(rank, size),
        "saved": saved(rank, size),
        "snapshots": snapshots(rank, size),
        "not finite": uneven(rank, size),
        "left out": left_out(rank, size),
    }


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
    asked = options(0, 1) | {"pairs": "adjacent"}
    out["grouped"] = found(rgfast.probe(build(), batches(0, 1, 64), **asked))[0]
    # Groups of two ranks that number sequences each from 0 are those of one with 123 sequences, then 77.
    turned = torch.cat([torch.arange(77, 200), torch.arange(77)])
    for name, chosen in (("rows", "odd"), ("targets", "vectors"), ("targets", "label")):
        asked[name] = {**asked[name], chosen: asked[name][chosen][turned]}
    out["turned"] = found(rgfast.probe(build(), {k: v[turned] for k, v in data().items()}, **asked))[0]
    return out | {"sharded": out["tokens"], "loop": out["widths"]}


def main():
    make_forkable()
    want, out = alone(), {}
    plan = rgfast.plan_cluster(
        layers=12, width=48, tokens=512, length=2, ranks=4, views=["pooled"], refine=False, device="cpu",
        memory="400KiB", activation_bytes=8, batch=2,
    )  # fmt: skip
    global FOLDER
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = folder
        for size in CUTS:
            start = time.monotonic()
            ranks = forked(size, work, folder)
            assert all(error is None for _, error, _, _ in ranks), [error for _, error, _, _ in ranks]
            got = [value for value, _, _, _ in ranks]
            results = {
                name: [one[name] for one in got] for name in ("tokens", "sharded", "widths", "few layers")
            }
            results |= {name: [one[name][-1] for one in got] for name in ("loop", "wide")}
            for number, name in ((0, "grouped"), (3, "turned")):
                if name == "grouped" or size == 2:
                    results[name] = [one["grouped"][number] for one in got]
            of = [one["saved"].pop("whole") for one in got] + [one["snapshots"][0] for one in got]
            out[size] = {
                "furthest": {name: furthest(of[0][0], want[name]) for name, of in results.items()},
                "digests": {name: len({digest for _, digest in of}) for name, of in results.items()},
                "saved": [one["saved"] for one in got],
                "snapshots": [one["snapshots"][1:] for one in got],
                "saved and snapshots": max(furthest(one, want["widths"]) for one in of),
                "error bars": [[*one["grouped"][1:3], *one["grouped"][4:]] for one in got],
                "again": [one["tokens"][1] == one["again"] for one in got],
                "early": [one["loop"][0] for one in got],
                "refused": [one["wide"][:3] for one in got],
                "held": [one["wide"][3] for one in got],
                "handed": sum(one["wide"][4] for one in got),
                **{name: [one[name] for one in got] for name in ("kept", "beside", "not finite", "left out")},
            }
            print(size, "ranks", round(time.monotonic() - start, 2), "s", file=sys.stderr)
        for leaves in (raises, dies):
            ranks = forked(2, lambda rank, size, how=leaves: left(rank, size, how), folder)
            out[leaves.__name__] = [(value, error) for value, error, _, _ in ranks]
    shared = next(option for option in plan.options if "owner='layers'" in option.call)
    out["plan"] = {"state": shared.state_bytes, "network": shared.network_bytes, "best": plan.best is shared}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
