"""Comparing two models: one pass over the same sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from rgfast.comparing.assemble import assemble
from rgfast.comparing.estimates import Counted, Estimate, HeldRows, OfMoments
from rgfast.comparing.pairing import Correspondence, Pair, joined, pairs_of
from rgfast.comparing.result import Comparison
from rgfast.comparing.rows import Rows, rows_of
from rgfast.comparing.sample import Sample
from rgfast.comparing.saved import as_saved
from rgfast.comparing.side import Side
from rgfast.comparing.spec import (
    AxesOption,
    CompareSpec,
    Layers,
    MaskSpec,
    Origin,
    OutputOption,
    PaddingOption,
    Route,
    RowsSpec,
)
from rgfast.probing.capture.batches import batch_rows, check_order
from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.options import VIEWS
from rgfast.probing.plan import UNALIGNED, Plan, make_plan
from rgfast.probing.sources.activations import Activations
from rgfast.probing.unread import Unread
from rgfast.runtime.memory import free_bytes
from rgfast.runtime.streams import Home

__all__ = ["compare"]


def compare(
    a: nn.Module | Activations,
    b: nn.Module | Activations,
    batches: Any = None,
    *,
    layers_a: Layers = "auto",
    layers_b: Layers = "auto",
    batches_b: Any = None,
    ids: Any = None,
    measures: str | Sequence[str] = ("cka",),
    views: Sequence[str] | None = None,
    positions: str | Sequence[int | str] = "auto",
    origin: Origin = "column",
    mask: MaskSpec = None,
    rows: RowsSpec = None,
    padding: PaddingOption = "auto",
    axes: AxesOption = None,
    output: OutputOption = None,
    groups: int = 1,
    null: int = 0,
    sample_limit: int = 1024,
    k: int = 10,
    seed: int = 0,
    memory: str | int = "4GiB",
    batch_size: int = 256,
    route: Route = "auto",
    progress: bool | None = None,
) -> Comparison:
    """How alike every layer of ``a`` is to every layer of ``b`` on the same sequences: a :class:`Comparison`.

    One pass in evaluation mode without gradients. The models may be two checkpoints, a model and its
    quantized copy, of other widths and depths, on other devices, or one and the same. Debiased CKA is of all
    rows, from fp64 sums in memory that does not depend on the number of sequences. Two
    :class:`rgfast.Activations` that exist already are compared likewise, without batches.

    Args:
        a: any module. Hooks, training flags and grad mode are as before when this returns or raises.
            Or :class:`rgfast.Activations`: ``layers_a`` then names some of theirs (all by ``"auto"``), and
            ``batches``, ``batches_b``, ``axes`` and ``output`` are refused. Sequences are matched by the ids
            of both, which have to be the same in the same order; if a side has none, their order is taken
            on trust and the notes say so. Rows are compared where the same positions of every sequence
            count on both sides, and means over positions otherwise.
        b: likewise: a model if ``a`` is one, activations if ``a`` is that.
        batches: as in :func:`rgfast.probe`: both models get these batches, each what its ``forward`` takes.
        layers_a: the layers of ``a``, as in :func:`rgfast.probe`; by default its residual stream.
        layers_b: those of ``b``.
        batches_b: what ``b`` gets instead, such as the same texts by another tokenizer: batch by batch as
            many sequences in the same order. Where the arrays are not those of ``batches``, only means over
            positions are compared (``mean_pooled``), unless other views are asked for by name and the tokens
            are the same.
        ids: what tells sequences apart: the name of an entry of all batches (the models do not get it), or a
            pair of arrays, of all sequences in ``batches`` and of all in ``batches_b`` (of activations, in
            ``a`` and in ``b``). They have to be the same. Loaders that shuffle are refused as ``batches_b``
            without them.
        measures: some of ``cka`` (debiased) and ``cka_biased``, which are of all rows, and of ``mutual_knn``,
            ``procrustes`` and ``rsa``, which are of a sample; see the functions of these names.
        views: some of ``pooled`` (all rows at all positions as one cloud), ``mean_pooled`` (a sequence's mean
            over positions), ``position``, ``visible``, ``masked`` and ``flattened``; by default the first
            two, and those by position if ``positions`` or ``mask`` are given. All but ``mean_pooled`` compare
            row by row, so that layers have to have the same positions. By default views that cannot be
            compared are left out, and the notes say why; asked for by name they are refused.
        positions: those followed one by one in views by position, as in :func:`rgfast.probe`.
        origin: as in :func:`rgfast.probe`.
        mask: as in :func:`rgfast.probe`, of the batches of ``a``.
        rows: as in :func:`rgfast.probe`, of the batches of ``a``: views of some rows only, each by its name,
            which compare row by row like ``pooled``.
        padding: as in :func:`rgfast.probe`; a pair is one for each model, else it is for both. Rows that are
            padding for either are not counted. In the view ``mean_pooled`` of other inputs each model's means
            are over its own tokens.
        axes: as in :func:`rgfast.probe`; a pair is one for each model.
        output: as in :func:`rgfast.probe`; a pair is one for each model.
        groups: G > 1 gives jackknife standard errors over G groups of sequences, number i in group i mod G.
            Moments take G times the memory.
        null: how many permutations of the sequences of ``b`` calibrate every measure, on the sample: see
            :meth:`Comparison.calibrated`. 0: none.
        sample_limit: most rows of the sample that measures beside CKA, and ``null``, are of; where there are
            more, a seeded draw (``result.samples`` says which). Their cost grows with its square.
        k: neighbors of ``mutual_knn``.
        seed: of the sample and the permutations.
        memory: bytes, or text such as ``"4GiB"``, that sums or rows may take.
        batch_size: sequences at once, if ``batches`` is one mapping or array.
        route: ``"moments"`` sums up second and cross moments as the batches come; ``"samples"`` holds the
            rows of at most 4,096 sequences, which wide layers may need; ``"auto"`` takes moments if they fit
            ``memory``.
        progress: show a bar; by default on a terminal.

    Raises ValueError for options out of range, layers that are not found, rows that do not correspond (naming
    layers), other sequences on either side (naming the first), NaN or infinity (naming layer and position),
    fewer than 4 sequences, and what does not fit ``memory``; whatever a model raises is passed on.

    >>> import torch, rgfast
    >>> a, b = (rgfast.ResidualStack(width, depth=2, mixing="none") for width in (4, 4))
    >>> c = rgfast.compare(a, b, torch.randn(100, 3, 4), progress=False)
    >>> c.matrix("cka", view="pooled").shape
    (3, 3)
    """
    spec = CompareSpec(
        layers=(layers_a, layers_b),
        ids=ids,
        measures=measures,
        views=views,
        positions=positions,
        origin=origin,
        mask=mask,
        rows=rows,
        padding=padding,
        axes=axes,
        output=output,
        groups=groups,
        null=null,
        sample_limit=sample_limit,
        k=k,
        seed=seed,
        memory=memory,
        batch_size=batch_size,
        route=route,
        progress=progress,
    )
    notes: tuple[str, ...] = ()
    if isinstance(a, Activations) or isinstance(b, Activations):
        a, b, spec, pairs, notes = as_saved(a, b, batches, batches_b, spec)
    else:
        check_order([(one.said, "it") for one in spec.selections if one.in_order], batches)
        pairs = pairs_of(batches, batches_b, spec.ids, spec.batch_size)
    unread = Unread()
    first = Side(a, "a", spec, unread)
    shared = a is b and batches_b is None and _same_reading(spec)
    second = first if shared else Side(b, "b", spec, unread)
    run = _Run(spec, first, second, unread, notes)
    bar = tqdm(unit="sequence", desc="compare", disable=not spec.shows_progress)
    with _as_they_came(first.model, second.model), torch.no_grad(), bar:
        for pair in pairs:
            run.add(pair)
            bar.update(batch_rows(pair.a))
    return run.result()


def _same_reading(spec: CompareSpec) -> bool:
    """Whether the layers of one model are read alike on both sides, so that it need run only once."""
    options = (spec.layers, spec.padding, spec.axes, spec.output)
    return all(one is other or one == other for one, other in options)


@contextmanager
def _as_they_came(*models: nn.Module) -> Iterator[None]:
    """Inside, the models are in evaluation mode; after it every training flag and grad mode is as before."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    grad = torch.is_grad_enabled()
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
        torch.set_grad_enabled(grad)


