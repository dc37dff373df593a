"""Every option of a probe, once: names, defaults, meaning and checks."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

from rgfast.files import check_file
from rgfast.probing.capture.axes import AxesSpec, check_axes
from rgfast.probing.capture.entries import MaskSpec
from rgfast.probing.capture.layers import LayerSpec
from rgfast.probing.capture.outputs import OutputSpec, check_output
from rgfast.probing.capture.padding import PaddingSpec, check_padding
from rgfast.probing.capture.placed import PlacementsSpec, check_placements
from rgfast.probing.capture.positions import Origin
from rgfast.probing.capture.selections import RowsSpec, Selection, make_selections
from rgfast.probing.measures import MEASURES, asked_measures
from rgfast.probing.options import (
    CONTROLS,
    Control,
    check_views,
    checked_folder,
    checked_positions,
    parse_memory,
)
from rgfast.probing.targets import Target, TargetSpec, make_targets
from rgfast.streaming import Pairs, as_pairs
from rgfast.validation import check_choice, check_integer, check_positive_int

if TYPE_CHECKING:
    from rgfast.probing.distributed import Distributed

__all__ = ["MeasureOptions", "Owner", "ProbeOptions", "ProbeSpec", "Route", "WatchOptions", "shows_options"]

Route = Literal["auto", "moments", "samples"]
ROUTES = ("auto", "moments", "samples")
Owner = Literal["auto", "ranks", "layers"]
OWNERS = ("auto", "ranks", "layers")

# With targets and a single group, R² is taken over as many folds.
_FOLDS = 5
_BATCH = 256

_F = TypeVar("_F", bound=Callable[..., Any])


class MeasureOptions(TypedDict, total=False):
    """The options of :class:`ProbeSpec` that say what is measured and how, for type checkers."""

    layers: str | LayerSpec | Sequence[LayerSpec]
    positions: str | Sequence[int | str]
    origin: Origin
    measures: str | Sequence[str]
    pairs: Pairs
    mask: MaskSpec
    rows: RowsSpec
    padding: PaddingSpec
    axes: AxesSpec
    output: OutputSpec
    targets: Mapping[str, TargetSpec] | None
    groups: int
    memory: str | int
    views: Sequence[str] | None
    refine: bool | None
    route: Route
    placements: PlacementsSpec


class WatchOptions(MeasureOptions, total=False):
    """The options that a loop of one's own has."""

    progress: bool | None
    distributed: Distributed
    timeout: float
    owner: Owner


class ProbeOptions(WatchOptions, total=False):
    """All options of :class:`ProbeSpec`."""

    checkpoint: str | Path | None
    checkpoint_every: int
    batch_size: int | None
    control: Control
    control_seed: int
    keep: str | Path | None
    keep_bytes: str | int
    keep_seed: int


