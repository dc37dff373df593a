"""A study as independent points, each a file: resumable, computable in pieces and mergeable."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import joblib
import xarray as xr
from joblib.externals.loky.backend import resource_tracker as loky_tracker
from joblib.parallel import SequentialBackend
from tqdm import tqdm

from rgfast.experiments.config import ReproduceConfig, as_recorded
from rgfast.experiments.runs import DRIFTS, RANKS, Run, one_thread, run_dataset
from rgfast.files import as_json, clear_leftovers, plain, write_text
from rgfast.interrupts import shielded
from rgfast.runtime.environment import versions
from rgfast.validation import check_positive_int

__all__ = [
    "Point",
    "in_parallel",
    "numbers_of_run",
    "open_study",
    "parallel",
    "resumable",
    "run_points",
]

FORMAT = "rgfast.point/1"

Work = Callable[[ReproduceConfig], dict[str, Any]]


@dataclass(frozen=True)
class Point:
    """One point of a study: a configuration of one chain, ξ and seed. Its file is named after all of it."""

    study: str
    config: ReproduceConfig

    @property
    def chain(self) -> str:
        return self.config.chains[0]

    @property
    def xi(self) -> float:
        return self.config.xi[0]

    @property
    def seed(self) -> int:
        return self.config.seeds[0]

    @property
    def name(self) -> str:
        digest = hashlib.sha256(self.config.to_json().encode()).hexdigest()[:12]
        chain = "".join(c if c.isalnum() else "_" for c in self.chain)
        return f"{self.study}-{chain}-xi{self.xi:g}-d{self.config.width}-seed{self.seed}-{digest}"


def numbers_of_run(config: ReproduceConfig) -> dict[str, Any]:
    """Train and probe the stack of a point: every rank and drift by view and layer, survival, captured."""
    run = Run("trained", config.seeds[0], ((config.chains[0], config.xi[0]),))
    return run_numbers(run_dataset(config, run).squeeze(("chain", "xi", "seed", "stage"), drop=True))


def run_numbers(dataset: xr.Dataset) -> dict[str, Any]:
    """The numbers of one run's dataset without its run dimensions."""
    found: dict[str, Any] = {
        measure: {str(view): dataset[measure].sel(view=view).values for view in dataset.view.values}
        for measure in (*RANKS, *DRIFTS)
    }
    for process in dataset.process.values:
        found.setdefault("survival", {})[str(process)] = dataset.survival.sel(process=process).values
    for name in ("captured", "posterior_rank", "log_posterior_rank"):
        found[name] = float(dataset[name])
    return found


def run_points(
    points: Sequence[Point], folder: Path, work: Work, *, jobs: int | None, progress: bool | None
) -> list[dict[str, Any]]:
    """The numbers of every point of an opened study, in order; what its folder holds is not computed again.

    Points go to the joblib backend that is active (local processes unless ``joblib.parallel_config`` names
    another, whose workers must see ``folder``); ``jobs`` defaults to as many as it has. Each runs on one
    thread, so numbers depend on neither. A file that is not this point's is an error, whatever else it holds.
    """
    files = folder / "points"
    missing = [point for point in points if not (files / f"{point.name}.json").exists()]
    bar = tqdm(
        total=len(points),
        initial=len(points) - len(missing),
        desc=points[0].study if points else "points",
        unit="point",
        disable=None if progress is None else not progress,
    )
    with bar, one_thread(), resumable(folder):
        for _ in in_parallel(jobs, [joblib.delayed(_compute)(point, work, files) for point in missing]):
            bar.update()
    return [read_point(files / f"{point.name}.json", point) for point in points]


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Inside, an interrupt says that what is finished is in ``folder`` and that the study goes on from it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.args = (f"what is finished is in {folder}, and the same command goes on from there",)
        raise


def in_parallel(jobs: int | None, tasks: Sequence[Any]) -> Iterator[Any]:
    """What joblib's delayed ``tasks`` return, whichever is ready first; see :func:`parallel`.

    Ctrl-C reaches this process alone, which then ends its workers: they would print a traceback each.
    """
    runs = parallel(jobs, len(tasks))
    if not runs.return_generator:
        yield from runs(tasks)
        return
    if os.name == "posix":
        # Workers need both trackers, and starting one lifts the shield from what is started after it.
        loky_tracker.ensure_running()
        resource_tracker.ensure_running()
    atexit.unregister(_join_feeders)  # so that it is there once
    atexit.register(_join_feeders)
    results: Any = None
    try:
        with shielded():
            results = runs(tasks)
            if runs.n_jobs != 1:
                # joblib's thread that hands out the first tasks does not bear being ended meanwhile: its
                # traceback would be printed. The workers take longer than this to start.
                time.sleep(0.5)
        for result in results:  # noqa: UP028 (the warning comes where an inner generator is closed)
            yield result
    finally:
        if results is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*have been cancelled", UserWarning)
                results.close()


