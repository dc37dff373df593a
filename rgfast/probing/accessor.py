"""The methods of a probe's result that draw or describe it, with functions of packages above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rgfast.wiring import lent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rgfast.flow.probed import ViewFlow

__all__ = ["Accessor"]


class Accessor:
    """Figures and flow of a :class:`~rgfast.ProbeResult`."""

    def flow(self, view: str | None = None, *, control: Accessor | None = None) -> ViewFlow:
        """The view's flow with depth: whether the rank falls, rises or is flat, and the shape of the drift.

        ``view`` defaults to the first that is not sample limited; numbers are those of :mod:`rgfast.flow`.
        ``control`` is the result of a twin, such as ``probe(model, batches, control="random_weights")``:
        what it does as well is no evidence of anything learned. Without one the reading is undecided.

        Raises ValueError for an unknown view, a result without ``effective_rank`` and ``kernel_drift``, a
        single layer, and a control with other layers or without the view; TypeError for another control.
        """
        flow: ViewFlow = lent("flow_of")(self, view, control)
        return flow

    def plot_rank(
        self,
        measure: str = "effective_rank",
        *,
        views: Sequence[str] | None = None,
        relative: bool = False,
        ax: Axes | None = None,
    ) -> Axes:
        """The axes with a rank by layer: a line per view, error bars if grouped, isotropic baseline dotted.

        ``relative`` divides by the first layer. Raises ValueError for an unknown measure or view.
        """
        axes: Axes = lent("plot_rank")(self, measure, views, relative, ax)
        return axes

    def plot_drift(
        self, measure: str = "kernel_drift", *, views: Sequence[str] | None = None, ax: Axes | None = None
    ) -> Axes:
        """The axes with a drift by transition, logarithmic.

        Raises ValueError for an unknown measure or view.
        """
        axes: Axes = lent("plot_drift")(self, measure, views, ax)
        return axes

    def plot_cka(self, measure: str = "cka", *, view: str | None = None, ax: Axes | None = None) -> Axes:
        """The axes with CKA between layers in one view. Raises ValueError for an unknown measure or view."""
        axes: Axes = lent("plot_cka")(self, measure, view, ax)
        return axes

    def plot_heat_map(
        self, measure: str = "effective_rank", *, view: str | None = None, ax: Axes | None = None
    ) -> Axes:
        """The axes with a rank by layer, or a drift by transition, and position in one view.

        Undefined and constant cells are blank. Raises ValueError for an unknown measure or view.
        """
        axes: Axes = lent("plot_heat_map")(self, measure, view, ax)
        return axes

    def plot_spectra(self, *, view: str | None = None, ax: Axes | None = None) -> Axes:
        """The axes with each layer's singular values in one view. Raises ValueError for an unknown view."""
        axes: Axes = lent("plot_spectra")(self, view, ax)
        return axes

    def _repr_html_(self) -> str:
        table: str = lent("as_html")(self)
        return table
