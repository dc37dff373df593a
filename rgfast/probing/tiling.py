"""Stacks without mixing take a few positions at a time through all their layers: nothing is ever held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rgfast.probing.assemble import assemble
from rgfast.probing.capture.batches import batch_items
from rgfast.probing.capture.layers import Tap
from rgfast.probing.estimators.samples import LIMIT, enough, tile_rows, worthwhile
from rgfast.probing.estimators.tiles import LaterRows, gather, independent_stack, measured_by_tiles
from rgfast.probing.first import FirstBatch
from rgfast.probing.plan import Plan
from rgfast.probing.planning import unbounded_plan
from rgfast.probing.predict import Foreseen
from rgfast.probing.result import ProbeResult
from rgfast.probing.spec import ProbeSpec

__all__ = ["BY_SAMPLES", "by_tiles", "foreseen_tiles"]

BY_SAMPLES = "by samples: CKA and drift to 1e-6"


def by_tiles(
    model: nn.Module,
    spec: ProbeSpec,
    taps: Sequence[Tap],
    batches: Iterator[Any],
    announce: Callable[[Plan], dict[str, Any]],
    advance: Callable[[int], object],
) -> tuple[ProbeResult | None, list[Any]]:
    """What :meth:`rgfast.Probe.by_samples` says; ``announce`` gives the provenance of a plan."""
    stack = independent_stack(model, taps)
    if stack is None or not _may_tile(spec):
        return None, []
    x, taken = gather(stack, batches)
    plan = None if x is None else _plan(spec, taps, stack.width, x.shape[1], len(x))
    if x is None or plan is None:
        return None, taken
    provenance = announce(plan)
    with torch.no_grad():
        found = measured_by_tiles(
            stack, x, plan, uncentred=spec.uncentred, memory=spec.memory_bytes, advance=advance
        )
    given = {batch_items(batch)[0].untyped_storage().data_ptr() for batch in taken}
    own = x.untyped_storage().data_ptr() not in given
    dataset = assemble(found, spec.measures, provenance)
    return ProbeResult(dataset, LaterRows(stack, x, own=own)), taken


def foreseen_tiles(
    model: nn.Module,
    spec: ProbeSpec,
    taps: Sequence[Tap],
    batch: Any,
    sequences: int,
    deficient: tuple[int, ...],
) -> Foreseen | None:
    """That ``sequences`` like those of ``batch`` go by tiles, if they do."""
    stack = independent_stack(model, taps)
    if stack is None or not _may_tile(spec):
        return None
    x, _ = gather(stack, iter([batch]))
    plan = None if x is None or sequences > LIMIT else _plan(spec, taps, stack.width, x.shape[1], sequences)
    if plan is None:
        return None
    rows = min(tile_rows(plan, spec.memory_bytes), sequences * plan.length)
    why = "the rows of a few positions go through all layers of a stack without mixing at once"
    return Foreseen("tiles", why, plan, 4 * rows * sum(plan.widths), deficient)


def _plan(spec: ProbeSpec, taps: Sequence[Tap], width: int, length: int, sequences: int) -> Plan | None:
    """What is measured of all samples at once, if so many are enough and worth it."""
    if not enough(sequences, spec.groups):
        return None
    layers = len(taps)
    first = FirstBatch((width,) * layers, length, True, (0,) * layers, False, False, ())
    plan = unbounded_plan(first, spec, [tap.name for tap in taps])
    few = spec.route == "auto" and not worthwhile(plan, sequences)
    return None if few or "flattened" in plan.views else plan.noted([BY_SAMPLES])


def _may_tile(spec: ProbeSpec) -> bool:
    of_entries = spec.mask is not None or bool(spec.targets) or spec.rows is not None
    all_rows = spec.checkpoint is not None or spec.keep is not None
    return not (spec.reads_layers or of_entries or all_rows)
