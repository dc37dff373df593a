"""What a figure or a report can be made of: the result of a probe, a monitor, a comparison, a reproduction
or a study."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from rgfast.comparing.result import FORMAT as COMPARISON
from rgfast.comparing.result import Comparison
from rgfast.flow import judge
from rgfast.flow.answers import FORMAT
from rgfast.monitor.result import MonitorResult
from rgfast.probing.result import ProbeResult

__all__ = ["Experiment", "Source", "Study", "load"]

_EARLIER = "rgfast.verdict/1"
_TABLES = {
    "sweep": ("table",),
    "multiverse": ("table", "views"),
    "decimation": ("table",),
    "observer": ("table", "ridges", "slopes"),
    "setups": ("table", "curves"),
}


@dataclass(frozen=True)
class Experiment:
    """A reproduction: its dataset and, where they were saved with it, its verdicts by chain.

    ``rejudged``: the folder's own verdicts are those of rgfast 0.1, and the dataset is judged anew instead.
    """

    dataset: xr.Dataset
    saved: dict[str, list[dict[str, Any]]] | None = None
    setup: str = ""
    folder: Path | None = None
    rejudged: bool = False

    @property
    def verdicts(self) -> dict[str, list[dict[str, Any]]]:
        """By chain, as ``verdict.json`` has them; judged anew where none were saved."""
        if self.saved is not None:
            return self.saved
        chains = [str(chain) for chain in self.dataset.chain.values]
        return {chain: [v.to_dict() for v in judge(self.dataset, chain)] for chain in chains}

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.dataset.attrs.get("config", "{}"))
        return found

    @property
    def versions(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.dataset.attrs.get("versions", "{}"))
        return found


@dataclass(frozen=True)
class Study:
    """A study's folder: ``kind`` is sweep, multiverse, decimation, observer or setups."""

    kind: str
    tables: dict[str, pd.DataFrame]
    summary: dict[str, Any]
    design: dict[str, Any]
    folder: Path


Source = ProbeResult | MonitorResult | Comparison | Experiment | Study


def load(source: Any) -> Source:
    """The :class:`ProbeResult`, :class:`MonitorResult`, :class:`Comparison`, :class:`Experiment` or
    :class:`Study` that ``source`` is or names.

    ``source`` may be one of them, what ``reproduce`` or a study returned, a dataset of a probe or a
    reproduction, the path of a ``.nc`` file, of a monitor's file (``.jsonl``) or of a folder. Raises
    TypeError for anything else, FileNotFoundError where there is nothing, ValueError for a file or folder of
    another kind and a damaged one.
    """
    if isinstance(source, (ProbeResult, MonitorResult, Comparison, Experiment, Study)):
        return source
    if isinstance(source, (str, Path)):
        return _from_path(Path(source))
    if isinstance(source, xr.Dataset):
        return _from_dataset(source, "source")
    dataset, folder = getattr(source, "dataset", None), getattr(source, "out", None)
    if isinstance(dataset, xr.Dataset) and isinstance(folder, Path):
        verdicts = {chain: [v.to_dict() for v in each] for chain, each in source.verdicts.items()}
        return Experiment(dataset, verdicts, _setup(folder), folder)
    if isinstance(folder, Path) and hasattr(source, "design") | hasattr(source, "universe"):
        return _from_folder(folder)
    raise TypeError(
        "source must be a ProbeResult or MonitorResult, what compare, reproduce or a study returned, or the "
        f"path of a result or a folder, got {type(source).__name__}"
    )


def _from_path(path: Path) -> Source:
    if path.is_dir():
        return _from_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"source must be a result or a folder, and there is no {path}")
    if path.suffix == ".jsonl":
        return MonitorResult.load(path)
    try:
        with xr.open_dataset(path, engine="h5netcdf") as file:
            dataset = file.load()
    except Exception as error:
        raise ValueError(
            f"source must be a folder or a NetCDF file, and {path} is damaged or neither: {error}"
        ) from error
    if dataset.attrs.get("format") == "rgfast.probe":
        return ProbeResult.load(path)
    return _from_dataset(dataset, str(path))


def _from_dataset(dataset: xr.Dataset, name: str) -> Source:
    if dataset.attrs.get("format") == "rgfast.probe":
        return ProbeResult(dataset)
    if dataset.attrs.get("format") == COMPARISON:
        return Comparison(dataset)
    if not {"effective_rank", "kernel_drift"} <= set(dataset) or "stage" not in dataset.dims:
        raise ValueError(
            f"{name} must hold a probe's result, a comparison or a reproduction, and holds neither"
        )
    return Experiment(dataset)


def _from_folder(folder: Path) -> Source:
    if (folder / "result.nc").is_file():
        found = _from_path(folder / "result.nc")
        if not isinstance(found, Experiment):
            return found
        written = _json(folder / "verdict.json") if (folder / "verdict.json").is_file() else {}
        setup, verdicts = str(written.get("setup", "")), written.get("verdicts")
        if "verdicts" not in written or written.get("format") == FORMAT:
            return Experiment(found.dataset, verdicts, setup, folder)
        if written.get("format") != _EARLIER:
            raise ValueError(
                f"{folder / 'verdict.json'} was written by another rgfast (format {written.get('format')!r}; "
                f"this one reads {_EARLIER!r} and {FORMAT!r})"
            )
        return Experiment(found.dataset, None, setup, folder, rejudged=True)
    if (folder / "design.json").is_file():
        design = _json(folder / "design.json")
        kind = str(design.pop("format", "")).removeprefix("rgfast.").partition("/")[0]
        if kind in _TABLES:
            return _study(folder, kind, design)
    raise ValueError(
        f"source must be the folder of a finished reproduction or study, and {folder} holds no result.nc "
        "and no design.json of a study"
    )


def _study(folder: Path, kind: str, design: dict[str, Any]) -> Study:
    tables = {}
    for name in _TABLES[kind]:
        path = folder / f"{name}.csv"
        if not path.is_file():
            raise ValueError(f"source must be a finished study, and {folder} has no {path.name} yet")
        tables[name] = _table(path)
    summary = next(
        (folder / name for name in ("summary.json", "verdict.json") if (folder / name).is_file()), None
    )
    return Study(kind, tables, {} if summary is None else _json(summary), design, folder)


def _table(path: Path) -> pd.DataFrame:
    try:
        found: pd.DataFrame = pd.read_csv(path)
    except ValueError as error:  # pandas' own errors of parsing are ValueErrors, too
        raise ValueError(f"{path} is damaged: {error}") from error
    return found


def _setup(folder: Path) -> str:
    path = folder / "verdict.json"
    return str(_json(path).get("setup", "")) if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found
