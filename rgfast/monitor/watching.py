"""The monitor: a fixed batch is probed while a model trains, and training does not notice."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rgfast.files import check_file
from rgfast.monitor import record
from rgfast.monitor.result import MonitorResult, header_of, values_of
from rgfast.probing import probe
from rgfast.probing.capture.batches import batch_items
from rgfast.probing.checkpoint import batch_digest
from rgfast.probing.estimators.finite import NOT_FINITE
from rgfast.probing.result import ProbeResult
from rgfast.probing.spec import MeasureOptions, ProbeSpec, shows_options
from rgfast.validation import check_integer, check_positive_int
from rgfast.wiring import lent

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Log", "Monitor"]

Log = Callable[[dict[str, float], int], object]


class Monitor:
    """Ranks, drifts and R² of targets of a fixed batch through training.

    >>> import torch, rgfast
    >>> model = rgfast.ResidualStack(width=4, depth=2, mixing="none", w2_scale=1.0)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> monitor = rgfast.Monitor(model, torch.randn(64, 3, 4), every=2, measures="effective_rank")
    >>> for i in range(5):
    ...     _ = monitor.step(i)
    ...     model(torch.randn(8, 3, 4)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> monitor.result().steps
    (0, 2, 4)

    Training does not notice: weights are bit for bit what they are without the monitor. The batch runs in
    evaluation mode, without gradients and outside of autocast, and torch's random numbers, training flags and
    hooks are as before. Values are those of :func:`rgfast.probe` on the weights of that step. With
    torch.distributed every rank has to call :meth:`step` (a sharded model runs on all of them), each measures
    its own batch, and rank 0 alone logs and writes.
    """

    @shows_options(MeasureOptions)
    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        *,
        every: int = 100,
        log: Log | None = None,
        path: str | Path | None = None,
        **options: Unpack[MeasureOptions],
    ) -> None:
        """A monitor of ``model``.

        Args:
            batch: one batch as the model takes it (a mapping, a tuple or a tensor), or a list of batches. It
                is used again and again, so it must stay as it is.
            every: measure at steps that are multiples of this.
            log: a function that is given the values, ``{"effective_rank/pooled/layer_3": 17.2, ...}``, and
                the step, such as ``wandb.log``: means over positions, drifts by ``transition_3``.
            path: the file that is written to as training goes, a line per measured step. Another process
                reads it by :meth:`MonitorResult.load`. If it exists, it is gone on with: steps from the first
                new one on are measured anew and replaced.
            options: those of :class:`rgfast.Probe`, but for the bar and for how ranks share the work.

        Raises TypeError and ValueError, naming the argument, for options out of range, a ``path`` that cannot
        be written, and a file there that is not of the same batch and options.
        """
        if unknown := set(options) - MeasureOptions.__optional_keys__:
            raise TypeError(f"Monitor has no option {sorted(unknown)[0]!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if log is not None and not callable(log):
            raise TypeError(f"log must be a function of values and a step, got {type(log).__name__}")
        check_positive_int(every, "every")
        self.model, self.every, self._log = model, every, log
        self._batches = list(batch) if isinstance(batch, list) else [batch]
        if not self._batches or not any(batch_items(each) for each in self._batches):
            raise ValueError("batch must hold a batch, got none")
        self._spec = ProbeSpec(**options)
        self._options = options
        self._digest = "".join(map(batch_digest, self._batches))
        self._header: dict[str, Any] | None = None
        self._steps: list[dict[str, Any]] = []
        self._path = None if path is None else check_file(path, "path")
        self._appends = False
        if self._path is not None and self._path.exists():
            self._header, self._steps = record.read(self._path)
            self._check_same(self._header)

    def step(self, i: int) -> dict[str, float] | None:
        """Measure if ``i`` is a multiple of ``every``; the values that were logged, or None.

        ``i`` is the number of steps that the weights have seen. The same step a second time (gradient
        accumulation) is not measured again; an earlier one (training went on from a checkpoint) replaces what
        was measured from there on. Raises what :meth:`measure` does.
        """
        check_integer(i, "i", least=0)
        if i % self.every or self.last == i:
            return None
        return self.measure(i)

    def measure(self, i: int) -> dict[str, float]:
        """Measure now, as step ``i``, whatever ``every`` is; the values that were logged.

        Activations that are not finite give NaN, a note and a RuntimeWarning, and training goes on. Raises
        what :func:`rgfast.probe` raises, and OSError, naming the file, where the step cannot be written.
        """
        check_integer(i, "i", least=0)
        try:
            found, note = self._probed(), ""
        except ValueError as error:
            if not str(error).startswith(NOT_FINITE) or self._header is None:
                raise
            found, note = None, str(error)
            warnings.warn(f"step {i}: {note}", RuntimeWarning, stacklevel=2)
        if found is not None and self._header is None:
            self._header = self._new_header(found)
        values = {} if found is None else values_of(found.dataset, self._spec.measures)
        self._add({"step": i, "values": values, **({"note": note} if note else {})})
        named = self._named()
        if self._log is not None and _rank() == 0:
            self._log(named, i)
        return named

    @property
    def last(self) -> int | None:
        """The last step that this monitor measured; None before the first."""
        return int(self._steps[-1]["step"]) if self._appends else None

    def result(self) -> MonitorResult:
        """All that was measured so far. Raises RuntimeError before the first measured step."""
        if not self._steps or self._header is None:
            raise RuntimeError("nothing was measured yet: step(i) measures where i is a multiple of every")
        return MonitorResult(self._header, self._steps)

    def transformers_callback(self) -> Any:
        """A callback of transformers' Trainer: at its start and its end, and after every ``every``-th step.

        Raises ImportError if transformers is not installed.
        """
        return lent("transformers_callback")(self)

    def lightning_callback(self) -> Any:
        """A callback of Lightning's Trainer: at its start and its end, and after every ``every``-th step.

        Raises ImportError if neither lightning nor pytorch_lightning is installed.
        """
        return lent("lightning_callback")(self)

    def _probed(self) -> ProbeResult:
        devices = {p.device for p in self.model.parameters()}
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([d for d in devices if d.type == "cuda"]))
            for kind in {d.type for d in devices}:
                if torch.amp.is_autocast_available(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return probe(self.model, self._batches, **self._options, distributed=False, progress=False)

    def _new_header(self, found: ProbeResult) -> dict[str, Any]:
        asked = self._spec.to_json(found.layers)
        provenance = {k: v for k, v in found.provenance.items() if k != "weights"}
        header = header_of(found.dataset, self._spec.measures, provenance)
        return {**header, "asked": asked, "batch": self._digest}

    def _check_same(self, header: Mapping[str, Any]) -> None:
        asked = self._spec.to_json(header["asked"]["layers"])
        differ = [name for name in asked if asked[name] != header["asked"].get(name)]
        if header["batch"] != self._digest:
            differ.insert(0, "batch")
        if differ:
            raise ValueError(
                f"path: {self._path} was written with another {differ[0]}; delete it, or give another path"
            )

    def _add(self, step: dict[str, Any]) -> None:
        kept = [one for one in self._steps if one["step"] < step["step"]]
        assert self._header is not None
        if self._path is not None and _rank() == 0:
            if not self._appends or len(kept) < len(self._steps) or not self._path.exists():
                record.rewrite(self._path, self._header, [*kept, step])
            else:
                record.append(self._path, step)
        self._steps, self._appends = [*kept, step], True

    def _named(self) -> dict[str, float]:
        """The last step's values by name, means over positions."""
        assert self._header is not None
        last = MonitorResult(self._header, self._steps[-1:])
        out: dict[str, float] = {}
        for view in last.views:
            for measure in last.measures:
                values = last.by_step(measure, view).isel(step=0)
                if "other_layer" in values.dims:
                    continue
                along = str(values.dims[0])
                for k, value in zip(values[along].values, values.values, strict=True):
                    out[f"{measure}/{view}/{along}_{int(k)}"] = float(value)
            for target in last.targets:
                for k, value in enumerate(last.target_r2(target, view).isel(step=0).values):
                    out[f"target_r2/{target}/{view}/layer_{k}"] = float(value)
        return out


def _rank() -> int:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 0
    return int(distributed.get_rank())