def parallel(jobs: int | None, tasks: int) -> joblib.Parallel:
    """Runs so many tasks on the active joblib backend, ``jobs`` at once, and yields what is ready."""
    backend, asked = joblib.parallel.get_active_backend()
    if jobs is None:
        jobs = joblib.effective_n_jobs(-1 if asked is None else asked)
    # Some backends (joblib's multiprocessing, Ray's) hand over what they did at the end only.
    early = backend.supports_return_generator or isinstance(backend, SequentialBackend)
    ready = "generator_unordered" if early else "list"
    return joblib.Parallel(n_jobs=min(jobs, max(1, tasks)), return_as=ready, batch_size=1)


def _join_feeders() -> None:
    """Wait for the threads that feed tasks to loky's workers, which loky has told to end, but leaves.

    Such a thread may hold a queue last. Where it is stopped with the interpreter, between unlinking a
    semaphore of the queue and saying so, the tracker warns of a leak.
    """
    for thread in threading.enumerate():
        if thread.name == "QueueFeederThread":
            thread.join(timeout=5)


def _compute(point: Point, work: Work, files: Path) -> None:
    document = {
        "format": FORMAT,
        "study": point.study,
        "config": as_recorded(asdict(point.config)),
        "versions": versions(),
        "result": work(point.config),
    }
    text = json.dumps(plain(document), ensure_ascii=False, allow_nan=False) + "\n"
    write_text(files / f"{point.name}.json", text)


def read_point(path: Path, point: Point) -> dict[str, Any]:
    """The numbers in a point's file. Raises ValueError where it is not that point's, or damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a point of a study, and is damaged: {error}") from error
    expected = json.loads(json.dumps(plain(as_recorded(asdict(point.config)))))
    if (
        not isinstance(document, dict)
        or document.get("format") != FORMAT
        or document.get("study") != point.study
        or document.get("config") != expected
    ):
        raise ValueError(f"{path} must hold the point {point.name}, and holds another")
    result: dict[str, Any] = document["result"]
    return result


def open_study(
    folder: Path,
    form: str,
    design: dict[str, Any],
    points: Sequence[Point],
    merge: Iterable[str | Path] = (),
    jobs: int | None = None,
) -> int:
    """Make ``folder`` this study's and take over its points that the folders ``merge`` hold; how many.

    ``merge`` names folders of the study or their ``points`` folders; points that ``folder`` has are kept.
    Everything is checked before anything is written. Raises ValueError for a folder of another design, jobs
    below 1, and a source that is no folder, holds none of the points or a damaged file.
    """
    if jobs is not None:
        check_positive_int(jobs, "jobs")
    recorded, files = folder / "design.json", folder / "points"
    text = as_json({"format": form, **as_recorded(design)})
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, and {folder} is a file")
    if recorded.exists() and recorded.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"out must be a new folder or one of this study, and {folder} holds another "
            "(its design.json tells which)"
        )
    new: dict[Path, str] = {}
    for source in merge:
        for path in _held(points, Path(source)):
            if not (files / path.name).exists():
                new[files / path.name] = path.read_text(encoding="utf-8")
    files.mkdir(parents=True, exist_ok=True)
    for place in (folder, files):
        clear_leftovers(place)
    if not recorded.exists():
        write_text(recorded, text)
    for target, content in new.items():
        write_text(target, content)
    return len(new)


def _held(points: Sequence[Point], source: Path) -> list[Path]:
    """The files of those ``points`` that a folder holds, each checked."""
    if not source.is_dir():
        raise ValueError(f"merge must name folders, and {source} is none")
    place = source / "points" if (source / "points").is_dir() else source
    held = [point for point in points if (place / f"{point.name}.json").is_file()]
    if not held:
        raise ValueError(f"merge: {source} holds no point of this study")
    for point in held:
        read_point(place / f"{point.name}.json", point)
    return [place / f"{point.name}.json" for point in held]
