"""A probe's result as a table with one row a value."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from rgfast.probing.measures import DRIFTS, PAIRWISE

if TYPE_CHECKING:
    from rgfast.probing.result import ProbeResult

__all__ = ["as_long_form"]

_COLUMNS = ("view", "measure", "layer", "other_layer", "position", "value", "n", "sample_limited")


def as_long_form(result: ProbeResult, spectra: bool) -> pd.DataFrame:
    """Every measure, the targets' R² and, if asked for, the spectra; see ``ProbeResult.to_dataframe``."""
    data = result.dataset
    variables = {name: name for name in result.measures}
    more: dict[str, str | int] = {}
    if "target_r2" in data:
        variables["target_r2"], more["target"] = "target_r2", ""
    if spectra:
        variables["singular_value"], more["component"] = "singular_values", -1
    parts = [
        _part(result, measure, variable, view)
        for measure, variable in variables.items()
        for view in result.views
    ]
    whole: pd.DataFrame = pd.concat([part for part in parts if len(part)], ignore_index=True)
    for column, missing in more.items():
        whole[column] = whole[column].fillna(missing).astype(type(missing))
    ordered: pd.DataFrame = whole[[name for name in (*_COLUMNS, "se", *more) if name in whole]]
    return ordered


def _part(result: ProbeResult, measure: str, variable: str, view: str) -> pd.DataFrame:
    own = result._own_positions(view)
    data = result.dataset.sel(view=view).isel(position=own)
    values = data[variable]
    frame: pd.DataFrame = values.rename("value").reset_coords(drop=True).to_series().reset_index()
    if f"{variable}_se" in data:
        frame["se"] = data[f"{variable}_se"].values.reshape(-1)
    if measure in DRIFTS:
        frame = frame.rename(columns={"transition": "layer"})
        frame["other_layer"] = frame["layer"] + 1
    elif measure in PAIRWISE:
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
