"""Run by test_probe_distributed: probes by several forked ranks over gloo; prints what came of them as JSON.

torch is imported once; the environment gives every library one thread, so that forking is safe.
"""

import hashlib
import os
import signal
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from launch import SHORT, TIMEOUT, make_forkable, print_cases
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rgfast

SIZES = {1: [200], 2: [77, 123], 4: [70, 0, 101, 29]}
BATCH = 17


def build():
    """In fp64, so that how rows are cut into batches shows below the 1e-12 that is asked for."""
    torch.manual_seed(1)
    return rgfast.MaskedTokenModel(states=20, length=4, width=8, depth=2, w2_scale=0.5).double()


def data():
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 20, (200, 4), generator=g)
    return {
        "tokens": tokens,
        "mask": torch.rand(200, 4, generator=g) < 0.3,
        "attention_mask": torch.rand(200, 4, generator=g) < 0.9,
        # The highest label first comes late: in the last rank's shard.
        "label": torch.arange(200) // 70,
    }


def shard(rank, size):
    start = sum(SIZES[size][:rank])
    return slice(start, start + SIZES[size][rank])


def batches(rank, size, every=BATCH):
    """The rank's part of the data, in batches; padded to another length where the rank says so."""
    whole = {k: v[shard(rank, size)] for k, v in data().items()}
    for at in range(0, SIZES[size][rank], every):
        yield {k: v[at : at + every] for k, v in whole.items()}


def options(rank, size):
    vectors = torch.randn(200, 2, generator=torch.Generator().manual_seed(5))
    labels = data()["label"]
    return {
        "mask": "mask",
        "rows": {
            "label 1": ("label", 1),
            "last": "last",
            "odd": torch.arange(200)[shard(rank, size)] % 2 == 1,
        },
        "targets": {"vectors": vectors[shard(rank, size)], "label": labels[shard(rank, size)]},
        "groups": 3,
        "pairs": "all",
        "progress": False,
        "timeout": TIMEOUT,
    }


def measures_of(result):
    """All arrays of a result."""
    return {name: result.dataset[name].values.astype(float) for name in sorted(result.dataset.data_vars)}


def values(result):
    """All arrays of a result, and a digest of them and of its moments."""
    found = measures_of(result)
    total = hashlib.sha256()
    for name, array in [*found.items(), *sorted((result.moments or {}).items())]:
        total.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return found, total.hexdigest()


def forked(size, work, folder):
    """What ``work(rank, size)`` gave or raised on every rank: value or None, error, seconds, exit status."""
    store = tempfile.mktemp(dir=folder)
    start, children = time.monotonic(), []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            try:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
                dist.barrier()  # or one may be gone before the others have reached it
                out = (work(rank, size), None)
            except BaseException as error:
                out = (None, f"{type(error).__name__}: {error}")
                if os.environ.get("RANKS_DEBUG"):
                    traceback.print_exc()
            torch.save((*out, time.monotonic() - start), f"{store}.{rank}")
            os._exit(0)
        children.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    out = []
    for rank, status in enumerate(statuses):
        gave = (None, None, 0.0) if status else torch.load(f"{store}.{rank}", weights_only=False)
        out.append((*gave, status))
    return out


def furthest(found, wanted):
    """The largest difference of two results, relative to at least 1, over all that is measured."""
    worst = 0.0
    for name, want in wanted.items():
        if name.endswith("_bound") or name == "refined":
            continue  # what is known of the rounding errors depends on how the sums were made
        got = found[name]
        assert np.array_equal(np.isnan(got), np.isnan(want)), name
        error = np.nan_to_num(np.abs(got - want) / np.maximum(np.abs(want), 1))
        worst = max(worst, float(error.max(initial=0.0)))
    return worst


