"""Every option of a comparison, once: names, defaults and checks."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rgfast.probing.capture.axes import AxesSpec
from rgfast.probing.capture.entries import MaskSpec
from rgfast.probing.capture.layers import LayerSpec
from rgfast.probing.capture.outputs import OutputSpec
from rgfast.probing.capture.padding import PaddingSpec
from rgfast.probing.capture.positions import Origin
from rgfast.probing.capture.selections import RowsSpec, Selection, make_selections
from rgfast.probing.options import parse_memory
from rgfast.probing.spec import ProbeSpec
from rgfast.validation import check_choice, check_integer, check_positive_int

__all__ = [
    "CKA_MEASURES",
    "AxesOption",
    "CompareSpec",
    "Layers",
    "MaskSpec",
    "Origin",
    "OutputOption",
    "PaddingOption",
    "Route",
    "RowsSpec",
]

Layers = str | LayerSpec | Sequence[LayerSpec]
Route = Literal["auto", "moments", "samples"]

# Of all rows; the others are of a sample.
CKA_MEASURES = ("cka", "cka_biased")
_MEASURES = (*CKA_MEASURES, "mutual_knn", "procrustes", "rsa")


@dataclass(frozen=True, kw_only=True)
class CompareSpec:
    """What a comparison is asked for, checked when the object is made.

    The options are those of :func:`rgfast.compare`, which documents them; ``layers`` and those that a pair
    may give for each model are pairs here.

    Raises TypeError or ValueError that names the option, what was expected and what came.

    >>> CompareSpec(measures="cka", padding=("auto", None)).padding
    ('auto', None)
    """

    layers: tuple[Layers, Layers] = ("auto", "auto")
    ids: Any = None
    measures: str | Sequence[str] = ("cka",)
    views: Sequence[str] | None = None
    positions: str | Sequence[int | str] = "auto"
    origin: Origin = "column"
    mask: MaskSpec = None
    rows: RowsSpec = None
    padding: Any = "auto"
    axes: Any = None
    output: Any = None
    groups: int = 1
    null: int = 0
    sample_limit: int = 1024
    k: int = 10
    seed: int = 0
    memory: str | int = "4GiB"
    batch_size: int = 256
    route: Route = "auto"
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name in ("padding", "axes", "output"):
            self._set(name, _pair(getattr(self, name)))
        for name, layers in zip(("layers_a", "layers_b"), self.layers, strict=True):
            if not isinstance(layers, (str, int, Sequence)) and not hasattr(layers, "fullmatch"):
                raise TypeError(
                    f"{name} must be 'auto', a name, index, pattern or a sequence of them, got {layers!r}"
                )
        # The options that a probe has too are checked as its own.
        checked = [
            ProbeSpec(
                views=self.views,
                positions=self.positions,
                origin=self.origin,
                mask=self.mask,
                rows=self.rows,
                padding=padding,
                axes=axes,
                output=output,
                groups=self.groups,
                memory=self.memory,
                batch_size=self.batch_size,
                route=self.route,
            )
            for padding, axes, output in zip(self.padding, self.axes, self.output, strict=True)
        ]
        for name in ("views", "positions", "origin", "memory"):
            self._set(name, getattr(checked[0], name))
        self._set("measures", _asked(self.measures))
        check_integer(self.null, "null", least=0)
        check_integer(self.sample_limit, "sample_limit", least=4)
        check_positive_int(self.k, "k")
        check_integer(self.seed, "seed", least=0, most=2**63 - 1)
        self._set("ids", _checked_ids(self.ids))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def measures_of_all(self) -> tuple[str, ...]:
        """The measures that are of all rows."""
        return tuple(name for name in self.measures if name in CKA_MEASURES)

    @property
    def measures_of_sample(self) -> tuple[str, ...]:
        """The measures that are of a sample: all of them with a null."""
        return tuple(name for name in self.measures if self.null or name not in CKA_MEASURES)

    @property
    def selections(self) -> list[Selection]:
        """What ``rows`` asks for, new objects every time."""
        return make_selections(self.rows)

    @property
    def memory_bytes(self) -> int:
        """``memory`` as a number of bytes."""
        return parse_memory(self.memory)

    @property
    def follows_positions(self) -> bool:
        """Whether positions were named, so that the view of each is wanted."""
        return self.positions != "auto"

    @property
    def shows_progress(self) -> bool:
        """Whether a bar is shown and what was chosen is printed; by default on a terminal."""
        return sys.stderr.isatty() if self.progress is None else bool(self.progress)


# What type checkers know of the three options that may be pairs.
PaddingOption = PaddingSpec | tuple[PaddingSpec, PaddingSpec]
AxesOption = AxesSpec | tuple[AxesSpec, AxesSpec]
OutputOption = OutputSpec | tuple[OutputSpec, OutputSpec]


def _pair(option: Any) -> tuple[Any, Any]:
    """An option of each model: a tuple of two is one for each, anything else is for both."""
    if isinstance(option, tuple) and len(option) == 2:
        return option
    return option, option


def _asked(measures: Any) -> tuple[str, ...]:
    """The names of the measures asked for, in their own order. Raises ValueError for unknown ones."""
    known = _MEASURES
    asked: Any = [measures] if isinstance(measures, str) else measures
    if not isinstance(asked, Collection) or not asked:
        raise ValueError(f"measures must be a sequence of {', '.join(known)}, got {measures!r}")
    for name in asked:
        check_choice(name, "measures", known)
    return tuple(name for name in known if name in asked)


def _checked_ids(ids: Any) -> Any:
    if ids is None or isinstance(ids, str):
        return ids
    if not isinstance(ids, (tuple, list)) or len(ids) != 2:
        raise TypeError(
            "ids must be the name of a batch entry, or a pair of arrays, of the sequences in batches and in "
            f"batches_b, got {type(ids).__name__}"
        )
    return tuple(ids)
