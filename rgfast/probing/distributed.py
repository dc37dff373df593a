"""A probe of several processes ("ranks"): what they agree on, who has died, and the sum of their moments.

Ranks do not move in step. Each sums the moments of its own sequences, and while batches run nothing passes
between them but signs of life, through the store that torch.distributed keeps; so a rank may have fewer
batches than the others, or none. What the first batches look like is agreed on before anything is summed, and
at the end moments are merged pairwise in the order of ranks: the result is that of one process that sees the
sequences of rank 0, then those of rank 1, and so on. Moments travel over a gloo connection of their own
whatever backend the model uses: it happens once, and a lost peer is an exception there rather than an abort.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from rgfast.probing.estimators.moments import Moments
from rgfast.probing.first import FirstBatch
from rgfast.probing.plan import Plan
from rgfast.probing.ranks import Ranks

__all__ = [
    "Distributed",
    "agree",
    "all_reduce",
    "first_numbers",
    "open_ranks",
    "rank_path",
    "unwrapped",
]

Distributed = Literal["auto"] | bool | Any  # Any: a torch.distributed.ProcessGroup, which not every build has

_opened: dict[str, int] = {}


def open_ranks(distributed: Distributed, timeout: float) -> Ranks | None:
    """The ranks of a new probe, or None for one process by itself.

    ``"auto"`` takes the default process group, or the processes that ``torchrun`` started, where there is
    more than one; True wants either; a process group is taken as it is. Raises TypeError or ValueError for
    anything else, for a group that this process is not in, and where ``True`` finds nothing.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds, got {timeout!r}")
    if not (math.isfinite(timeout) and timeout > 0):
        raise ValueError(f"timeout must be a finite number of seconds > 0, got {timeout}")
    if distributed is False:
        return None
    available = dist.is_available() and hasattr(dist, "ProcessGroupGloo")
    if distributed is True or (isinstance(distributed, str) and distributed == "auto"):
        found = _everyone() if available else None
        if found is None and distributed is True:
            raise ValueError(
                "distributed=True needs torch.distributed to be initialised or processes started by "
                f"torchrun, got neither{'' if available else ' (this torch was built without gloo)'}"
            )
        if found is None or (found[2] == 1 and distributed == "auto"):
            return None
        store, rank, size, name = found
        members = list(range(size))
    elif available and isinstance(distributed, dist.ProcessGroup):
        members, rank = dist.get_process_group_ranks(distributed), dist.get_rank(distributed)
        if rank < 0:
            raise ValueError(
                f"distributed must be a group that this process is in, got one of ranks {members}"
            )
        store = dist.distributed_c10d._get_default_store()
        name = ",".join(map(str, members))
    else:
        raise TypeError(
            f"distributed must be 'auto', True, False or a process group, got {type(distributed).__name__}"
            if not isinstance(distributed, str)
            else f"distributed must be 'auto', True, False or a process group, got {distributed!r}"
        )
    _opened[name] = _opened.get(name, 0) + 1
    from torch.distributed.distributed_c10d import PrefixStore

    return Ranks(PrefixStore(f"rgfast/{name}/{_opened[name]}", store), rank, members, float(timeout))


def _everyone() -> tuple[Any, int, int, str] | None:
    """Store, rank, size and name of the default group, or of what torchrun started; None without either."""
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
        return store, dist.get_rank(), dist.get_world_size(), "all"
    if dist.is_torchelastic_launched():
        # Only the store: a process group would be in the way of one that the program makes later.
        from torch.distributed.rendezvous import rendezvous

        store, rank, size = next(iter(rendezvous("env://")))
        return store, rank, size, "all"
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile`` or DistributedDataParallel made of it.

    Layers then have the names that the model gave them, and the forward of DistributedDataParallel, which
    would wait for ranks without a batch, is left out.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")  # absent if nothing was compiled
    if eval_frame is not None and isinstance(model, eval_frame.OptimizedModule):
        return cast(nn.Module, model._orig_mod)
    if dist.is_available():
        from torch.nn.parallel import DistributedDataParallel

        if isinstance(model, DistributedDataParallel):
            return cast(nn.Module, model.module)
    return None


def rank_path(path: Path, rank: int, size: int) -> Path:
    """Where a rank keeps its checkpoint: ``path`` with its number and that of all, ``path`` itself for one.

    Raises ValueError where there are checkpoints of another number of ranks.
    """
    suffix = "" if size == 1 else f"of{size}"
    found = [path.name] if path.exists() else []
    found += [other.name for other in path.parent.glob(f"{path.name}.rank*of*")]
    wrong = sorted(name for name in found if not name.endswith(suffix) or (size == 1) != (name == path.name))
    if wrong:
        ranks = "one process" if size == 1 else f"{size} ranks"
        raise ValueError(
            f"checkpoint must be of a probe by {ranks}, and {path.parent / wrong[0]} is of another number; "
            "delete it to start anew"
        )
    return path if size == 1 else path.with_name(f"{path.name}.rank{rank}of{size}")


