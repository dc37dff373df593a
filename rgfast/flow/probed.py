"""The flow with depth of one probe, in numbers: order parameter, drift, plateau, caveats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rgfast.flow.curves import Descent, DriftShape, descent, drift_shape
from rgfast.probing.result import ProbeResult

__all__ = ["ViewFlow", "flow_of"]


@dataclass(frozen=True)
class ViewFlow:
    """How one view's stream goes with depth.

    ``first_layer`` is the first with a rank above 0 (masked rows are constant at the input). ``rank`` is the
    effective rank's descent from there: R, largest rise, drop. ``drift`` describes the kernel drift from
    there: decay rate, plateau, top-2 share beside its null; None below four transitions or where one is 0.
    ``caveats`` are sentences.
    """

    view: str
    first_layer: int
    rank: Descent
    drift: DriftShape | None
    caveats: tuple[str, ...]

    def __str__(self) -> str:
        r = self.rank
        falls = "falls" if r.falls() else "does not fall monotonically"
        lines = [
            f"{self.view}: effective rank {r.first:.4g} → {r.last:.4g} from layer {self.first_layer} on, "
            f"R = {r.ratio:.3g}, {falls} (largest rise {r.largest_rise:.2g})"
        ]
        if self.drift is not None:
            d = self.drift
            shape = "step and plateau" if d.preferred == "step" else "geometric decay"
            lines.append(
                f"  drift: {shape} preferred, rate {d.decay_rate:.3g} a layer, top two {d.top2:.2f} of it "
                f"(chance {d.top2_null:.2f}), plateau mean {d.plateau_mean:.2g}"
            )
        return "\n".join([*lines, *(f"  caveat: {caveat}" for caveat in self.caveats)])


def flow_of(result: ProbeResult, view: str | None = None) -> ViewFlow:
    """The :class:`ViewFlow` of a view, by default the first.

    Raises ValueError for an unknown view, and without effective rank and drift of at least two layers.
    """
    view = result.view_or_first(view)
    rank = np.asarray(result.order_parameter(view).values)
    drift = np.asarray(result.order_parameter(view, "kernel_drift").values)
    if len(rank) < 2:
        raise ValueError(f"flow needs at least two layers, got {len(rank)}")
    positive = np.flatnonzero(rank > 0)
    first = int(positive[0]) if len(positive) and positive[0] < len(rank) - 1 else 0
    steps = drift[first:]
    shape = drift_shape(steps) if len(steps) else None
    return ViewFlow(view, first, descent(rank[first:]), shape, _caveats(result, view, first))


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
