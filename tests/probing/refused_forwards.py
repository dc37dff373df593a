"""Models under FSDP2 whose forwards a rank without a batch cannot take part in; for sharded_in_forks."""

import datetime
import time

import torch
import torch.distributed as dist
from launch import SHORT
from torch import nn
from torch.distributed.fsdp import fully_shard

import rgfast


class Synced(nn.SyncBatchNorm):
    """On the CPU, where torch's has no forward: centers by the mean of all ranks' rows."""

    def forward(self, x):
        mean = x.mean(0)
        dist.all_reduce(mean)
        return x - mean / dist.get_world_size()


def looped(model, given, **more):
    """The largest number of rows of a loop of one's own, or what it raised; in either case all ranks come."""
    try:
        with rgfast.Probe(model, progress=False, timeout=SHORT, **more) as p, torch.no_grad():
            for args in given:
                model(*args)
        found = int(p.result().dataset.n.max())
    except (ValueError, rgfast.probing.RankError) as error:
        found = f"{type(error).__name__}: {error}"
    dist.monitored_barrier(timeout=datetime.timedelta(seconds=20))  # or one is left in a forward
    return found


def mixed(rank, size):
    """SyncBatchNorm in training mode: as many batches on every rank, or else; of ranks that have none left
    one comes early and one late."""
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(rank))

    def model():
        torch.manual_seed(2)
        return fully_shard(nn.Sequential(nn.Linear(6, 6), Synced(6), nn.Linear(6, 6)).train())

    def given(number):
        for k in range(number):
            time.sleep(0.2 * (rank + k == 1))
            yield (x,)

    asked = {"layers": ["0", "1", "2"]}
    fewer = [looped(model(), given(2 + (rank == at)), **asked) for at in (0, size - 1)]
    none = looped(model(), given(min(rank, 1)), **asked)
    same, eval_mode = looped(model(), given(2), **asked), looped(model().eval(), given(rank), **asked)
    return {"refused": [*fewer, none], "counted": [same, eval_mode]}


class Applies(nn.Module):
    """Takes a function, which no other process can be sent."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x, function):
        return self.a(function(x))


class Unreadable:
    """Can be written, and not be read again."""

    def __reduce__(self):
        return int, ("none",)

    def __call__(self, x):
        return x


def unsent(rank, size):
    """Arguments that cannot be sent: at least one batch on every rank, or else."""
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(rank))

    def run(number, function):
        torch.manual_seed(3)
        return looped(fully_shard(Applies()), [(part, function) for part in x[:number]], layers=["a"])

    without = [run(2 * (rank != at), lambda x: x) for at in (0, size - 1)]
    unread = run(2 * (rank == 0), Unreadable())
    return {"refused": without, "unread": unread, "counted": run(1 + rank % 3, lambda x: x)}


def refused(rank, size):
    return {"mixed": mixed(rank, size), "unsent": unsent(rank, size)}
