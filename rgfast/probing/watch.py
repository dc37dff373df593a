"""The probe of a loop of one's own: options, layers, batches and estimators put together."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rgfast.probing.batching import batch_size, tile_size
from rgfast.probing.capture.activations import Activation
from rgfast.probing.capture.axes import Axes, laid_out
from rgfast.probing.capture.entries import Entries
from rgfast.probing.capture.layers import check_model, resolve
from rgfast.probing.capture.notes import Notes
from rgfast.probing.capture.outputs import Outputs
from rgfast.probing.capture.placed import Placed
from rgfast.probing.capture.recompute import in_pipeline
from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.capture.watcher import Seen, Watcher
from rgfast.probing.distributed import open_ranks, unwrapped
from rgfast.probing.in_step import InStep
from rgfast.probing.plan import Plan
from rgfast.probing.predict import Foreseen
from rgfast.probing.ranks import Ranks
from rgfast.probing.result import ProbeResult
from rgfast.probing.sharding import is_sharded, local
from rgfast.probing.sources.keep import Keeper
from rgfast.probing.sources.replay import SavedActivations
from rgfast.probing.spec import ProbeSpec, WatchOptions, shows_options
from rgfast.probing.tally import Tally
from rgfast.probing.unread import Unread
from rgfast.runtime import known_answers
from rgfast.runtime.streams import Home, capturing, stream_of
from rgfast.streaming import pair_keys

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Probe", "opened"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Ops whose kernels for GPUs run beside forwards or after them.
_ROOMS = ("cka", "moments", "spectrum")


def _telling_ranks(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """``method``, after which the other ranks know of an error in it."""

    @functools.wraps(method)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(*args, **kwargs)
        except BaseException as error:
            ranks: Ranks | None = getattr(args[0], "_ranks", None)
            if ranks is not None:
                ranks.fail(error)
            raise

    return wrapped


def _without_grad(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """``method`` without gradients and out of inference mode: what it keeps is summed after the loop."""
    return torch.inference_mode(False)(torch.no_grad()(method))


class Probe:
    """The context manager behind :func:`probe`, for a loop of one's own.

    Inside the ``with`` block every forward of the model is measured; arguments are those of :func:`probe`,
    but for how batches are cut and written. ``run(batch)`` calls the model as :func:`probe` does; a plain
    ``model(...)`` works too, and ``mask`` then names an argument of the forward or an entry given by
    :meth:`note` before it. On leaving, hooks are gone and training flags and grad mode are as they were on
    entering. A compiled model runs eagerly inside the block. Training steps may run there: what activation
    checkpointing runs again in a backward is not counted a second time.

    >>> import torch, rgfast
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> with rgfast.Probe(model, layers=["0", "2"], progress=False) as p:
    ...     for _ in range(3):
    ...         _ = model(torch.randn(10, 4))
    >>> p.result().dataset.n.values
    array([[30]])
    """

    @shows_options(WatchOptions)
    def __init__(self, model: nn.Module, **options: Unpack[WatchOptions]) -> None:
        if unknown := set(options) - WatchOptions.__optional_keys__:
            raise TypeError(f"Probe has no option {sorted(unknown)[0]!r}")
        self._open(model, ProbeSpec(**options))

    @_telling_ranks
    def _open(self, model: nn.Module, spec: ProbeSpec) -> None:
        check_model(model)
        self._ranks = open_ranks(spec.distributed, spec.timeout)
        self._every_rank = isinstance(spec.distributed, (str, bool))
        if self._ranks is not None:
            weakref.finalize(self, self._ranks.leave)
        self.model, self.measures = unwrapped(model), tuple(spec.measures)
        sharded = is_sharded(self.model)
        self._in_step = None if self._ranks is None or not sharded else InStep(self.model, self._ranks)
        self._first = 0
        if isinstance(self.model, SavedActivations):
            if self._ranks is not None:
                self.model.divide(self._ranks)
            self._first = self.model.first
            self._taps, chosen = self.model.taps(), f"{len(self.model.taps())} layers of saved activations"
        else:
            self._taps, chosen = resolve(self.model, spec.layers)
        if not (spec.layers == "auto" and len(self._taps) == 2):  # one block may run many times
            pair_keys(spec.compared, len(self._taps))
        say = spec.shows_progress and (self._ranks is None or self._ranks.rank == 0)
        if say and spec.layers == "auto":
            print(f"probe: {chosen}")
        targets = spec.new_targets()
        notes, self._unread = Notes(), Unread()
        self._axes = Axes(spec.axes, self.model, self._taps, notes)
        self._entries = Entries(
            self.model,
            self._taps,
            mask=spec.mask,
            padding=spec.padding,
            origin=spec.origin,
            targets=targets,
            selections=spec.new_selections(),
            notes=notes,
            unread=self._unread,
        )
        self._placed = Placed(spec.placements, self.model, self._taps, self._ranks)
        self._tally = Tally(self.model, spec, self._taps, targets, self._ranks, self._unread, say=say)
        self._spec = spec
        self._watcher = Watcher(
            self.model,
            self._taps,
            self,
            Outputs(spec.output, self._taps, self._unread),
            tile=tile_size(self.model, spec.groups),
            tiles=not spec.reads_layers and not sharded,  # as many forwards of a block as there are tiles
        )
        self._whole: RowBatch | None = None
        self._home = Home()
        self._keeper: Keeper | None = None

    @property
    def plan(self) -> Plan | None:
        """What is measured and what it costs; None before the first forward."""
        return self._tally.plan

    @property
    def nbytes(self) -> int:
        """Bytes that the state takes now, rows that the sample route holds back not counted."""
        return self._tally.nbytes

    @property
    def ranks(self) -> Ranks | None:
        """The processes that probe together; None for one by itself."""
        return self._ranks

    @_telling_ranks
    def __enter__(self) -> Probe:
        if self._tally.ended:
            raise RuntimeError("this Probe has summed what all ranks saw; take a new one to see more")
        modes = [(module, module.training) for module in self.model.modules()]
        grad = torch.is_grad_enabled()
        state = itertools.chain(self.model.parameters(), self.model.buffers())
        known_answers.prepare({x.device for x in state}, _ROOMS)
        if self._in_step is not None:
            self._in_step.open(self._placed.meet)
        self._tally.open()
        self._watcher.__enter__()
        self._axes.open()
        self._modes, self._grad = modes, grad
        return self

    def __exit__(self, kind: object, value: BaseException | None, trace: object) -> None:
        try:
            if self._in_step is not None:
                self._end_in_step(self._in_step, value)
            elif self._ranks is not None and value is not None:
                self._ranks.fail(value)
        finally:
            if value is not None:
                self._tally.close(failed=True)
            self._watcher.close()
            self._axes.close()
            self._whole = None
            for module, training in self._modes:
                module.training = training
            torch.set_grad_enabled(self._grad)
        if value is None:
            self._tally.close(failed=False)

    def _end_in_step(self, in_step: InStep, error: BaseException | None) -> None:
        """Take part in what forwards of the other ranks are left, and tell them of an error.

        Raises RankError if that is of another rank.
        """
        try:
            if error is None:
                self._join(in_step)
            elif lost := in_step.lost(error):
                raise lost from error
        except BaseException as found:
            error = found
            raise
        finally:
            if error is not None and self._ranks is not None:
                self._ranks.fail(error)
                in_step.leave(self._unseen)
            in_step.close()

    def _join(self, in_step: InStep) -> None:
        try:
            in_step.join(self._unseen, self._passed)
        except RuntimeError as error:
            if lost := in_step.lost(error):
                raise lost from error
            raise

    @_without_grad
    def _passed(self) -> None:
        if self._tally.due:
            with self._placed.together():
                self._tally.passed()
        self._tally.hand_rows()

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        """Inside, forwards are not measured."""
        with self._watcher.paused():
            yield
        self._axes.forget()

    def note(self, **entries: Any) -> None:
        """Give the next forward entries that the model itself does not take, for ``mask``."""
        self._entries.note(entries)

    def batch_size(self, batches: Any) -> int:
        """Sequences of a batch, if ``batches`` is one array or mapping.

        :meta private:
        """
        return batch_size(self._spec, self.model, self._taps, batches)

    def run(self, batch: Any) -> Any:
        """The output of the model on one batch, called as :func:`probe` does; an empty batch gives None."""
        if not self._watcher.is_open:
            raise RuntimeError("run() must be called inside the with block")
        return self._entries.run(batch)

    @_without_grad
    def forward(self, batch: Any) -> Any:
        """The output of the model on one batch, called as :meth:`run` does, outside the with block: nothing
        is measured. The model is in evaluation mode meanwhile.

        :meta private:
        """
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            return self._entries.run(batch)
        finally:
            for module, training in modes:
                module.training = training

    def foreseen(self, batch: Any, sequences: int) -> Foreseen:
        """What ``sequences`` like those of the one batch so far, which was ``batch``, lead to.

        :meta private:
        """
        return self._tally.foreseen(batch, sequences)

    def by_samples(
        self, batches: Iterator[Any], advance: Callable[[int], object]
    ) -> tuple[ProbeResult | None, list[Any]]:
        """The measures of all ``batches`` of a stack without mixing, or None and the batches taken so far.

        Such a stack takes a few positions at a time through all its layers: nothing else is ever stored.
        """
        return self._tally.by_tiles(batches, advance)

    def result(self) -> ProbeResult:
        """The measures of all that was seen so far. With several ranks, the call outside the with block is
        the last exchange.

        Raises ValueError for fewer than 2 sequences.
        """
        if self._in_step is not None and self._watcher.is_open:
            self._join(self._in_step)
        with self._home.own():
            return self._tally.result(last=not self._watcher.is_open)

    def snapshot(self) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
        """All that a checkpoint holds: what is measured and on which model, and the rows or moments so far.

        Ranks that share out the layers call it together, as :meth:`result`.

        Raises RuntimeError before the first forward, ValueError if a layer was not finite.
        """
        with self._home.own():
            return self._tally.snapshot()

    @property
    def tally(self) -> Tally:
        """What it has seen so far.

        :meta private:
        """
        return self._tally

    def restore(self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Go on from what :meth:`snapshot` gave. Raises ValueError if it was of another probe or model."""
        self._tally.restore(header, arrays)

    # What a Watcher tells its receiver.

    @_telling_ranks
    def began(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """:meta private:"""
        if capturing():
            raise RuntimeError(
                "a probe cannot measure a forward that goes into a CUDA graph, which runs later and without "
                "it; capture the model outside the with block, and probe it as it is"
            )
        if self._ranks is not None and self._every_rank and in_pipeline():
            raise ValueError(
                "distributed must be False for a stage of a pipeline, whose layers other ranks do not have: "
                "each rank then measures the layers of its own stage (or a process group, of the ranks that "
                "have the same stage)"
            )
        self._whole = None
        self._tally.began()
        self._entries.begin(args, kwargs)

    @_without_grad
    def entered(self, x: Tensor) -> None:
        """:meta private:"""
        rows = Activation(_of_stack(x, self._taps[0].name))
        every = range(len(self._taps))
        with self._home.reading([(x, stream_of(x))]):
            self._whole = self._entries.batch([rows for _ in every], every, self._seen)

    @_without_grad
    def tile(self, first: int, states: Tensor) -> None:
        """:meta private:"""
        assert self._whole is not None
        rows = [_of_stack(x, tap.name) for x, tap in zip(states, self._taps, strict=True)]
        part = self._whole.some(slice(first, first + len(rows[0])))
        with self._home.reading([(states, stream_of(states))]):
            self._add(replace(part, layers=rows, reused=True))

    @_without_grad
    def finished(self, seen: Sequence[Seen] | None) -> None:
        """:meta private:"""
        if seen is not None:
            came = [(local(x.value), x.stream) for x in seen if x.value is not None]
            with self._home.reading(came), self._placed.together():
                rows = self._axes.rows(self._placed.seen(seen), self._entries.now)
                if any(x is not None and len(x.rows) for x in rows):
                    self._tally.name_layers([x.name for x in seen])
                    self._add(self._entries.batch(rows, [x.tap for x in seen], self._seen))
        self._whole = None
        self._entries.end()
        self._passed()

    @property
    def _seen(self) -> int:
        """The number of the next sequence."""
        return self._first + self._tally.sequences

    def _add(self, batch: RowBatch) -> None:
        if self._keeper is not None:
            self._keeper.add(batch, self._tally.names)
        self._tally.add(batch)


def _of_stack(x: Tensor, name: str) -> Tensor:
    return laid_out(x, "N D" if x.dim() == 2 else "N T D", name)


def opened(model: nn.Module, spec: ProbeSpec, keeper: Keeper | None = None) -> Probe:
    """The :class:`Probe` of a specification, which hands all rows to ``keeper`` as well."""
    made = Probe.__new__(Probe)
    made._open(model, spec)
    made._keeper = keeper
    return made