def agree(
    ranks: Ranks, asked: Mapping[str, Any], first: FirstBatch | None, *, waiting: bool = False
) -> FirstBatch | None:
    """What all ranks start from: the first batch of the lowest rank that has one, None where none has, or
    one of them is ``waiting`` to know its own.

    Labels are counted over all first batches. Raises ValueError, the same on every rank, where they were
    asked for different things (``asked``) or their layers do not fit.
    """
    given = {"asked": asked, "first": None if first is None else asdict(first), "waiting": waiting}
    found = ranks.gather(f"first/{ranks.round()}", given)
    for rank, other in enumerate(found):
        for name in dict.fromkeys((*found[0]["asked"], *other["asked"])):
            _same(name, (0, found[0]["asked"].get(name)), (rank, other["asked"].get(name)))
    firsts = [
        (rank, FirstBatch.from_json(f["first"])) for rank, f in enumerate(found) if f["first"] is not None
    ]
    if not firsts or any(f["waiting"] for f in found):
        return None
    lowest, chosen = firsts[0]
    widths = [width for _, width, _ in chosen.targets]
    for rank, other in firsts:
        for name in ("widths", "aligned", "places", "padded", "masked"):
            _same(f"{name} of the layers", (lowest, getattr(chosen, name)), (rank, getattr(other, name)))
        for k, (mine, theirs) in enumerate(zip(chosen.targets, other.targets, strict=True)):
            vectors = not (mine[2] and theirs[2])
            _same(
                f"targets[{mine[0]!r}]",
                (lowest, mine[1 if vectors else 2 :]),
                (rank, theirs[1 if vectors else 2 :]),
            )
            widths[k] = max(widths[k], theirs[1])
    targets = tuple((t[0], width, t[2]) for t, width in zip(chosen.targets, widths, strict=True))
    room = [first.free for _, first in firsts if first.free is not None]
    factors = all(first.factors for _, first in firsts)
    return replace(chosen, targets=targets, free=min(room, default=None), factors=factors)


def _same(name: str, mine: tuple[int, Any], theirs: tuple[int, Any]) -> None:
    if mine[1] != theirs[1]:
        raise ValueError(
            f"{name} must be the same on all ranks: rank {mine[0]} has {_shown(mine[1])}, rank {theirs[0]} "
            f"has {_shown(theirs[1])}"
        )


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def all_reduce(
    ranks: Ranks, state: Moments | None, provenance: Mapping[str, Any], device: torch.device | str
) -> tuple[Moments, dict[str, Any]] | None:
    """The moments of all ranks as one new state, and the provenance of the lowest with a sequence.

    The same bits on every rank; ``state`` is left as it was; None where no rank has seen anything. Neighbours
    are merged in pairs, then pairs of pairs, one accumulator at a time, and the sum goes back the same way.
    """
    tag = f"sum/{ranks.round()}"
    given = None
    if state is not None:
        given = [state.plan.to_json(), state.sequences, dict(provenance), state.numbers, list(state.line)]
    found = ranks.gather(tag, given)
    if state is None or any(one is None for one in found):
        return None
    seen = [int(one[1]) for one in found]
    starts = first_numbers([(one[3], tuple(one[4])) for one in found])
    total = Moments(state.plan, masked=state.masked, uncentred=state.uncentred)
    total.load_parts(state.sequences, state.parts(), device)
    total.adopt(_joint([Plan.from_json(one[0])[0] for one in found]))
    ranks.connect()
    me = ranks.rank
    steps = [1 << k for k in range((ranks.size - 1).bit_length())]
    for step in steps:
        if me % (2 * step) == step:
            _send(ranks, f"{tag}/up/{me}", me - step, total)
            break
        if me + step < ranks.size:
            parts = _received(ranks, f"{tag}/up/{me + step}", me + step)
            shift = starts[me + step] - starts[me]
            total.merge_parts(sum(seen[me + step : me + 2 * step]), parts, device, shift=shift)
    for step in reversed(steps):
        if me % (2 * step) == step:
            total.load_parts(sum(seen), _received(ranks, f"{tag}/down/{me}", me - step), device)
        elif me % (2 * step) == 0 and me + step < ranks.size:
            _send(ranks, f"{tag}/down/{me + step}", me + step, total)
    if me == 0:  # the others have read it from arrays, and how moments lie in memory decides the last bits
        total.load_parts(sum(seen), total.parts(), device)
    lowest = next((rank for rank, sequences in enumerate(seen) if sequences), 0)
    return total, dict(found[lowest][2])


def first_numbers(numbered: Sequence[tuple[int, tuple[int, ...]]]) -> list[int]:
    """The number of every rank's first sequence among those of all, of how many each numbers and the ranks
    that number the same ones with it."""
    starts: dict[Any, int] = {}
    end, found = 0, []
    for rank, (numbers, line) in enumerate(numbered):
        key = line or rank
        if key not in starts:
            starts[key], end = end, end + numbers
        found.append(starts[key])
    return found


def _send(ranks: Ranks, name: str, to: int, state: Moments) -> None:
    for k, arrays in enumerate(state.parts()):
        ranks.send(f"{name}/{k}", to, arrays)


def _received(ranks: Ranks, name: str, source: int) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    for k in itertools.count():
        yield ranks.receive(f"{name}/{k}", source)


def _joint(plans: Sequence[Plan]) -> Plan:
    """What all plans measure: a view that one of them had to drop is dropped, and all notes are kept."""
    first = plans[0]
    for rank, plan in enumerate(plans):
        for name, value in asdict(
            replace(plan, views=first.views, notes=first.notes, missed=first.missed)
        ).items():
            _same(name, (0, asdict(first)[name]), (rank, value))
    views = tuple(view for view in first.views if all(view in plan.views for plan in plans))
    missed = {layer for plan in plans for layer in plan.missed}
    plans = [plan.without(sorted(missed)) for plan in plans]
    notes = tuple(dict.fromkeys(note for plan in plans for note in plan.notes))
    return replace(first.without(sorted(missed)), views=views, notes=notes)