def agreement(folder):
    """1, 2 and 4 ranks against one process without torch.distributed, on the same sequences."""
    alone = values(rgfast.probe(build(), batches(0, 1, 64), **options(0, 1)))[0]
    out = {}
    for size in SIZES:
        ranks = forked(
            size, lambda r, s: values(rgfast.probe(build(), batches(r, s), **options(r, s))), folder
        )
        assert all(error is None for _, error, _, _ in ranks), ranks
        digests = {value[1] for value, _, _, _ in ranks}
        out[size] = [furthest(ranks[-1][0][0], alone), len(digests)]
    return out


class Blocks(nn.Module):
    """A stack with buffers, which DistributedDataParallel sends around in every forward of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh()) for _ in range(3)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def wrapped(folder):
    """A model in DistributedDataParallel, with batches that differ in number."""
    torch.manual_seed(0)
    model, x = Blocks().double(), torch.randn(150, 5, dtype=torch.float64)
    alone = values(rgfast.probe(model, x, progress=False))[0]

    def work(rank, size):
        part = x[:40] if rank == 0 else x[40:]
        result = rgfast.probe(
            DistributedDataParallel(model), part, batch_size=16, progress=False, timeout=TIMEOUT
        )
        return values(result)[0], list(result.layers)

    ranks = forked(2, work, folder)
    assert all(error is None for _, error, _, _ in ranks), ranks
    return furthest(ranks[0][0][0], alone), ranks[1][0][1]


def widths(folder):
    """Layers of several widths, deficient ones and ill-conditioned ones, of few rows; 1, 2 and 4 ranks."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Linear(5, 9), nn.LayerNorm(9), nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 7)
    ).double()
    x = torch.randn(60, 8, 5, dtype=torch.float64) * torch.tensor([1.0, 1.0, 1.0, 1e-1, 2e-4]).double()
    views = ["position", "pooled", "mean_pooled"]
    asked = {"groups": 5, "pairs": "all", "layers": ["0", "1", "3", "4"], "views": views, "progress": False}
    alone = values(rgfast.probe(model, x, **asked))[0]
    cuts = {1: [0, 60], 2: [0, 17, 60], 4: [0, 11, 11, 12, 60]}

    def work(rank, size):
        part = x[slice(*cuts[size][rank : rank + 2])]
        return values(rgfast.probe(model, part, batch_size=5, timeout=TIMEOUT, **asked))

    out = {}
    for size in SIZES:
        ranks = forked(size, work, folder)
        assert all(error is None for _, error, _, _ in ranks), ranks
        measured = {name: array for name, array in alone.items() if not name.endswith("_se")}
        out[size] = furthest(ranks[-1][0][0], measured), len({value[1] for value, _, _, _ in ranks})
    return out


def own_loop(folder):
    """A Probe in a loop of one's own, over a group of two of three ranks, read twice."""
    torch.manual_seed(0)
    model, x = Blocks().double(), torch.randn(90, 5, dtype=torch.float64)
    model.eval()

    def work(rank, size):
        pair = dist.new_group([0, 2])
        if rank == 1:
            return None
        with rgfast.Probe(model, progress=False, distributed=pair, timeout=TIMEOUT) as p:
            for part in x.split(30)[: 1 if rank == 0 else 3]:
                model(part)
            early = p.result().dataset.sizes, int(p.result().dataset.n.max())
            model(x[:5] if rank == 0 else x[:0])
        return early[1], int(p.result().dataset.n.max()), values(p.result())[1]

    ranks = forked(3, work, folder)
    assert all(error is None for _, error, _, _ in ranks), ranks
    return [ranks[0][0], ranks[2][0]]


