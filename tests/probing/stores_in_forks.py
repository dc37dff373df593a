"""Run by test_sources_by_rank: probes of saved activations by several forked ranks; prints JSON."""

from pathlib import Path

import numpy as np
import torch
from launch import TIMEOUT, make_forkable, print_cases
from ranks_in_forks import forked, furthest, values
from safetensors.torch import save_file

import rgfast
from rgfast.probing.sources import shards as shards_of

LENGTHS = [6, 6, 4, 5, 6]  # of the files
SIZES = [13, 9, 1, 30, 7]
TOTAL = sum(SIZES)
ASSIGNED = {1: [[3, 0, 4, 1, 2]], 2: [[3, 0], [4, 1, 2]], 4: [[2, 1], [], [4, 0], [3]]}


def write(folder, *, ids=0):
    """Files of batches in fp64, with padding, a label and ids; layers of widths 5 and 9."""
    g = torch.Generator().manual_seed(ids + 3)
    folder.mkdir()
    for number, (size, length) in enumerate(zip(SIZES, LENGTHS, strict=True)):
        x = torch.randn(size, length, 9, generator=g, dtype=torch.float64)
        keep = torch.rand(size, length, generator=g) < 0.8
        keep[:, 0] = True
        start = sum(SIZES[:number]) + ids
        arrays = {
            "layer.0": x[..., :5].contiguous(),
            "layer.1": torch.tanh(x),
            "attention_mask": keep,
            "label": torch.randint(0, 3, (size,), generator=g),
            "ids": torch.arange(start, start + size),
        }
        save_file(arrays, str(folder / f"batch_{number}.safetensors"))
    return folder


def options():
    """Arrays are of all sequences of the activations that are given."""
    vectors = torch.randn(TOTAL, 2, generator=torch.Generator().manual_seed(5))
    return {
        "targets": {"vectors": vectors, "label": "label"},
        "rows": {"zeros": ("label", 0), "odd": torch.arange(TOTAL) % 2 == 1},
        "groups": 3,
        "pairs": "all",
        "route": "moments",
        "progress": False,
        "timeout": TIMEOUT,
    }


def ok(ranks):
    assert all(error is None for _, error, _, _ in ranks), ranks
    return [value for value, _, _, _ in ranks]


def divided(folder):
    """All ranks open the whole: results, ids, and how many sequences of each file a rank reads."""
    path = write(Path(folder) / "store")
    acts = rgfast.Activations(path)
    memory = {"a": np.random.default_rng(1).normal(size=(TOTAL, 3, 4)), "b": np.ones((TOTAL, 3, 2))}
    alone = rgfast.probe(acts, **options())
    alone_in_memory = rgfast.probe(rgfast.Activations(memory), progress=False, route="moments")

    def work(rank, size):
        read, plain = [0] * len(SIZES), shards_of._Safetensors.read

        def noted(shard, key, index):
            found = plain(shard, key, index)
            if key == "layer.0":
                read[int(shard.stem.removeprefix("batch_"))] += len(found)
            return found

        mine = rgfast.Activations(path)
        shards_of._Safetensors.read = noted
        found = rgfast.probe(mine, batch_size=11, **options())
        shards_of._Safetensors.read = plain
        here = rgfast.probe(rgfast.Activations(memory), progress=False, timeout=TIMEOUT)
        return *values(found), list(found.ids), read, values(here)[0]

    out = {}
    for size in (1, 2, 4):
        ranks = ok(forked(size, work, folder))
        out[size] = [
            max(furthest(rank[0], values(alone)[0]) for rank in ranks),
            len({rank[1] for rank in ranks}),
            ranks[-1][2] == list(alone.ids),
            [rank[3] for rank in ranks],
            furthest(ranks[-1][4], values(alone_in_memory)[0]),
        ]
    return out


def assigned(folder):
    """Every rank is given shards, or has a store of its own."""
    path, other = write(Path(folder) / "store"), write(Path(folder) / "other", ids=1000)
    asked = {"targets": {"label": "label"}, "groups": 2, "route": "moments", "progress": False}
    whole = rgfast.probe(rgfast.Activations(path), **asked)
    unordered = {  # what does not depend on which group a sequence is in
        name: value
        for name, value in values(whole)[0].items()
        if not name.endswith("_se") and not name.startswith("target")
    }
    out = {}
    for size, parts in ASSIGNED.items():
        acts = rgfast.Activations(path)
        order = [number for part in parts for number in part]
        alone = rgfast.probe(acts.of_shards(order), **asked)

        def work(rank, size, acts=acts, parts=parts):
            found = rgfast.probe(acts.of_shards(parts[rank]), timeout=TIMEOUT, **asked)
            return *values(found), list(found.ids)

        ranks = ok(forked(size, work, folder))
        out[size] = [
            furthest(ranks[-1][0], values(alone)[0]),
            furthest(ranks[0][0], unordered),
            len({rank[1] for rank in ranks}),
            ranks[0][2] == list(alone.ids),
        ]

    def own(rank, size):
        found = rgfast.probe(rgfast.Activations((path, other)[rank]), timeout=TIMEOUT, **asked)
        return values(found)[0], list(found.ids)

    found = ok(forked(2, own, folder))
    first, second = (rgfast.probe(rgfast.Activations(one), **asked) for one in (path, other))
    out["own"] = [furthest(found[1][0], values(first.merge(second))[0]), found[1][1][:: TOTAL - 1]]
    return out


def telling(folder):
    """What two ranks say of sequences that both would read."""
    path, same_ids = write(Path(folder) / "store"), Path(folder) / "same"
    write(same_ids, ids=0)
    changed = {"layer": torch.randn(4, 2, 3), "ids": torch.arange(4)}

    def shards(rank, size):
        return rgfast.probe(rgfast.Activations(path).of_shards([rank, 2]), progress=False)

    def part(rank, size):
        acts = rgfast.Activations(path)
        return rgfast.probe(acts.of_shards([1, 0]) if rank else acts, progress=False)

    def ids(rank, size):
        acts = rgfast.Activations({**changed, "layer": changed["layer"] + rank})
        return rgfast.probe(acts, progress=False)

    def kinds(rank, size):
        acts = rgfast.Activations(changed, ids=["a", "b", "c", "d"] if rank else None)
        return rgfast.probe(acts, progress=False)

    def keep(rank, size):
        return rgfast.probe(rgfast.Activations(path), keep=Path(folder) / "kept", progress=False)

    return {
        case.__name__: [one[1] for one in forked(2, case, folder)]
        for case in (shards, part, ids, kinds, keep)
    }


def main():
    make_forkable()
    print_cases(divided, assigned, telling)


if __name__ == "__main__":
    main()
