"""The flow with depth of one probe, in numbers and words: order parameter, drift, control, caveats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rgfast.flow.answers import Answer, Status
from rgfast.flow.curves import Descent, descent, top_share
from rgfast.flow.shapes import FEWEST_TRANSITIONS, DriftShape, drift_shape
from rgfast.probing.result import ProbeResult

__all__ = ["ControlFlow", "ViewFlow", "flow_of"]

RankWord = Literal["falls", "rises", "flat", "not measured"]

FALL = 0.90  # R above it is no fall; above 1/FALL it is a rise
_APART = 0.10  # without error bars two R differ if they do by as much as a fall
_NO_CONTROL = "no control: flow(control=...) takes the result of a twin, probe(..., control=...) makes one"


@dataclass(frozen=True)
class ControlFlow:
    """What a control does in the same view and from the same layer on: R, and the share of the two largest
    transitions. ``kind`` is *random weights*, *shuffled tokens* or *control*."""

    kind: str
    ratio: float
    error: float
    top2: float


@dataclass(frozen=True)
class ViewFlow:
    """How one view's stream goes with depth.

    ``first_layer`` is the first with a rank above 0 (masked rows are constant at the input). ``rank`` is the
    effective rank's descent from there: R, largest rise, drop. ``word`` is *falls* for R <= 0.90 and a drop
    beyond twice its standard error (if sequences were grouped), *rises* for the inverse, else *flat*.
    ``error`` is the standard error of the drop, NaN without groups. ``drift`` describes the kernel drift from
    there, ``transitions`` are how many there are; None below four or where one is 0.
    ``reading`` and ``drift_reading`` say whether a control does the same. ``caveats`` are sentences.
    """

    view: str
    first_layer: int
    rank: Descent
    word: RankWord
    error: float
    transitions: int
    drift: DriftShape | None
    control: ControlFlow | None
    reading: Answer
    drift_reading: Answer
    caveats: tuple[str, ...]

    @property
    def shape(self) -> str:
        """The drift's shape in words, or why it has none."""
        if self.drift is not None:
            return str(self.drift)
        if self.transitions < FEWEST_TRANSITIONS:
            return f"shape not judged: {self.transitions} transitions, and it takes {FEWEST_TRANSITIONS}"
        return "shape not judged: a transition does not move"

    def __str__(self) -> str:
        r = self.rank
        plus = "" if math.isnan(self.error) else f", drop {r.drop:.3g} ± {self.error:.2g}"
        lines = [
            f"{self.view}: effective rank {r.first:.4g} → {r.last:.4g} from layer {self.first_layer} on, "
            f"R = {r.ratio:.3g}{plus}: {self.word}{_bumps(r, self.word)}",
            f"  drift: {self.shape}",
        ]
        if (d := self.drift) is not None and d.word not in ("flat", "not judged"):
            lines[-1] += (
                f"; largest two {d.top2:.2f} of it (chance up to {d.top2_null:.2f}), median of the others "
                f"{d.rest_median:.2g}"
            )
        if self.control is None:
            lines.append(f"  reading: {self.reading.status}: {self.reading.summary}")
        else:
            lines.append(f"  reading of the rank: {self.reading.status}: {self.reading.summary}")
            lines.append(f"  reading of the drift: {self.drift_reading.status}: {self.drift_reading.summary}")
        return "\n".join([*lines, *(f"  caveat: {caveat}" for caveat in self.caveats)])


def _bumps(rank: Descent, word: RankWord) -> str:
    if word != "falls" or rank.falls():
        return ""
    return f", not monotonically (largest rise {100 * rank.rise_share:.0f}% of the drop)"


def flow_of(result: ProbeResult, view: str | None = None, control: ProbeResult | None = None) -> ViewFlow:
    """The :class:`ViewFlow` of a view, by default the first that is not sample limited.

    Raises ValueError for an unknown view, without effective rank and drift of at least two layers, and for a
    control with other layers or without the view; TypeError for a control that is no result.
    """
    view = _chosen(result) if view is None else result.view_or_first(view)
    ranks, drifts = _curves(result, view)
    if len(ranks) < 2:
        raise ValueError(f"flow needs at least two layers, got {len(ranks)}")
    if control is not None:
        _check_control(result, control, view)
    positive = np.flatnonzero(ranks > 0)
    first = int(positive[0]) if len(positive) and positive[0] < len(ranks) - 1 else 0
    steps = drifts[first:]
    rank, shape = descent(ranks[first:]), drift_shape(steps) if len(steps) else None
    errors = _errors(result, view, first)
    error = math.hypot(*errors)
    word = _word(rank, error)
    other = None if control is None else _of_control(control, view, first)
    return ViewFlow(
        view,
        first,
        rank,
        word,
        error,
        len(steps),
        shape,
        other,
        _reading(rank, word, _ratio_error(rank, errors), other),
        _drift_reading(top_share(steps) if len(steps) else math.nan, shape, other),
        _caveats(result, view, first),
    )


def _chosen(result: ProbeResult) -> str:
    return next((view for view in result.views if not result.sample_limited(view)), result.views[0])


