"""What results of probes and of monitors have in common: measures labelled by view, layer and position."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rgfast.probing.frame import positions_of
from rgfast.probing.measures import MEASURES

__all__ = ["Labelled"]


class Labelled:
    """Names and variables of ``dataset``."""

    def __init__(self, dataset: xr.Dataset | Callable[[], xr.Dataset]) -> None:
        self._dataset = dataset

    @property
    def dataset(self) -> xr.Dataset:
        """All variables, labelled; made when they are first asked for."""
        found = self._dataset
        if not isinstance(found, xr.Dataset):
            found = self._dataset = found()  # another thread may do the same
        return found

    @property
    def views(self) -> tuple[str, ...]:
        """The views, in the order of the dataset."""
        return tuple(str(view) for view in self.dataset.view.values)

    @property
    def layers(self) -> tuple[str, ...]:
        """The name of every layer."""
        return tuple(str(name) for name in self.dataset.layer_name.values)

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures that the result has."""
        return tuple(name for name in MEASURES if name in self.dataset)

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the targets; empty without any."""
        return tuple(str(name) for name in self.dataset.target.values) if "target" in self.dataset else ()

    def view_or_first(self, view: str | None = None) -> str:
        """``view``, or the first view for None. Raises ValueError for an unknown one."""
        if view is None:
            return self.views[0]
        if view not in self.views:
            raise ValueError(f"view must be one of {', '.join(self.views)}, got {view!r}")
        return view

    def is_positional(self, view: str) -> bool:
        """Whether the view has positions, rather than one value per layer.

        Raises ValueError for an unknown view.
        """
        return bool(self.dataset.positional.sel(view=self.view_or_first(view)))

    def positions(self, view: str) -> NDArray[np.int64]:
        """The positions that the view has: the followed ones, or −1 alone.

        Raises ValueError for an unknown view.
        """
        return positions_of(self.dataset, self.view_or_first(view))

    def variable(self, name: str, view: str | None = None) -> xr.DataArray:
        """A variable of the dataset in one view, at the positions that the view has.

        Raises KeyError for an unknown variable, ValueError for an unknown view.

        >>> import torch, rgfast
        >>> stack = rgfast.ResidualStack(4, 2, mixing="none")
        >>> result = rgfast.probe(stack, torch.randn(64, 3, 4), progress=False)
        >>> result.variable("n", "position").values
        array([64, 64, 64])
        """
        view = self.view_or_first(view)
        values: xr.DataArray = self.dataset[name].sel(view=view, position=self.positions(view))
        return values