def death(folder):
    """A rank of two kills itself; both start again, and again after all is done."""
    whole = forked(2, lambda r, s: values(rgfast.probe(build(), batches(r, s), **options(r, s)))[1], folder)
    path = Path(folder) / "run.checkpoint"

    def work(rank, size, dies=None):
        def stream():
            for number, batch in enumerate(batches(rank, size)):
                if number == dies and rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        limit = TIMEOUT if dies is None else SHORT
        asked = options(rank, size) | {"timeout": limit}
        result = rgfast.probe(build(), stream(), checkpoint=path, checkpoint_every=1, **asked)
        return values(result)[1]

    killed = forked(2, lambda r, s: work(r, s, 3), folder)
    again, third = forked(2, work, folder), forked(2, work, folder)
    digests = [[one[0] for one in ranks] for ranks in (whole, again, third)]
    files = sorted(p.name for p in Path(folder).glob("run.checkpoint*"))
    other = forked(1, work, folder)
    return {"killed": killed, "digests": digests, "files": files, "other": other[0][1]}


def telling(folder):
    """What every rank says where one of them raises, never comes, or was asked for something else."""

    def poisoned(rank, size):
        parts = list(batches(rank, size))
        model = build()
        if rank == 1:
            model.stack.blocks[1].register_forward_hook(lambda *args: args[2] * float("nan"))
        return rgfast.probe(model, parts, **options(rank, size))

    def absent(rank, size):
        if rank == 1:
            time.sleep(SHORT + 3)
            return None
        return rgfast.probe(build(), batches(rank, size), **options(rank, size) | {"timeout": SHORT})

    def other(rank, size):
        layers = "auto" if rank == 0 else ["stack.blocks.0", "stack.blocks.1"]
        return rgfast.probe(build(), batches(rank, size), layers=layers, **options(rank, size))

    def unknown(rank, size):
        layers = "auto" if rank == 0 else "no.such.layer"
        return rgfast.probe(build(), batches(rank, size), layers=layers, **options(rank, size))

    def weights(rank, size):
        model = build()
        with torch.no_grad():
            model.token_embedding[0, 0] += rank
        return rgfast.probe(model, batches(rank, size), **options(rank, size))

    def owner(rank, size):
        asked = {"owner": ("ranks", "auto")[rank], "timeout": SHORT}
        return rgfast.probe(build(), batches(rank, size), **options(rank, size) | asked)

    def nothing(rank, size):
        return rgfast.probe(build(), [], **options(rank, size) | {"targets": None})

    def alone(rank, size):
        if rank == 0:
            return len(rgfast.probe(build(), batches(0, 1), distributed=False, **options(0, 1)).layers)
        return None

    cases = (poisoned, absent, other, unknown, weights, owner, nothing, alone)
    return {case.__name__: forked(2, case, folder) for case in cases}


def lengths(folder):
    """Batches of another length on one rank: the flattened view goes, as it does in one process."""
    torch.manual_seed(0)
    model = rgfast.ResidualStack(width=4, depth=2, mixing="none", w2_scale=0.5).double()
    x = [torch.randn(40, 3, 4, dtype=torch.float64), torch.randn(60, 5, 4, dtype=torch.float64)]
    alone = rgfast.probe(model, x, progress=False)

    def work(rank, size):
        result = rgfast.probe(model, [x[rank]], progress=False, timeout=TIMEOUT)
        result.save(Path(folder) / f"saved{rank}.nc")
        result.report(Path(folder) / f"report{rank}.html")
        return values(result)[0], list(result.notes), list(result.views)

    ranks = forked(2, work, folder)
    assert all(error is None for _, error, _, _ in ranks), ranks
    cost, *notes = ranks[1][0][1]
    same = [
        cost.startswith("each of 2 ranks sums up all layers of its own sequences; adding up"),
        list(alone.notes) == notes,
        list(alone.views) == ranks[0][0][2],
    ]
    written = sorted(p.name for p in Path(folder).glob("*[01].*") if p.suffix in (".nc", ".html"))
    return furthest(ranks[0][0][0], values(alone)[0]), same, written


def main():
    make_forkable()
    print_cases(agreement, wrapped, widths, own_loop, death, telling, lengths)


if __name__ == "__main__":
    main()