class _Run:
    """What was seen of both models so far."""

    def __init__(self, spec: CompareSpec, a: Side, b: Side, unread: Unread, notes: Sequence[str]) -> None:
        self._spec, self._a, self._b, self._unread, self._notes = spec, a, b, unread, notes
        mine = {id(module) for module in a.model.modules()}
        self._parts_shared = a is not b and any(id(module) in mine for module in b.model.modules())
        self._home = Home()
        self._matched: Correspondence | None = None
        self._estimate: Estimate | None = None
        self._samples: dict[str, Sample] = {}
        self._names: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    def add(self, pair: Pair) -> None:
        """Run both models on a batch and add what their layers put out."""
        a = self._a.read(pair.a)
        if a is not None and self._parts_shared:
            # The forward of b may write to what parts of a returned.
            a = replace(a, rows=replace(a.rows, layers=[x.clone() for x in a.rows.present]))
        b = a if self._b is self._a else self._b.read(pair.b)
        if a is None or b is None:
            return
        with torch.inference_mode(False), self._home.reading([*a.came, *b.came]):
            if self._matched is None:
                self._matched = Correspondence(a, b, pair, self._spec)
            self._matched.check(a, b, pair)
            batch = joined(a.rows, b.rows, aligned=self._matched.aligned)
            if self._estimate is None:
                self._names = a.names, b.names
                self._estimate = self._begun(batch)
            self._sum_up(batch, self._estimate)

    def _sum_up(self, batch: RowBatch, estimate: Estimate) -> None:
        rows: dict[str, Rows] = {}
        if self._samples or estimate.takes_rows:
            plan, seen = estimate.plan, estimate.sequences
            rows = {view: rows_of(view, batch, plan, seen) for view in plan.views}
        estimate.add(batch, rows)
        for view, sample in self._samples.items():
            sample.add(rows[view])

    def _begun(self, batch: RowBatch) -> Estimate:
        """What the first batch shows fits."""
        spec, matched = self._spec, self._matched
        assert matched is not None
        notes = [*self._notes]
        if matched.why:
            notes.append(f"row-by-row views were left out: {matched.why}")
        views = self._views(batch, matched.aligned)
        if spec.measures_of_sample:
            self._samples = {view: Sample(spec.sample_limit, spec.seed) for view in views}
        free = free_bytes(batch.first.device)
        memory = spec.memory_bytes if free is None else max(1, min(free, spec.memory_bytes))
        layers_a, too_big = len(self._names[0]), ""

        def planned(memory: int) -> Plan:
            plan = make_plan(
                [f"{side}.{name}" for side, names in zip("ab", self._names, strict=True) for name in names],
                [x.shape[2] for x in batch.present],
                batch.first.shape[1],
                positions=spec.positions,
                views=views,
                pairs=[(i, j) for i in range(layers_a) for j in range(layers_a, len(batch.layers))],
                groups=spec.groups,
                memory=memory,
                masked=batch.masked is not None,
                aligned=matched.aligned,
                padded=batch.padded,
                rows=[chosen.name for chosen in spec.selections],
                refine=False,
                notes=notes,
            )
            # Why positions cannot be compared has been said, and ranks are none of a comparison's.
            return replace(plan, notes=tuple(note for note in plan.notes if note != UNALIGNED))

        if not spec.measures_of_all:
            return Counted(planned(_UNBOUNDED), unread=self._unread)
        if spec.route != "samples":
            try:
                plan = planned(memory)
                return OfMoments(plan, layers_a, masked=batch.masked is not None, unread=self._unread)
            except ValueError as error:
                if spec.route == "moments":
                    raise
                too_big = str(error)
                notes.append("rows are held, since moments of all pairs do not fit the memory")
        return HeldRows(planned(_UNBOUNDED), layers_a, memory=memory, unread=self._unread, too_big=too_big)

    def _views(self, batch: RowBatch, aligned: bool) -> tuple[str, ...]:
        """The views asked for, or those that can be compared."""
        named = tuple(chosen.name for chosen in self._spec.selections)
        if self._spec.views is not None:
            return tuple(view for view in (*VIEWS, *named) if view in self._spec.views)
        if not aligned:
            return ("mean_pooled",)
        found = ["visible", "masked"] if batch.masked is not None else []
        found += ["position"] if found or self._spec.follows_positions else []
        single = batch.first.shape[1] == 1 and not found
        found += ["pooled"] if single else ["pooled", "mean_pooled"]
        return (*found, *named)

    def result(self) -> Comparison:
        """What was found of all batches."""
        self._unread.look()
        seen = 0 if self._estimate is None else self._estimate.sequences
        if self._estimate is None or seen < 4:
            raise ValueError(f"batches must hold at least 4 sequences in all, got n = {seen}")
        groups = self._spec.groups
        if groups > 1 and (seen < 2 * groups or seen - -(-seen // groups) < 4):
            raise ValueError(
                f"groups must hold at least 2 sequences each, and leave 4 without any of them, got {groups} "
                f"groups of {seen} sequences"
            )
        self._estimate.finish()
        models = [side.provenance() for side in (self._a, self._b)]
        dataset = assemble(self._estimate, self._samples, self._spec, self._names, models)
        return Comparison(dataset)


_UNBOUNDED = 1 << 62
