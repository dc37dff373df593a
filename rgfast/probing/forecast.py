"""What a probe would do and cost, asked before it is paid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rgfast.probing.capture.batches import batch_items, batch_rows, is_array, iterate
from rgfast.probing.options import human_bytes
from rgfast.probing.predict import added_seconds, best_time
from rgfast.probing.sharding import is_sharded, sharded_over
from rgfast.probing.spec import ProbeOptions, ProbeSpec, shows_options
from rgfast.probing.watch import Probe, opened
from rgfast.validation import check_positive_int

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Forecast", "plan"]

# Sequences of the forward that shows what there is to measure, and the rows per feature of another one that
# shows which directions of a layer are rounding.
_FEW, _ROWS_PER_FEATURE = 4, 2


@dataclass(frozen=True)
class Forecast:
    """What :func:`plan` foresees of a probe; ``str()`` says it in words.

    ``estimator`` is ``"tiles"`` (all rows of a few positions at a time, through all layers of a stack without
    mixing), ``"rows"`` (rows of all layers are held until the end) or ``"moments"`` (sums as the batches
    come), and ``why`` says why; ``result.dataset.attrs["route"]`` of the probe is :attr:`route`.
    ``state_bytes`` is what measuring holds at most. ``forward_seconds`` is the model's own forward of all
    ``sequences`` without a probe, and ``seconds`` the whole probe, forward included: None where time is not
    predicted (off the CPU).
    """

    estimator: str
    why: str
    what: str
    sequences: int
    state_bytes: int
    forward_seconds: float
    seconds: float | None

    @property
    def route(self) -> str:
        """What the probe's result will call its route."""
        return "moments" if self.estimator == "moments" else "samples"

    @property
    def share(self) -> float | None:
        """Seconds of the whole probe over those of the bare forward."""
        return None if self.seconds is None else self.seconds / self.forward_seconds

    def __str__(self) -> str:
        if self.share is None:
            cost = (
                f"a forward of {_time(self.forward_seconds)}; off the CPU the probe's time is not predicted"
            )
        else:
            cost = f"about {_time(self.seconds or 0.0)}, {self.share:.2g} times the bare forward"
        return (
            f"{self.what}, {self.sequences} sequences\n"
            f"by {self.estimator}: {self.why}\n"
            f"{human_bytes(self.state_bytes)} of state, {cost}"
        )


@shows_options(ProbeOptions)
def plan(
    model: nn.Module, batches: Any, *, sequences: int | None = None, **options: Unpack[ProbeOptions]
) -> Forecast:
    """What :func:`rgfast.probe` of the same arguments would do and cost, a :class:`Forecast`.

    The model runs on four sequences of the first batch, on as many as have twice as many rows as features,
    and then at least twice on all of that batch, nothing measured, to time its forward (a few times more if
    that takes milliseconds). Some milliseconds more go to products of each kind, which tell how fast this
    machine is. Times are a model's: expect a factor of 1.5. What is decided from the data as they come
    (padding in a later batch, layers that miss one, layers that are deficient at some positions only) is not
    foreseen.

    ``batches`` and options are those of :func:`rgfast.probe`, of one process. An iterator would lose its
    first batch and is refused. ``sequences`` is how many there are in all: by default those of an array,
    mapping or list, or of a loader's data set.

    Raises what :func:`rgfast.probe` does before its second batch, TypeError for an iterator, and ValueError
    where ``sequences`` is not given and batches do not tell, or the model is sharded over several ranks.

    >>> import torch, rgfast
    >>> stack = rgfast.ResidualStack(width=32, depth=4, mixing="none")
    >>> found = rgfast.plan(stack, torch.randn(512, 8, 32), views=["position"], route="samples")
    >>> found.estimator, found.route, found.sequences
    ('tiles', 'samples', 512)
    """
    if is_sharded(model):
        raise ValueError(
            "model must be one that a single process runs, since planning times its forward, got one that is "
            f"sharded over ranks {sorted(sharded_over(model))}"
        )
    spec = replace(ProbeSpec(**options), progress=False, distributed=False)
    if isinstance(batches, Iterator):
        raise TypeError(
            "batches must be what can be read again (arrays, a list, a DataLoader), since planning takes the "
            f"first batch, got {type(batches).__name__}"
        )
    if sequences is None:
        sequences = _count(batches)
    check_positive_int(sequences, "sequences")
    first = next((batch for batch in iterate(batches, spec.sequences_at_once) if batch_rows(batch)), None)
    if first is None:
        raise ValueError("batches must hold at least one sequence, got none")
    given = [x for x in (*batch_items(first), *model.parameters()) if isinstance(x, Tensor)]
    on_cpu = all(x.device.type == "cpu" for x in given)
    few = _first_of(first, _FEW)
    watched = _watched(model, spec, few)
    if watched.plan is not None and on_cpu:
        wanted = -(-_ROWS_PER_FEATURE * max(watched.plan.widths) // watched.plan.length)
        if wanted > _FEW < batch_rows(first):
            few = _first_of(first, wanted)
            watched = _watched(model, spec, few)
    found = watched.foreseen(few, sequences)
    forward = best_time(partial(watched.forward, first)) * sequences / batch_rows(first)
    added = None
    if on_cpu:
        added = added_seconds(
            found.estimator,
            found.plan,
            sequences,
            uncentred=spec.uncentred,
            deficient=found.deficient,
        )
    return Forecast(
        estimator=found.estimator,
        why=found.why,
        what=found.plan.what,
        sequences=sequences,
        state_bytes=found.state_bytes,
        forward_seconds=forward,
        seconds=None if added is None else forward + added,
    )


def _watched(model: nn.Module, spec: ProbeSpec, batch: Any) -> Probe:
    """A probe that has seen one batch."""
    watched = opened(model, spec)
    with watched:
        watched.model.eval()
        with torch.no_grad():
            watched.run(batch)
    return watched


def _count(batches: Any) -> int:
    """How many sequences batches say that they hold."""
    if is_array(batches):
        return len(batches)
    if isinstance(batches, Mapping):
        return max((len(x) for x in batches.values() if is_array(x) and x.ndim), default=0)
    if isinstance(batches, DataLoader):
        if isinstance(batches.dataset, Sized):
            return len(batches.dataset)
    elif isinstance(batches, (list, tuple)):
        return sum(batch_rows(batch) for batch in batches)
    raise ValueError(
        f"sequences must say how many there are, since {type(batches).__name__} does not; give sequences="
    )


def _first_of(batch: Any, number: int) -> Any:
    """The first ``number`` sequences of a batch; all of it in a form that cannot be cut."""
    rows = batch_rows(batch)

    def cut(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: cut(value) for key, value in item.items()}
        whole = is_array(item) and item.ndim and not getattr(item, "is_nested", False) and len(item) == rows
        return item[:number] if whole else item

    if isinstance(batch, (Mapping, Tensor, np.ndarray)):
        return cut(batch)
    return type(batch)(cut(item) for item in batch) if type(batch) in (list, tuple) else batch


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{1e3 * seconds:.2g} ms"
