"""What every study does alike: its design is chosen, its points are run, its tables are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from rgfast.experiments.points import Point, Work, open_study, run_points
from rgfast.files import write_text

__all__ = ["chosen", "run_study", "with_seeds", "write_table"]

D = TypeVar("D", bound=Any)  # a frozen dataclass with name, seeds, base and points()


def chosen(
    design: D | None, usual: Callable[[], D], short: D, quick: bool, seeds: Sequence[int] | None, what: str
) -> D:
    """The design to run: that given, else the ``usual`` or the ``short`` one.

    Raises ValueError for a design with ``quick``, and for seeds that the set-up refuses.
    """
    if design is not None and quick:
        raise ValueError(f"quick goes without a {what}, got both")
    return with_seeds(design or (short if quick else usual()), seeds)


def with_seeds(design: D, seeds: Sequence[int] | None) -> D:
    """``design`` with these seeds, or as it is for None. Raises ValueError for what its set-up refuses."""
    if seeds is None:
        return design
    replace(design.base, seeds=tuple(seeds))
    return replace(design, seeds=tuple(seeds))


def run_study(
    design: Any,
    form: str,
    work: Work,
    *,
    out: str | Path | None,
    jobs: int | None,
    merge: Sequence[str | Path],
    progress: bool | None,
) -> tuple[Path, list[Point], list[dict[str, Any]]]:
    """The study's folder (default: ``runs/`` and its name), its points and the numbers of each.

    Raises what :func:`rgfast.experiments.points.open_study` raises.
    """
    folder = Path(out) if out is not None else Path("runs") / design.name
    points: list[Point] = design.points()
    open_study(folder, form, asdict(design), points, merge, jobs)
    return folder, points, run_points(points, folder, work, jobs=jobs, progress=progress)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, atomically."""
    write_text(path, table.to_csv(index=False, lineterminator="\n"))
