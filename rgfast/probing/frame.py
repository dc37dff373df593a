"""A probe's dataset as a table with one row per value."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from rgfast.probing.measures import named

__all__ = ["as_long_form", "positions_of"]

_COLUMNS = (
    "view", "measure", "layer", "layer_name", "other_layer", "other_layer_name", "position", "value", "n",
    "sample_limited",
)  # fmt: skip


def positions_of(data: xr.Dataset, view: str) -> NDArray[np.int64]:
    """The positions that a view has: the followed ones, or −1 alone."""
    at: NDArray[np.int64] = data.position.values
    return at[at >= 0] if bool(data.positional.sel(view=view)) else at[at == -1]


def as_long_form(data: xr.Dataset, measures: Sequence[str], spectra: bool) -> pd.DataFrame:
    """The measures, the targets' R² and, if asked for, the spectra; see ``ProbeResult.to_dataframe``."""
    variables = {name: name for name in measures}
    more: dict[str, str | int] = {}
    if "target_r2" in data:
        variables["target_r2"], more["target"] = "target_r2", ""
    if spectra:
        variables["singular_value"], more["component"] = "singular_values", -1
    parts = [
        _part(data, measure, variable, view)
        for measure, variable in variables.items()
        for view in map(str, data.view.values)
    ]
    whole: pd.DataFrame = pd.concat([part for part in parts if len(part)], ignore_index=True)
    names = dict(enumerate(map(str, data.layer_name.values)))
    whole["layer_name"] = whole["layer"].map(names)
    whole["other_layer_name"] = whole["other_layer"].map({-1: "", **names})
    for column, missing in more.items():
        whole[column] = whole[column].fillna(missing).astype(type(missing))
    ordered: pd.DataFrame = whole[[name for name in (*_COLUMNS, "se", *more) if name in whole]]
    return ordered


def _part(data: xr.Dataset, measure: str, variable: str, view: str) -> pd.DataFrame:
    data = data.sel(view=view, position=positions_of(data, view))
    values = data[variable]
    frame: pd.DataFrame = values.rename("value").reset_coords(drop=True).to_series().reset_index()
    if f"{variable}_se" in data:
        frame["se"] = data[f"{variable}_se"].values.reshape(-1)
    if measure in named("drift"):
        frame = frame.rename(columns={"transition": "layer"})
        frame["other_layer"] = frame["layer"] + 1
    elif measure in named("pair"):
        frame = frame[(frame["layer"] < frame["other_layer"]) & frame["value"].notna()].copy()
    else:
        frame["other_layer"] = -1
    if measure == "singular_value":  # narrower layers are padded, and undefined spectra have no components
        frame = frame[frame["value"].notna()].copy()
    elif measure == "target_r2" and view == "flattened":
        frame = frame.iloc[:0].copy()
    frame["n"] = frame["position"].map(data.n.to_series()).astype(int)
    limited = data.sample_limited.reset_coords(drop=True).to_series()
    frame["sample_limited"] = limited.reindex(
        pd.MultiIndex.from_frame(frame[["layer", "position"]])
    ).to_numpy(dtype=bool)
    frame["view"], frame["measure"] = view, measure
    return frame