@dataclass(frozen=True, kw_only=True)
class ProbeSpec:
    """What a probe is asked for. Every option is checked when the object is made, before any work.

    The options are those of :func:`rgfast.probe`, which documents them. Checked values replace what was
    given: ``measures`` is a tuple of names, ``memory`` a number of bytes, ``pairs`` a name or a list of index
    pairs, and ``groups`` at least five if there are targets.

    Raises TypeError or ValueError that names the option, what was expected and what came.

    >>> ProbeSpec(memory="1 KiB", measures="cka").memory
    1024
    """

    layers: str | LayerSpec | Sequence[LayerSpec] = "auto"
    positions: str | Sequence[int | str] = "auto"
    origin: Origin = "column"
    measures: str | Sequence[str] = "all"
    pairs: Pairs = "adjacent"
    mask: MaskSpec = None
    rows: RowsSpec = None
    padding: PaddingSpec = "auto"
    axes: AxesSpec = None
    output: OutputSpec = None
    targets: Mapping[str, TargetSpec] | None = None
    groups: int = 1
    checkpoint: str | Path | None = None
    checkpoint_every: int = 16
    progress: bool | None = None
    memory: str | int = "4GiB"
    views: Sequence[str] | None = None
    batch_size: int | None = None
    refine: bool | None = None
    route: Route = "auto"
    placements: PlacementsSpec = None
    distributed: Distributed = "auto"
    timeout: float = 60.0
    owner: Owner = "auto"
    control: Control = None
    control_seed: int = 0
    keep: str | Path | None = None
    keep_bytes: str | int = "1GiB"
    keep_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "groups", *(["batch_size"] if self.batch_size is not None else [])):
            check_positive_int(getattr(self, name), name)
        check_choice(self.route, "route", ROUTES)
        check_choice(self.owner, "owner", OWNERS)
        if self.control is not None:
            check_choice(self.control, "control", CONTROLS)
        for name in ("control_seed", "keep_seed"):
            check_integer(getattr(self, name), name, least=0, most=2**63 - 1)
        if self.mask is not None and not isinstance(self.mask, str) and not callable(self.mask):
            raise TypeError(
                f"mask must be the name of a batch entry or a callable, got {type(self.mask).__name__}"
            )
        if self.refine is not None and not isinstance(self.refine, bool):
            raise TypeError(f"refine must be True, False or None, got {self.refine!r}")
        make_targets(self.targets)
        selections = make_selections(self.rows)
        check_padding(self.padding)
        check_axes(self.axes)
        check_output(self.output)
        check_placements(self.placements)
        check_choice(self.origin, "origin", ("column", "token"))
        self._set("positions", checked_positions(self.positions))
        if "first" in self.positions and not isinstance(self.positions, str):
            self._set("origin", "token")
        if self.views is not None:
            check_views(self.views, [chosen.name for chosen in selections])
            self._set("views", tuple(self.views))
        self._set("measures", asked_measures(self.measures))
        self._set("pairs", as_pairs(self.pairs))
        self._set("memory", parse_memory(self.memory))
        self._set("keep_bytes", parse_memory(self.keep_bytes, "keep_bytes"))
        if self.targets and self.groups == 1:
            self._set("groups", _FOLDS)
        if self.checkpoint is not None:
            self._set("checkpoint", check_file(self.checkpoint, "checkpoint"))
        if self.keep is not None:
            self._set("keep", checked_folder(self.keep))
            if self.checkpoint is not None:
                raise ValueError("keep: a run that goes on from a checkpoint has not all sequences to keep")

        if self.owner == "layers" and (why := self.why_not_shared):
            raise ValueError(f"owner: 'layers' cannot be had, since {why}")

    @property
    def why_not_shared(self) -> str:
        """Why ranks cannot share out the layers, in words; nothing if they can."""
        if self.compared and self.compared != "adjacent":
            return f"pairs= must be 'adjacent', got {self.compared!r}"
        return ""

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def shows_progress(self) -> bool:
        """Whether a bar is shown and what was chosen is printed; by default on a terminal."""
        return sys.stderr.isatty() if self.progress is None else bool(self.progress)

    @property
    def memory_bytes(self) -> int:
        """``memory`` as a number of bytes."""
        return parse_memory(self.memory)

    @property
    def sequences_at_once(self) -> int:
        """``batch_size``, or its default where nothing speaks for another."""
        return _BATCH if self.batch_size is None else self.batch_size

    @property
    def compared(self) -> Pairs:
        """``pairs``, or none if no measure compares layers."""
        return self.pairs if any(MEASURES[name].needs == "kernels" for name in self.measures) else ()

    @property
    def counts_from_end(self) -> bool:
        """Whether a position is counted from the end of a sequence."""
        return not isinstance(self.positions, str) and any(
            t == "last" or (isinstance(t, int) and t < 0) for t in self.positions
        )

    @property
    def reads_layers(self) -> bool:
        """Whether it was said how the layers' tensors are to be read."""
        return self.axes is not None or self.output is not None

    @property
    def uncentred(self) -> bool:
        """Whether a rank of rows as they are was asked for."""
        return any(MEASURES[name].needs == "uncentred" for name in self.measures)

    def new_targets(self) -> list[Target]:
        """The targets, which learn their number of labels from the batches of one run."""
        return make_targets(self.targets)

    def new_selections(self) -> list[Selection]:
        """What the views of ``rows`` are of."""
        return make_selections(self.rows)

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """What decides the numbers, as JSON gives it back, to compare with another rank's or a checkpoint's.

        ``names`` are the layers that ``layers`` stands for.
        """
        pairs = self.compared
        asked = {
            "layers": list(names),
            "positions": self.positions if isinstance(self.positions, str) else list(self.positions),
            "measures": self.measures,
            "pairs": pairs if isinstance(pairs, str) else [list(pair) for pair in pairs],
            "origin": self.origin,
            "padding": dict(self.padding) if isinstance(self.padding, Mapping) else self.padding,
            "axes": dict(self.axes) if isinstance(self.axes, Mapping) else self.axes,
            "output": _plain(self.output),
            "mask": self.mask if isinstance(self.mask, str) else self.mask is not None,
            "targets": list(self.targets or ()),
            "groups": self.groups,
            "views": self.views,
            "memory": self.memory,
            "refine": self.refine,
        }
        if self.rows is not None:  # absent from what earlier versions wrote, as is control
            asked["rows"] = {chosen.name: chosen.to_json() for chosen in self.new_selections()}
        if self.placements is not None:
            asked["placements"] = _plain(self.placements)
        if self.control is not None:
            asked |= {"control": self.control, "control_seed": self.control_seed}
        plain: dict[str, Any] = json.loads(json.dumps(asked))
        return plain


def _plain(asked: Any) -> Any:
    """What was asked for, by layer pattern or not, as JSON has it."""
    if isinstance(asked, Mapping):
        return {pattern: _plain(choice) for pattern, choice in asked.items()}
    if callable(asked):
        return "a function"
    return asked if asked is None or isinstance(asked, (int, str)) else repr(asked)


def shows_options(options: Any) -> Callable[[_F], _F]:
    """A decorator: the signature shows the fields of :class:`ProbeSpec` that ``options`` has, by keyword."""
    shown = {
        field.name: inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=re.sub(r"^typing\.", "", str(field.type)),
        )
        for field in fields(ProbeSpec)
        if field.name in options.__optional_keys__
    }

    def decorate(function: _F) -> _F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        # What inspect reads first of a function; its type does not know it.
        function.__signature__ = signature.replace(parameters=[*own, *shown.values()])  # type: ignore[attr-defined]
        return function

    return decorate