def _curves(result: ProbeResult, view: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rank, drift = (result.order_parameter(view, name).values for name in ("effective_rank", "kernel_drift"))
    return np.asarray(rank), np.asarray(drift)


def _check_control(result: ProbeResult, control: ProbeResult, view: str) -> None:
    if not isinstance(control, ProbeResult):
        raise TypeError(f"control must be a ProbeResult, got {type(control).__name__}")
    if len(control.layers) != len(result.layers):
        raise ValueError(
            f"control must have the same {len(result.layers)} layers, got {len(control.layers)} layers"
        )
    if view not in control.views:
        raise ValueError(f"control must have the view {view!r}, got {', '.join(control.views)}")
    if missing := {"effective_rank", "kernel_drift"} - set(control.measures):
        raise ValueError(f"control must have the measure {sorted(missing)[0]}, got {control.measures}")


def _errors(result: ProbeResult, view: str, first: int) -> tuple[float, float]:
    """Standard errors of the first and of the last rank; NaN without groups."""
    found = result.standard_error(view)
    return (math.nan, math.nan) if found is None else (float(found[first]), float(found[-1]))


def _ratio_error(rank: Descent, errors: tuple[float, float]) -> float:
    if not (rank.first > 0 and rank.last > 0):
        return math.nan
    return rank.ratio * math.hypot(errors[0] / rank.first, errors[1] / rank.last)


def _word(rank: Descent, error: float) -> RankWord:
    if not math.isfinite(rank.ratio):
        return "not measured"
    if not math.isnan(error) and abs(rank.drop) <= 2 * error:
        return "flat"
    return "falls" if rank.ratio <= FALL else "rises" if rank.ratio >= 1 / FALL else "flat"


def _of_control(control: ProbeResult, view: str, first: int) -> ControlFlow:
    ranks, drifts = _curves(control, view)
    kind = str(control.dataset.attrs.get("control", "control")).replace("_", " ")
    rank = descent(ranks[first:])
    error = _ratio_error(rank, _errors(control, view, first))
    return ControlFlow(kind, rank.ratio, error, top_share(drifts[first:]))


def _reading(rank: Descent, word: RankWord, error: float, control: ControlFlow | None) -> Answer:
    """Whether the rank falls more than that of a control."""
    if control is None:
        return Answer("undecided", _NO_CONTROL)
    told = f"R = {rank.ratio:.3g} against {control.ratio:.3g} with {control.kind}"
    if word != "falls":
        return Answer("not supported", f"there is no fall to read, {told}")
    if not math.isfinite(control.ratio):
        return Answer("undecided", f"the control has no rank there, {told}")
    apart = 2 * math.hypot(error, control.error)
    known = math.isfinite(apart)
    less = control.ratio - rank.ratio
    if less > (apart if known else _APART):
        return Answer("supported", f"it falls more than its control, {told}")
    if less <= 0:
        return Answer("not supported", f"its control falls as far, {told}")
    why = f"within error bars (± {apart:.2g})" if known else f"by less than {_APART:g}, without error bars"
    return Answer("undecided", f"it falls more than its control {why}, {told}")


def _drift_reading(top2: float, shape: DriftShape | None, control: ControlFlow | None) -> Answer:
    """Whether the drift is a step and a plateau that a control does not show."""
    if control is None:
        return Answer("undecided", _NO_CONTROL)
    if math.isfinite(control.top2) and control.top2 >= top2:
        told = f"largest two transitions hold {control.top2:.2f} of the drift against {top2:.2f}"
        return Answer(
            "not supported", f"its control is at least as concentrated: with {control.kind} the {told}"
        )
    word = "not judged" if shape is None else shape.word
    status: Status = "supported" if word == "step + plateau" else "not supported"
    if word in ("undecided", "not judged"):
        status = "undecided"
    return Answer(status, f"more concentrated than with {control.kind}, and the shape is: {word}")


def _caveats(result: ProbeResult, view: str, first: int) -> tuple[str, ...]:
    own = result.positions(view)
    data, out = result.dataset.sel(view=view, position=own), []
    if first:
        out.append(f"constant before layer {first}: no rank and no drift there")
    if result.sample_limited(view):
        least, _ = result.rows(view)
        out.append(f"sample limited: {least} rows or fewer than 16 a feature; compare with the baseline")
    still = np.asarray((data.effective_rank == 0).isel(layer=slice(first, None)).values)
    if (some := still.any(0) & ~still.all(0)).any() and len(own) > 1:
        listed = [str(t) for t in own[some]]
        where = ", ".join(listed if len(listed) < 7 else [*listed[:5], "…"])
        out.append(
            f"nothing varies at position {where} in some layers: there its rank 0 counts in the mean, and no "
            "drift or CKA does, so that means of two layers may be over other positions"
        )
    followed, length = len(own), int(result.dataset.attrs["length"])
    if result.is_positional(view) and followed < length:
        out.append(f"{followed} of {length} positions followed")
    out += [
        note for note in result.notes if note.startswith("the first batch had") and result.is_positional(view)
    ]
    bound = float(data.effective_rank_bound.max())
    if bound > 1e-6:
        out.append(f"the rounding error of the effective rank is bounded by {bound:.1g} only")
    return tuple(out)
