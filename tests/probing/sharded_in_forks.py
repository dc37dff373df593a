"""Run by test_probe_sharded: probes of models under FSDP2 by forked ranks over gloo; prints what came of them
as JSON. Several cases share one start of the ranks, which is what takes time."""

import os
import signal
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from launch import make_forkable, print_cases
from ranks_in_forks import SHORT, TIMEOUT, batches, build, forked, furthest, options, values
from refused_forwards import refused
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import rgfast
from rgfast.probing.checkpoint import model_digest
from rgfast.probing.controls import random_twin, random_weights


def shard(model, blocks, **asked):
    """The model under FSDP2, every block by itself."""
    for block in blocks:
        fully_shard(block, **asked)
    return fully_shard(model, **asked)


def masked(rank, size, **more):
    model = build()
    return rgfast.probe(shard(model, model.stack.blocks), batches(rank, size), **options(rank, size) | more)


def brief(rank, size, model, given=None, **more):
    """All values of a probe of two views."""
    asked = {"mask": "mask", "views": ["visible", "pooled"], "progress": False, "timeout": TIMEOUT}
    return rgfast.probe(model, given or batches(rank, size, 30), **asked | more)


def merging(rank, size):
    """Options under which results can be merged: labels are counted over all ranks' first batches."""
    asked = options(rank, size)
    vectors = {"vectors": asked["targets"]["vectors"]}
    return asked | {"targets": vectors, "rows": {"last": "last"}, "route": "moments"}


def merged(size):
    """The digest of one process that probes the shards one after the other and merges them in pairs, pairs of
    pairs and so on."""
    parts = []
    for rank in range(size):
        given = list(batches(rank, size))
        asked = merging(rank, size)
        parts.append(rgfast.probe(build(), given, distributed=False, **asked) if given else None)
    while len(parts) > 1:
        pairs = [[one for one in parts[k : k + 2] if one is not None] for k in range(0, len(parts), 2)]
        parts = [pair[0].merge(*pair[1:]) if len(pair) > 1 else pair[0] for pair in pairs]
    return values(parts[0])[1]


class Experts(nn.Module):
    """A block that sends each row to one of its experts, of which a batch may leave some without any."""

    def __init__(self, width=6, experts=4):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))
        self.register_buffer("routed", torch.zeros(experts))

    def forward(self, x):
        chosen = self.gate(self.norm(x)).argmax(-1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0]
            self.routed[k] += len(rows)
            if len(rows):
                out[rows] = expert(x[rows])
        return x + out


