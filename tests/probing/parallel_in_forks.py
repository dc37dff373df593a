"""Run by test_probe_parallel: probes of tensor-parallel models by forked ranks over gloo; prints JSON.

Several cases share one start of the ranks, which is what takes time."""

import functools
import json
import sys
import tempfile
import time

import torch
import torch._dynamo  # which DTensors import: once, before forking
import torch.distributed as dist
from launch import SHORT, TIMEOUT, make_forkable
from ranks_in_forks import forked, furthest, measures_of, values
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import rgfast
from rgfast.probing.checkpoint import model_digest
from rgfast.probing.sharding import tensor_mesh

LENGTH, WIDTH, STATES = 4, 6, 60
SIZES = [23, 9, 17, 1, 14]  # of the batches
TOTAL = sum(SIZES)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(STATES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.last = nn.Linear(WIDTH, 4)

    def forward(self, tokens, attention_mask=None):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def build():
    torch.manual_seed(1)
    return Model().double()


def over(mesh, style, *, is_local=True):
    """The model over a mesh: its stream on every rank whole, or a part of the positions."""
    model = build()
    if style == "whole":
        plan = {
            "up": ColwiseParallel(use_local_output=is_local),
            "down": RowwiseParallel(use_local_output=is_local),
        }
        plan = {f"blocks.{k}.{name}": one for k in range(2) for name, one in plan.items()}
        plan["embed"] = ColwiseParallel(output_layouts=Replicate(), use_local_output=is_local)
        if not is_local:
            for k in range(2):
                plan[f"blocks.{k}.norm"] = SequenceParallel(use_local_output=False)
    else:
        one = {
            "norm": SequenceParallel(use_local_output=is_local),
            "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=is_local),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=is_local),
        }
        plan = {f"blocks.{k}.{name}": way for k in range(2) for name, way in one.items()}
        plan["embed"] = RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=is_local
        )
        plan["last"] = ColwiseParallel(input_layouts=Shard(1), use_local_output=is_local)
    return parallelize_module(model, mesh, plan)


def data():
    g = torch.Generator().manual_seed(3)
    return {
        "tokens": torch.randint(0, STATES, (TOTAL, LENGTH), generator=g),
        "mask": torch.rand(TOTAL, LENGTH, generator=g) < 0.5,
        "attention_mask": torch.rand(TOTAL, LENGTH, generator=g) < 0.9,
        "label": torch.arange(TOTAL) // 23,
    }


def batches(numbers):
    """Some of the batches, by number."""
    starts = [sum(SIZES[:k]) for k in range(len(SIZES))]
    return [{k: v[starts[b] : starts[b] + SIZES[b]] for k, v in data().items()} for b in numbers]


def options(numbers):
    starts = [sum(SIZES[:k]) for k in range(len(SIZES))]
    order = torch.cat([torch.arange(starts[b], starts[b] + SIZES[b]) for b in numbers])
    vectors = torch.randn(TOTAL, 2, generator=torch.Generator().manual_seed(5))
    return {
        "mask": "mask",
        "views": ["masked", "pooled", "label 1", "odd"],
        "rows": {"label 1": ("label", 1), "odd": torch.arange(TOTAL)[order] % 2 == 1},
        "targets": {"vectors": vectors[order]},
        "groups": 3,
        "route": "moments",
        "progress": False,
        "timeout": TIMEOUT,
    }


ALL = [*range(len(SIZES))]
LINES = [3, 0, 1], [4, 2]  # the batches of either half of four ranks


@functools.cache
def alone(*order):
    """What one process measures on the batches in this order."""
    asked = options(order) | {"distributed": False}
    return values(rgfast.probe(build(), batches(order), **asked))[0]


def probed(model, numbers=ALL, order=ALL, **more):
    """How far all values are from those of one process, and their digest."""
    found, digest = values(rgfast.probe(model, batches(numbers), **options(numbers) | more))
    return furthest(found, alone(*order)) if dist.get_rank() == 0 else 0.0, digest


def said(work, *args, **more):
    try:
        work(*args, **more)
    except Exception as error:
        return f"{type(error).__name__}: {error} {error.__cause__ or ''}"


