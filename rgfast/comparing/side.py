"""One of the two models: what its layers put out for a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rgfast.comparing.spec import CompareSpec
from rgfast.probing.capture.axes import Axes
from rgfast.probing.capture.batches import batch_rows
from rgfast.probing.capture.entries import Entries
from rgfast.probing.capture.layers import check_model, resolve
from rgfast.probing.capture.notes import Notes
from rgfast.probing.capture.outputs import Outputs
from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.capture.watcher import Seen, Watcher
from rgfast.probing.checkpoint import fingerprint
from rgfast.probing.distributed import unwrapped
from rgfast.probing.provenance import provenance
from rgfast.probing.sharding import is_sharded, sharded_over
from rgfast.probing.sources.replay import SavedActivations
from rgfast.probing.unread import Unread

__all__ = ["Read", "Side", "renamed"]


@dataclass(frozen=True)
class Read:
    """What the layers of one model put out for a batch, and the streams that they came on."""

    names: tuple[str, ...]
    rows: RowBatch
    came: tuple[tuple[Tensor, Any], ...]


class Side:
    """Runs one model on batches, in evaluation mode, and reads its layers as a probe does.

    Hooks are there only while the model runs, so that two sides may share a model or parts of one.

    Raises TypeError or ValueError, naming the argument of this side, for what is no model and for layers that
    are not found.
    """

    def __init__(self, model: nn.Module, side: Literal["a", "b"], spec: CompareSpec, unread: Unread) -> None:
        with renamed({"model": side}):
            check_model(model)
        self.model, self.side = unwrapped(model), side
        if is_sharded(self.model):
            raise ValueError(
                f"{side} must be a model that a single process runs, got one that is sharded over ranks "
                f"{sorted(sharded_over(self.model))}"
            )
        at = 0 if side == "a" else 1
        if isinstance(self.model, SavedActivations):
            self.taps = self.model.taps()
        else:
            with renamed({"layers": f"layers_{side}"}):
                self.taps, _ = resolve(self.model, spec.layers[at])
        self._notes = Notes()
        self._axes = Axes(spec.axes[at], self.model, self.taps, self._notes)
        self._entries = Entries(
            self.model,
            self.taps,
            mask=spec.mask if side == "a" else None,
            padding=spec.padding[at],
            origin=spec.origin,
            targets=(),
            selections=spec.selections if side == "a" else (),
            notes=self._notes,
            unread=unread,
        )
        outputs = Outputs(spec.output[at], self.taps, unread)
        self._watcher = Watcher(self.model, self.taps, self, outputs, tiles=False)
        self._read: Read | None = None
        self._seen = 0
        self._names: tuple[str, ...] = ()

    def read(self, batch: Any) -> Read | None:
        """What the layers put out for a batch; None for an empty one.

        Raises ValueError for a layer that did not run, naming it, and what a probe of this model would raise.
        """
        if not batch_rows(batch):
            return None
        self._axes.open()
        try:
            with self._watcher, renamed({"layers": f"layers_{self.side}"}):
                self._entries.run(batch)
        finally:
            self._axes.close()
        found, self._read = self._read, None
        assert found is not None
        if found.rows.missing:
            names = ", ".join(found.names[layer] for layer in found.rows.missing)
            raise ValueError(
                f"layers_{self.side}: {names} did not run for this batch; name layers that always do"
            )
        if self._names and found.names != self._names:
            raise ValueError(
                f"layers_{self.side} must be the same for all batches, got {', '.join(found.names)}"
            )
        self._names = found.names
        return found

    def provenance(self) -> dict[str, Any]:
        """Where what was read comes from."""
        if isinstance(self.model, SavedActivations):
            kind = {"model": "Activations", "source": self.model.source, "weights": None}
        else:
            kind = {"weights": fingerprint(self.model)}
        return {**provenance(self.model, layers=list(self._names)), **kind}

    # What the watcher tells.

    def began(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is about to run."""
        self._entries.begin(args, kwargs)

    def entered(self, x: Tensor) -> None:
        """Not called: no stack hands over tiles."""

    def tile(self, first: int, states: Tensor) -> None:
        """Not called: no stack hands over tiles."""

    def finished(self, seen: Sequence[Seen] | None) -> None:
        """The forward is over."""
        assert seen is not None
        with torch.inference_mode(False), torch.no_grad():
            rows = self._axes.rows(seen, self._entries.now)
            batch = self._entries.batch(rows, [x.tap for x in seen], self._seen)
        came = tuple((x.value, x.stream) for x in seen if x.value is not None)
        self._read = Read(tuple(x.name for x in seen), batch, came)
        self._seen += batch.sequences
        self._entries.end()


@contextmanager
def renamed(names: dict[str, str]) -> Iterator[None]:
    """Errors of the probe's parts with the names that the options have here, if they begin with one."""
    try:
        yield
    except (TypeError, ValueError) as error:
        text = str(error) if type(error) in (TypeError, ValueError) else ""
        for old, new in names.items():
            if text.startswith((f"{old} ", f"{old}:", f"{old}=")):
                raise type(error)(new + text[len(old) :]) from error
        raise