class Mixture(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.blocks = nn.ModuleList(Experts() for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def mixture():
    torch.manual_seed(2)
    return Mixture().double()


def rows_of(rank, size):
    """As many batches as the rank's number, so that rank 0 has none."""
    x = torch.randn(120, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [x[20 * k : 20 * k + 15 + k] for k in range(rank * (rank - 1) // 2, rank * (rank + 1) // 2)]


def counted(model):
    """How often each module that FSDP2 shards runs."""
    calls = {name: 0 for name, module in model.named_modules() if isinstance(module, FSDPModule)}

    def count(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    for name in calls:
        model.get_submodule(name).register_forward_pre_hook(count(name))
    return calls


def in_step(rank, size):
    """Forwards of every rank, buffers of what ran on nothing of its own, in both modes."""
    out = {}
    for training in (False, True):
        model = mixture().train(training)
        alone = mixture().train(training)
        shard(model, model.blocks)
        calls, noise = counted(model), torch.get_rng_state()
        with rgfast.Probe(model, progress=False, timeout=TIMEOUT) as p:
            for x in rows_of(rank, size):
                with torch.no_grad():
                    model(x)
                    alone(x)
            early = p.result()  # of all ranks, the slowest included
        result = p.result()
        same = all(
            torch.equal(mine, other)
            for (_, mine), (_, other) in zip(model.named_buffers(), alone.named_buffers(), strict=True)
        )
        out[training] = {
            "calls": sorted(set(calls.values())),
            "buffers": same,
            "noise": torch.equal(noise, torch.get_rng_state()),
            "n": [int(one.dataset.n.max()) for one in (early, result)],
            "digest": values(result)[1],
        }
    return out


class Skips(nn.Module):
    """Leaves out its second layer of a batch that begins with less than 0."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = self.a(x)
        return self.b(x) if x[0, 0] > 0 else x


def skipped(rank, size):
    """A layer that runs in no early batch of one rank, while another has seen all of its layers."""
    torch.manual_seed(7)
    model = Skips().double()
    x = torch.randn(9, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        order = sorted(x, key=lambda part: float(model.a(part)[0, 0]))
    mine = order if rank == 0 else order[-2:]
    asked = {"layers": ["a", "b"], "progress": False, "timeout": TIMEOUT}
    wanted = values(rgfast.probe(model, mine, **asked))[1]
    return values(rgfast.probe(fully_shard(model), mine, **asked))[1] == wanted


def half(rank, size):
    """Mixed precision computes what the model does in bf16."""
    model, plain = build().float(), build().bfloat16()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    shard(model, model.stack.blocks, mp_policy=policy)
    found, wanted = (values(brief(rank, size, one)) for one in (model, plain))
    return found[1] == wanted[1]


def controls(rank, size):
    """Fingerprints and random weights are those of one process; afterwards weights are as before."""
    model = build()
    before, twin = model_digest(model), random_twin(model, 3)
    wanted = values(brief(rank, size, twin))
    shard(model, model.stack.blocks)
    with torch.no_grad():
        model(torch.zeros(2, 4, dtype=torch.int64))  # FSDP2 keeps the root's weights whole from here on
    found = brief(rank, size, model, control="random_weights", control_seed=3)
    return {
        "same": values(found)[1] == wanted[1],
        "weights": found.provenance["weights"] == model_digest(twin),
        "model": found.provenance["model"],
        "digest": model_digest(model) == before,
    }


class Rerun(nn.Module):
    """Blocks that a backward may run again."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = x + (checkpoint(block, x, **self.how) if self.how else block(x))
        return x


def steps(rank, how, *, watched):
    """Weights after steps of training under FSDP2, and what a probe and a monitor saw of them."""
    torch.manual_seed(4)
    model = Rerun(how).double()
    shard(model, model.blocks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(3, 7, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    if not watched:
        for part in x:
            model(part.requires_grad_()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model_digest(model)
    monitor = rgfast.Monitor(model, x[0].clone(), every=1)
    with rgfast.Probe(model, progress=False, timeout=TIMEOUT) as p:
        for i, part in enumerate(x):
            model(part.requires_grad_()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(i)
    seen = monitor.result().dataset.effective_rank.values.tobytes().hex()
    return model_digest(model), (int(p.result().dataset.n.max()), values(p.result())[1], seen)


def trained(rank, size):
    """Whether steps whose blocks run again in the backward are counted as often as others, to the same bits,
    and weights are those without a probe; how many rows were counted."""
    weights = steps(rank, {}, watched=False)
    ways = {}, {"use_reentrant": False}, {"use_reentrant": True}
    with warnings.catch_warnings():  # the monitor's batch needs no gradient
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        found = [steps(rank, how, watched=True) for how in ways]
    return [len({seen for _, seen in found}), {one for one, _ in found} == {weights}, found[0][1][0]]


class Parent(nn.Module):
    """Draws a part's weights in its own turn, as GPT-2 does."""

    def __init__(self):
        super().__init__()
        self.config, self.inside = {}, nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def _init_weights(self, module):
        if module is self:
            self.inside[0].weight.normal_()

    def forward(self, x):
        return x + self.inside(x)


def parent(rank, size):
    """Whether random weights of a model that draws those of its parts are one process's."""
    model = nn.Sequential(Parent(), Parent())
    wanted = model_digest(random_twin(model, 3))
    with random_weights(shard(model, model), 3) as drawn:
        return model_digest(drawn) == wanted


class Adds(nn.Module):
    """Writes to an argument, as models do to a cache."""

    def __init__(self):
        super().__init__()
        self.a, self.lengths = nn.Linear(6, 6), []

    def forward(self, x, cache):
        self.lengths.append(len(cache))
        cache.append(0)
        return self.a(x)


def cached(rank, size):
    """How long the cache was that each forward began with; rank 0 alone has batches."""
    model = fully_shard(Adds())
    with rgfast.Probe(model, layers=["a"], progress=False, timeout=TIMEOUT):
        for _ in range(3 if rank == 0 else 0):
            model(torch.ones(4, 6), [])
    return model.lengths


def planned(rank, size):
    """What planning says, which would run a forward on one rank alone."""
    model = build()
    try:
        rgfast.plan(shard(model, model.stack.blocks), list(batches(rank, size)), mask="mask")
    except ValueError as error:
        return str(error)


def several(rank, size):
    """Cases that share one start of the ranks."""
    out = {}
    out["masked"] = values(masked(rank, size))
    model = build()
    out["brief"] = values(brief(rank, size, shard(model, model.stack.blocks)))[1]
    model = build()
    asked = merging(rank, size)
    out["merging"] = values(rgfast.probe(shard(model, model.stack.blocks), batches(rank, size), **asked))[1]
    out["replicated"] = values(rgfast.probe(build(), batches(rank, size), **options(rank, size)))[1]
    for case in (in_step, skipped, half, controls, parent, cached, trained, planned):
        out[case.__name__] = case(rank, size)
    return out


def agreement(folder):
    alone = values(rgfast.probe(build(), batches(0, 1, 64), **options(0, 1)))[0]
    out = {}
    for size in (2, 4):
        ranks = forked(size, several, folder)
        assert all(error is None for _, error, _, _ in ranks), [error for _, error, _, _ in ranks]
        found = [value for value, _, _, _ in ranks]
        out[size] = {
            "furthest": furthest(found[-1]["masked"][0], alone),
            "brief": found[0]["brief"],
            "merged": {one["merging"] for one in found} == {merged(size)},
            "digests": len({one["masked"][1] for one in found} | {one["replicated"] for one in found}),
            **{
                case: [one[case] for one in found]
                for case in (
                    "in_step",
                    "skipped",
                    "half",
                    "controls",
                    "parent",
                    "cached",
                    "trained",
                    "planned",
                )
            },
        }
    return out


def killed(folder):
    """A rank kills itself; all start again, one of them, which never had a batch, without a checkpoint."""
    path = Path(folder) / "run.checkpoint"

    def work(rank, size, dies=None):
        def stream():
            for number, batch in enumerate(batches(rank, size, 30)):
                if number == dies and rank == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        model = build()
        asked = {"checkpoint": path, "checkpoint_every": 1, "timeout": TIMEOUT if dies is None else SHORT}
        return values(brief(rank, size, shard(model, model.stack.blocks), stream(), **asked))[1]

    died = forked(4, lambda r, s: work(r, s, 3), folder)
    files = sorted(p.name for p in Path(folder).glob("run.checkpoint*"))
    return {"killed": died, "files": files, "again": [one[:2] for one in forked(4, work, folder)]}


def telling(folder):
    """One rank raises between forwards and lives on: the others, in a forward, learn what it said."""

    def raises(rank, size):
        def stream():
            for number, batch in enumerate(batches(rank, size)):
                if number == 2 and rank == 0:
                    raise KeyError("no such shard")
                yield batch

        try:
            model = build()
            brief(rank, size, shard(model, model.stack.blocks), stream())
        except (KeyError, rgfast.probing.RankError) as error:
            dist.barrier()  # the connections of all are still whole
            raise error

    def part(rank, size):
        pair = dist.new_group([0, 1])
        model = build()
        shard(model, model.stack.blocks)
        if rank < 2:
            brief(rank, 2, model, distributed=pair)

    return {
        "raises": forked(4, raises, folder),
        "part": forked(4, part, folder),
        "refused": {size: forked(size, refused, folder) for size in (2, 4)},
    }


def main():
    make_forkable()
    print_cases(agreement, killed, telling)


if __name__ == "__main__":
    main()