class Odd(Shard):
    """A placement that nobody has heard of."""


def placed_as(mesh, *placements):
    """A hook that puts out a plain tensor as a DTensor with these placements."""
    return lambda module, args, output: DTensor.from_local(output, mesh, placements, run_check=False)


INSIDE = ["embed", "blocks.0.norm", "blocks.0.up", "blocks.1.down", "blocks.1", "last"]
PARTS = ["embed", "blocks.0", "blocks.1", "last"]
UP, BLOCKS, LAST = ["blocks.0.up"], ["blocks.0", "blocks.1"], ["last"]
BRIEF = {
    "measures": ["effective_rank", "kernel_drift", "cka"],
    "views": ["position", "pooled"],
    "route": "moments",
    "progress": False,
    "timeout": TIMEOUT,
}


@functools.cache
def briefly(*layers):
    """What one process measures of these layers."""
    asked = BRIEF | {"layers": list(layers), "distributed": False}
    return values(rgfast.probe(build(), batches(ALL), **asked))[0]


def brief(model, layers, numbers=ALL, **more):
    """How far few measures of these layers are from those of one process."""
    found = values(rgfast.probe(model, batches(numbers), layers=layers, **BRIEF | more))[0]
    return furthest(found, briefly(*layers)) if dist.get_rank() == 0 else 0.0


def tensor(rank, size):
    """Every style of parallelize_module over all ranks."""
    mesh = init_device_mesh("cpu", (size,))
    positions = {"placements": {"blocks.*": Shard(1)}}
    out = {"whole": probed(over(mesh, "whole")), "positions": probed(over(mesh, "positions"), **positions)}
    model = over(mesh, "positions", is_local=False)
    before = model_digest(model) == model_digest(build())
    out["inside"] = brief(model, INSIDE)
    out["digest"] = before and model_digest(model) == model_digest(build())
    out["features"] = brief(over(mesh, "whole"), UP, placements=Shard(-1))
    out["by itself"] = brief(over(mesh, "positions"), BLOCKS, distributed=False, **positions)
    out["owned"] = probed(over(mesh, "positions"), owner="layers", **positions)
    out["samples"] = by_samples(mesh)
    out["checkpoint"] = resumed(mesh)
    out["sums"] = brief(summing(mesh), LAST)
    out["stages"] = staged(rank, size, distributed=False)
    return out


