"""Probing a model: hooks on its layers, one pass over the batches, moments as the state."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rgfast.probing import checkpoint as checkpoints
from rgfast.probing.activations import as_rows, find_tensor
from rgfast.probing.assemble import assemble
from rgfast.probing.batches import Caller, batch_rows, iterate
from rgfast.probing.layers import LayerSpec, resolve
from rgfast.probing.measures import DRIFTS, LABELS, PAIRWISE
from rgfast.probing.plan import Plan, check_views, make_plan, parse_memory
from rgfast.probing.provenance import provenance
from rgfast.probing.result import ProbeResult
from rgfast.probing.targets import TargetSpec, make_targets
from rgfast.probing.views import ViewState
from rgfast.streaming import Pairs, as_pairs
from rgfast.validation import check_positive_int

__all__ = ["Probe", "probe"]

_FOLDS = 5

MaskSpec = str | Callable[[Mapping[str, Any]], Tensor] | None


def probe(
    model: nn.Module,
    batches: Any,
    *,
    layers: str | LayerSpec | Sequence[LayerSpec] = "auto",
    positions: str | Sequence[int] = "auto",
    measures: str | Sequence[str] = "all",
    pairs: Pairs = "adjacent",
    mask: MaskSpec = None,
    targets: Mapping[str, TargetSpec] | None = None,
    groups: int = 1,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 16,
    progress: bool | None = None,
    memory: str | int = "4GiB",
    views: Sequence[str] | None = None,
    batch_size: int = 256,
    refine: bool | None = None,
) -> ProbeResult:
    """Measures of every layer and position of ``model`` over ``batches``, a :class:`ProbeResult`.

    One pass in evaluation mode without gradients; memory does not depend on the number of samples.

    Args:
        model: any module. Hooks, training flags and grad mode are as before when this returns or raises.
        batches: an iterable of batches (a list, a DataLoader), or one mapping of whole arrays or one array,
            which is cut into pieces of ``batch_size``. A batch is a mapping (what ``forward`` takes by name
            is passed), a tuple (as many items as ``forward`` requires) or a tensor. An entry
            ``attention_mask`` ``[B, T]`` says which positions count.
        layers: ``"auto"`` (the residual stream: the input of the first block and the output of each), names,
            indices, globs or regular expressions, see :func:`rgfast.probing.layers.resolve`. A layer's output
            may be a tensor, or a tuple, mapping or dataclass holding one, ``[B, D]``, ``[B, T, D]`` or
            ``[B, C, H, W]``.
        positions: those followed one by one: indices, ``"all"``, or ``"auto"``: all if they fit ``memory``,
            else log-spaced ones.
        measures: ``"all"``, or some of ``effective_rank``, ``effective_rank_variance``,
            ``participation_ratio``, ``stable_rank``, ``numerical_rank`` (singular values above 1e-7 of the
            largest), ``effective_rank_uncentred``, ``effective_rank_variance_uncentred``, ``kernel_drift``
            (1 − biased CKA of neighbours), ``kernel_drift_debiased``, ``kernel_change`` (‖K' − K‖/‖K‖),
            ``cka`` (debiased), ``cka_biased``. Singular values are always there.
        pairs: of which layers CKA is taken: ``"adjacent"``, ``"all"`` or index pairs.
        mask: the name of a batch entry, or a function of the batch's entries, that gives ``[B, T]`` bool:
            True where the token was hidden. It makes the views ``visible`` and ``masked``.
        targets: name -> what to predict linearly from each layer: an array over all sequences, the name of a
            batch entry, or a function of the entries; vectors ``[B, T, m]`` or ``[B, m]``, or integer labels
            ``[B, T]`` or ``[B]`` (one-hot). ``target_r2`` is the R² on held-out groups of the least squares
            map from the others; with ``groups=1`` five groups are made.
        groups: G > 1 gives jackknife standard errors over G groups of sequences, number i in group i mod G.
            The state is G times as large.
        checkpoint: a file to write the moments to, atomically, after every ``checkpoint_every`` batches and
            at the end. Where it exists the run goes on from it: with the same batches in the same order the
            bits are those of a run that never stopped (on the same machine and versions).
        progress: False is silent; otherwise what was chosen and what it costs is printed, and a bar is shown
            where True, or by default on a terminal.
        memory: bytes, or text such as ``"4GiB"``, that the state may take.
        views: some of ``visible`` (rows whose token is seen), ``masked``, ``position`` (all rows at each
            position), ``pooled`` (all rows at all positions as one cloud), ``mean_pooled`` (a sequence's mean
            over positions), ``flattened`` (a sequence as one row); by default all that the data allow, the
            last one where it is small. Drift is NaN and rank 0 for a layer without variance.
        refine: whether to keep, beside the moments, triangular factors of layers whose rows are deficient but
            for rounding (what a LayerNorm puts out, more features than tokens): they give the small singular
            values that moments lose, at up to 1.5 times the state and a few times the products of such a
            layer. By default for widths to 512, where ``memory`` allows; ``effective_rank_bound`` says what
            is known either way.

    Moments are fp64, whatever the model computes in; definitions are those of the functions of the same
    names. The bits do not depend on how samples are cut into batches, as far as the model's own do not.

    Raises ValueError for options out of range, layers that are not found, a budget that nothing fits (naming
    the change to make), NaN or infinity (naming layer, position and count), fewer than 2 sequences; whatever
    the model raises is passed on.

    >>> import torch, rgfast
    >>> stack = rgfast.ResidualStack(width=4, depth=2, mixing="none")
    >>> result = rgfast.probe(stack, torch.randn(100, 3, 4), progress=False)
    >>> result.order_parameter("position", "kernel_drift").values
    array([0., 0.])
    """
    check_positive_int(batch_size, "batch_size")
    check_positive_int(checkpoint_every, "checkpoint_every")
    with Probe(
        model,
        layers=layers,
        positions=positions,
        measures=measures,
        pairs=pairs,
        mask=mask,
        targets=targets,
        groups=groups,
        progress=progress,
        memory=memory,
        views=views,
        refine=refine,
    ) as watched:
        model.eval()
        stream = enumerate(iterate(batches, batch_size), start=1)
        done = 0
        if checkpoint is not None:
            done = _resume(watched, Path(checkpoint), stream)
        bar = tqdm(unit="sequence", desc="probe", disable=None if progress is None else not progress)
        last: Any = None
        with torch.no_grad(), bar:
            for done, last in stream:
                watched.run(last)
                bar.update(batch_rows(last))
                if checkpoint is not None and done % checkpoint_every == 0:
                    _save(watched, Path(checkpoint), done, last)
        if checkpoint is not None and last is not None and done % checkpoint_every:
            _save(watched, Path(checkpoint), done, last)
        return watched.result()


def _resume(watched: Probe, path: Path, stream: Iterator[tuple[int, Any]]) -> int:
    """Restore ``path``, where it exists, and take from ``stream`` the batches it has seen; their number."""
    checkpoints.clear_stale(path)
    if not path.exists():
        return 0
    header, arrays = checkpoints.read(path)
    watched.restore(header, arrays)
    if watched._say:
        print(f"probe: going on after batch {header['batches']} of {path}")
    last = next((batch for number, batch in stream if number == header["batches"]), None)
    if last is None or checkpoints.batch_digest(last) != header["last"]:
        raise ValueError(
            f"batches must be those that checkpoint {path} has seen {header['batches']} of, got others; "
            "delete it to start anew"
        )
    return int(header["batches"])


def _save(watched: Probe, path: Path, batches: int, last: Any) -> None:
    if watched.plan is not None:
        header, arrays = watched.snapshot()
        seen = {"batches": batches, "last": checkpoints.batch_digest(last)}
        checkpoints.write(path, {**header, **seen}, arrays)


@dataclass(frozen=True)
class _Captured:
    """An activation, the tensor it came as, and how often that had been written to."""

    value: Tensor
    original: Tensor
    version: int


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class Probe:
    """The context manager behind :func:`probe`, for a loop of one's own.

    Inside the ``with`` block every forward of the model is measured; arguments are those of :func:`probe`.
    ``run(batch)`` calls the model as :func:`probe` does; a plain ``model(...)`` works too, and ``mask`` then
    names an argument of the forward or an entry given by :meth:`note` before it. On leaving, hooks are gone
    and training flags and grad mode are as they were on entering.

    >>> import torch, rgfast
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> with rgfast.Probe(model, layers=["0", "2"], progress=False) as p:
    ...     for _ in range(3):
    ...         _ = model(torch.randn(10, 4))
    >>> p.result().dataset.n.values
    array([[30]])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str | LayerSpec | Sequence[LayerSpec] = "auto",
        positions: str | Sequence[int] = "auto",
        measures: str | Sequence[str] = "all",
        pairs: Pairs = "adjacent",
        mask: MaskSpec = None,
        targets: Mapping[str, TargetSpec] | None = None,
        groups: int = 1,
        progress: bool | None = None,
        memory: str | int = "4GiB",
        views: Sequence[str] | None = None,
        refine: bool | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_positive_int(groups, "groups")
        if mask is not None and not isinstance(mask, str) and not callable(mask):
            raise TypeError(
                f"mask must be the name of a batch entry or a callable, got {type(mask).__name__}"
            )
        if refine is not None and not isinstance(refine, bool):
            raise TypeError(f"refine must be True, False or None, got {refine!r}")
        self.model, self._refine = model, refine
        self.measures = _measures(measures)
        pairs = as_pairs(pairs)
        self._pairs: Pairs = pairs if set(self.measures) & {*DRIFTS, *PAIRWISE} else ()
        self._targets = make_targets(targets)
        if self._targets and groups == 1:
            groups = _FOLDS
        self._mask, self._groups, self._views = mask, groups, None if views is None else list(views)
        self._positions, self._memory = positions, parse_memory(memory)
        self._taps, chosen = resolve(model, layers)
        if views is not None:
            check_views(views)
        self._say = progress is not False
        if self._say and layers == "auto":
            print(f"probe: {chosen}")
        self._caller = Caller(model)
        self._signature = inspect.signature(model.forward)
        self._captured: dict[int, _Captured] = {}
        self._entries: dict[str, Any] = {}
        self._noted: dict[str, Any] = {}
        self._copied, self._first = set(range(len(self._taps))), True
        self._handles: list[Any] = []
        self._state: ViewState | None = None
        self._provenance: dict[str, Any] = {}

    @property
    def plan(self) -> Plan | None:
        """What is measured and what it costs; None before the first forward."""
        return None if self._state is None else self._state.plan

    def __enter__(self) -> Probe:
        self._modes = [(module, module.training) for module in self.model.modules()]
        self._grad = torch.is_grad_enabled()
        modules = dict(self.model.named_modules(remove_duplicate=False))
        try:
            self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
            for index, tap in enumerate(self._taps):
                module = modules[tap.module]
                if tap.side == "output":
                    self._handles.append(module.register_forward_hook(self._on_output(index)))
                else:
                    self._handles.append(
                        module.register_forward_pre_hook(self._on_input(index), with_kwargs=True)
                    )
            self._handles.append(self.model.register_forward_hook(self._finish))
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._captured.clear()
        for module, training in self._modes:
            module.training = training
        torch.set_grad_enabled(self._grad)

    def note(self, **entries: Any) -> None:
        """Give the next forward entries that the model itself does not take, for ``mask``."""
        self._noted.update(entries)

    def run(self, batch: Any) -> Any:
        """The output of the model on one batch, called as :func:`probe` does; an empty batch gives None."""
        if not self._handles:
            raise RuntimeError("run() must be called inside the with block")
        if not batch_rows(batch):
            return None
        entries = self._caller.entries(batch)
        named = [self._mask, *(target.entry for target in self._targets)]
        reserved = frozenset(name for name in named if isinstance(name, str))
        self._noted.update(entries)
        return self._caller(batch, entries, reserved)

    def result(self) -> ProbeResult:
        """The measures of all that was seen so far.

        Raises ValueError for fewer than 2 sequences.
        """
        seen = 0 if self._state is None else self._state.sequences
        if self._state is None or seen < 2:
            raise ValueError(f"batches must hold at least 2 sequences in all, got n = {seen}")
        if seen < 2 * self._groups:
            raise ValueError(
                f"groups must hold at least 2 sequences each, got {self._groups} groups of {seen} sequences"
            )
        dataset = assemble(self._state, self.measures, self._provenance)
        return ProbeResult(dataset, self._state.state_dict())

    def snapshot(self) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
        """All that a checkpoint holds: what is measured and on which model, and the moments.

        Raises RuntimeError before the first forward.
        """
        if self._state is None:
            raise RuntimeError("snapshot() has nothing to give before the first forward")
        header = {
            "plan": self._state.plan.to_json(),
            "masked": self._state.masked,
            "asked": self._asked_for(),
            "model": checkpoints.model_digest(self.model),
            "provenance": self._provenance,
        }
        return header, self._state.state_dict()

    def restore(self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Go on from what :meth:`snapshot` gave. Raises ValueError where it was of another probe or model."""
        asked = self._asked_for()
        for name, value in asked.items():
            if header["asked"].get(name) != value:
                was = header["asked"].get(name)
                raise ValueError(
                    f"checkpoint is of another probe: {name} was {was}, now {value}; delete it to start anew"
                )
        if header["model"] != checkpoints.model_digest(self.model):
            raise ValueError("checkpoint is of a model with other weights; delete it to start anew")
        plan, _ = Plan.from_json(header["plan"])
        self._state = ViewState(plan, masked=header["masked"])
        first = next(iter(self.model.parameters()), None)
        self._state.load_state_dict(arrays, "cpu" if first is None else first.device)
        for target, (_, width) in zip(self._targets, plan.targets, strict=True):
            target.classes = width
        self._provenance = dict(header["provenance"])

    def _asked_for(self) -> dict[str, Any]:
        """The options that decide what is measured, as JSON gives them back."""
        asked = {
            "layers": [tap.name for tap in self._taps],
            "positions": self._positions if isinstance(self._positions, str) else list(self._positions),
            "measures": self.measures,
            "pairs": self._pairs if isinstance(self._pairs, str) else [list(pair) for pair in self._pairs],
            "mask": self._mask if isinstance(self._mask, str) else self._mask is not None,
            "targets": [target.name for target in self._targets],
            "groups": self._groups,
            "views": self._views,
            "memory": self._memory,
            "refine": self._refine,
        }
        found: dict[str, Any] = json.loads(json.dumps(asked))
        return found

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._captured.clear()
        try:
            bound = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        except TypeError:
            bound = {}
        self._entries = {**bound, **bound.pop("kwargs", {}), **self._noted}
        self._noted = {}

    def _on_output(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._capture(index, output)

        return hook

    def _on_input(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._capture(index, [*args, *kwargs.values()])

        return hook

    def _capture(self, index: int, value: Any) -> None:
        tap = self._taps[index]
        if index in self._captured:
            raise ValueError(
                f"layers: {tap.module!r} ran twice in one forward (shared weights?), so its output is "
                "ambiguous; name modules that run once"
            )
        x = find_tensor(value, tap.name).detach()
        self._captured[index] = _Captured(x.clone() if index in self._copied else x, x, _version(x))

    def _finish(self, module: nn.Module, args: Any, output: Any) -> None:
        entries, self._entries = self._entries, {}
        missing = [tap.name for k, tap in enumerate(self._taps) if k not in self._captured]
        if missing:
            raise ValueError(f"layers: {', '.join(missing)} did not run in this forward")
        kept = [self._captured[k] for k in range(len(self._taps))]
        self._captured = {}
        self._check_unchanged(kept)
        rows = [as_rows(x.value, tap.name) for x, tap in zip(kept, self._taps, strict=True)]
        if not rows[0].shape[0]:
            return
        keep, masked = self._row_masks(entries, rows)
        seen = 0 if self._state is None else self._state.sequences
        batch, length = rows[0].shape[:2]
        targets = [target.rows(entries, seen, batch, length).to(rows[0].device) for target in self._targets]
        if self._state is None:
            self._state = self._start(rows, masked is not None, targets)
        with torch.no_grad():
            self._state.update(rows, keep, masked, targets)

    def _check_unchanged(self, kept: list[_Captured]) -> None:
        """Copies are made in the first forward, later of those layers only that the model then wrote to."""
        written = {k for k, x in enumerate(kept) if _version(x.original) != x.version}
        if self._first:
            self._copied, self._first = written, False
        elif written - self._copied:
            names = ", ".join(self._taps[k].name for k in sorted(written - self._copied))
            raise RuntimeError(
                f"the model wrote to the output of {names}, which it left alone in its first forward"
            )

    def _start(self, rows: list[Tensor], masked: bool, targets: list[Tensor]) -> ViewState:
        sizes = {x.shape[0] for x in rows}
        if len(sizes) != 1:
            found = {tap.name: x.shape[0] for tap, x in zip(self._taps, rows, strict=True)}
            raise ValueError(f"layers must have the same number of rows, got {found}")
        plan = make_plan(
            [tap.name for tap in self._taps],
            [x.shape[2] for x in rows],
            rows[0].shape[1],
            positions=self._positions,
            views=self._views,
            pairs=self._pairs,
            groups=self._groups,
            memory=self._memory,
            masked=masked,
            aligned=len({x.shape[1] for x in rows}) == 1,
            targets=[(t.name, x.shape[2]) for t, x in zip(self._targets, targets, strict=True)],
            refine=self._refine,
        )
        if self._say:
            print(f"probe: {plan}")
            sys.stdout.flush()
        self._provenance = provenance(self.model, layers=list(plan.names), measures=list(self.measures))
        return ViewState(plan, masked=masked)

    def _row_masks(
        self, entries: Mapping[str, Any], rows: list[Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which rows count (None: all) and which were hidden (None: no mask), ``[B, T]`` bool."""
        shape = tuple(rows[0].shape[:2])
        device = rows[0].device
        keep = entries.get("attention_mask")
        if isinstance(keep, Tensor) and shape[1] > 1:
            if tuple(keep.shape) != shape:
                raise ValueError(
                    f"attention_mask must be {list(shape)}, as the layers are, got shape {list(keep.shape)}"
                )
            keep = keep.to(device) != 0
        if not isinstance(keep, Tensor) or shape[1] == 1 or bool(keep.all()):
            keep = None
        if self._mask is None:
            return keep, None
        if isinstance(self._mask, str):
            if self._mask not in entries:
                raise ValueError(
                    f"mask: there is no entry {self._mask!r} in the batch ({', '.join(entries)})"
                )
            masked = entries[self._mask]
        else:
            masked = self._mask(entries)
        masked = torch.as_tensor(masked, device=device)
        if masked.dtype != torch.bool or tuple(masked.shape) != shape:
            raise ValueError(
                f"mask must be bool {list(shape)}, got {str(masked.dtype).removeprefix('torch.')} "
                f"{list(masked.shape)}"
            )
        return keep, masked


def _measures(asked: str | Sequence[str]) -> tuple[str, ...]:
    if asked == "all":
        return tuple(LABELS)
    names = [asked] if isinstance(asked, str) else list(asked)
    for name in names:
        if name not in LABELS:
            raise ValueError(f"measures must be 'all' or among {', '.join(LABELS)}, got {name!r}")
    if not names:
        raise ValueError("measures must name at least one measure, got none")
    return tuple(name for name in LABELS if name in names)