def staged(rank, size, layers=None, **more):
    """How far the layers of each rank's stage, in training steps of a pipeline, are from those of one
    process, and those of all stages joined."""
    model, every = build(), data()
    own = PARTS[rank * len(PARTS) // size : (rank + 1) * len(PARTS) // size]
    for name in {*PARTS} - {*own}:
        model.set_submodule(name, nn.Identity())  # the others keep their names
    stage = PipelineStage(model, rank, size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=lambda y, _: y.square().mean())
    layers = layers or [*([f"{own[0]}:input"] if rank else []), *own]
    asked = BRIEF | {"layers": layers} | more
    with rgfast.Probe(model, **asked) as found:
        # The first step runs every stage on empty tensors before.
        for half in zip(
            *(every[name].split(TOTAL // 2) for name in ("tokens", "attention_mask")), strict=True
        ):
            schedule.step(*half[: rank == 0], attention_mask=half[1], target=half[0])
    result, results = found.result(), [None] * size
    dist.all_gather_object(results, result)
    joint = results[0].join(*results[1:])
    assert list(joint.layers) == PARTS
    missing = said(results[0].join, *results[2:])
    alone = furthest(values(result)[0], briefly(*layers))
    return alone, furthest(measures_of(joint), briefly(*PARTS)), missing


def by_samples(mesh):
    """Batches that are DTensors themselves, each rank with some of the samples."""
    model = distribute_module(build(), mesh)
    every = data()  # torch cannot run a block on samples that the ranks do not divide evenly
    given = [
        {"tokens": distribute_tensor(tokens, mesh, [Shard(0)]), "attention_mask": keep}
        for tokens, keep in zip(every["tokens"].split(32), every["attention_mask"].split(32), strict=True)
    ]
    found = values(rgfast.probe(model, given, layers=BLOCKS, **BRIEF))[0]
    return furthest(found, briefly(*BLOCKS))


def resumed(mesh):
    """The digest of a probe that goes on after two batches, on all of them."""
    path = [tempfile.mktemp()]
    dist.broadcast_object_list(path)
    model = over(mesh, "whole")
    rgfast.probe(model, batches(ALL[:2]), checkpoint=path[0], **options(ALL))
    return values(rgfast.probe(model, batches(ALL), checkpoint=path[0], **options(ALL)))[1]


def summing(mesh):
    """A model whose last layer leaves the sum over ranks to others."""
    model = over(mesh, "whole")
    last = RowwiseParallel(input_layouts=Replicate(), output_layouts=Partial(), use_local_output=False)
    parallelize_module(model, mesh, {"last": last})
    return model


def refused(rank, size):
    """What is said of outputs that cannot be read."""
    mesh, short = init_device_mesh("cpu", (size,)), {"timeout": SHORT}
    out = {"unsaid": said(brief, over(mesh, "positions"), BLOCKS, **short)}
    model = over(mesh, "whole")
    model.last.register_forward_hook(placed_as(mesh, Odd(1)))
    out["odd"] = said(brief, model, LAST, **short)
    model = over(mesh, "positions", is_local=False)
    out["other"] = said(brief, model, ["blocks.0"], placements=Shard(2), **short)
    model = over(mesh, "whole")
    model.last.register_forward_hook(
        lambda module, args, x: x.index_fill(0, torch.tensor(len(x) - 1), torch.nan)
    )
    out["poisoned"] = said(brief, model, LAST, **short)
    for way in (Shard(1), Shard(-1), Shard(0), Partial()):
        out[f"whole, {way}"] = said(brief, over(mesh, "whole"), BLOCKS, placements=way, **short)
    model = over(mesh, "positions")
    model.blocks[0].register_forward_hook(lambda module, args, x: torch.zeros_like(x))
    out["zero"] = said(rgfast.probe, model, batches(ALL), placements=Shard(1), layers=BLOCKS, **BRIEF)
    model, first = over(mesh, "whole"), dist.new_group([0])
    if rank == 0:
        out["left out"] = said(brief, model, LAST, distributed=first, **short)
    out["plain"] = said(brief, build(), LAST, placements=Shard(1), **short)
    model = over(mesh, "whole")
    out["fewer"] = said(rgfast.probe, model, batches(ALL[: 5 - rank]), layers=LAST, progress=False, **short)
    out["compared"] = said(rgfast.compare, build(), model, batches(ALL))
    out["stage"] = said(staged, rank, size, ["blocks.1"] if rank else ["blocks.0"], **short)
    return out


def lines(rank, size):
    """Two by two ranks: two halves with batches of their own, each of ranks that run the model together."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    across = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tensor", "data"))
    order = [*LINES[0], *LINES[1]]
    out = {"whole": probed(over(mesh["tensor"], "whole"), LINES[rank // 2], order)}
    model = over(mesh["tensor"], "positions", is_local=False)
    out["fsdp"] = brief(fully_shard(model, mesh=mesh["data"]), BLOCKS, LINES[rank // 2])
    out["across"] = probed(over(across["tensor"], "whole"), LINES[rank % 2], order)
    out["owned"] = probed(over(across["tensor"], "whole"), LINES[rank % 2], order, owner="layers")
    every = init_device_mesh("cpu", (size,))
    out["four"] = brief(over(every, "positions"), BLOCKS, placements=Shard(1))
    out["stages"] = staged(rank, size, distributed=False)
    out["data alone"] = tensor_mesh(fully_shard(build(), mesh=mesh)) is None
    return out


def main():
    make_forkable()
    alone(*ALL), alone(*LINES[0], *LINES[1])  # before forking: every rank has them
    for layers in (INSIDE, UP, BLOCKS, LAST, PARTS):
        briefly(*layers)
    out = {}
    for size, case in ((2, tensor), (2, refused), (4, lines)):
        name = f"{case.__name__}/{size}"
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            out[name] = forked(size, case, folder)
        print(name, round(time.monotonic() - start, 2), "s", file=sys.stderr)
    print(json.dumps(out, default=str))


if __name__ == "__main__":
    main()
