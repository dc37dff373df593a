"""The paper's experiment, end to end: chains, trained stacks, probes, verdicts, figures."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import xarray as xr
from tqdm import tqdm

from rgfast.experiments.config import ReproduceConfig, as_floats
from rgfast.experiments.finite import finite_sample
from rgfast.experiments.points import in_parallel, resumable
from rgfast.experiments.runs import DRIFTS, RANKS, STAGES, Run, execute, one_thread, plan, views_of
from rgfast.files import as_json, clear_leftovers, write_text
from rgfast.flow import Verdict, judge
from rgfast.flow.answers import FORMAT
from rgfast.netcdf import read_netcdf, write_netcdf
from rgfast.report.definitions import missed
from rgfast.runtime.environment import versions
from rgfast.validation import check_positive_int

__all__ = ["Reproduction", "reproduce", "verdict_table"]

SETUP = "in the default set-up, which was selected because it reproduces"
LONG_NAMES = {
    "relative_spectrum": "singular value over the layer's largest, mean over positions",
    "cka": "debiased linear CKA of two layers, mean over positions",
    "training_loss": "cross-entropy of hidden tokens in the training batch",
    "training_evaluation_loss": "expected cross-entropy of hidden tokens on held-out sequences",
    "bayes_loss": "expected cross-entropy of the exact Bayes posterior on the held-out sequences",
    "stationary_loss": "expected cross-entropy of the stationary distribution on the held-out sequences",
}
DEFAULT_CHAINS = ReproduceConfig().chains
WIDTH = 110
SUMMARY_COLUMNS = ("chain", "xi", "seed", "stage", "view", "measure", "layer", "value")


@dataclass(frozen=True)
class Reproduction:
    """What ``reproduce`` leaves: the labelled numbers, the verdicts by chain, and the folder they are in."""

    config: ReproduceConfig
    dataset: xr.Dataset
    verdicts: dict[str, tuple[Verdict, ...]]
    out: Path

    def __str__(self) -> str:
        return verdict_table(self.verdicts, self.config)


def reproduce(
    preset: str | None = None,
    *,
    seeds: Sequence[int] | None = None,
    xi: Sequence[float] | None = None,
    chains: Sequence[str] | None = None,
    config: ReproduceConfig | str | Path | None = None,
    out: str | Path | None = None,
    jobs: int | None = None,
    progress: bool | None = None,
) -> Reproduction:
    """Run the experiment; its verdicts and numbers, also written as JSON, NetCDF, CSV, figures and a page.

    Args:
        preset: ``"quick"`` (3 seeds, 6 layers; the default), ``"full"`` (5 seeds, 8 layers) or ``"sequel"``
            (the size of arXiv 2607.15449; hours).
        seeds, xi, chains: instead of the preset's; chains are labels such as ``"two-scale"``,
            ``"two-scale:r=30"``, ``"lazy"``, or one ``.npy`` file with a transition matrix, whose own
            correlation length is then the ξ.
        config: a :class:`ReproduceConfig` or the path of a recorded ``config.json``, instead of a preset.
        out: the output folder, default ``runs/reproduce-<preset>``: ``verdict.json``, ``result.nc``,
            ``summary.csv``, PNGs, ``report.html`` and the ``config.json`` to repeat it. Finished runs that it
            holds are kept, so an interrupted experiment goes on where it was.
        jobs: processes at once, default one per core. Each has one thread; the numbers do not depend on it.
        progress: show a bar on stderr; by default only on a terminal.

    Raises:
        ValueError: for any option out of range, before any work; also where ``out`` holds the run of another
            configuration.

    Source: arXiv 2606.10324; the set-up and the verdicts are defined in the documentation.
    """
    chosen = _configuration(preset, seeds, xi, chains, config)
    if jobs is not None:
        check_positive_int(jobs, "jobs")
    name = preset or ("config" if config is not None else "quick")
    folder = Path(out) if out is not None else Path("runs") / f"reproduce-{name}"
    _claim(folder, chosen)

    runs = plan(chosen)
    with resumable(folder):
        _execute_all(chosen, runs, folder, jobs, progress)
        dataset = _assemble(chosen, runs, folder)
        verdicts = {chain: judge(dataset, chain) for chain in chosen.chains}
        _write(folder, chosen, dataset, verdicts)
    return Reproduction(chosen, dataset, verdicts, folder)


def _configuration(
    preset: str | None,
    seeds: Sequence[int] | None,
    xi: Sequence[float] | None,
    chains: Sequence[str] | None,
    config: ReproduceConfig | str | Path | None,
) -> ReproduceConfig:
    if config is not None and preset is not None:
        raise ValueError(f"config and preset exclude each other, got preset {preset!r} and a config")
    if config is None:
        base = ReproduceConfig.preset(preset or "quick")
    else:
        base = config if isinstance(config, ReproduceConfig) else ReproduceConfig.load(config)
    changes: dict[str, Any] = {}
    if seeds is not None:
        changes["seeds"] = tuple(seeds)
    if xi is not None:
        changes["xi"] = as_floats(xi, "xi")
    files = [label for label in chains or () if str(label).endswith(".npy")]
    if files:
        if len(files) != len(chains or ()) or len(files) > 1:
            raise ValueError(f"chains must be labels or one .npy file, got {list(chains or ())}")
        if xi is not None:
            raise ValueError(
                f"xi must not be given with {files[0]}: it is that of the matrix, got {list(xi)}"
            )
        return replace(base, **changes).with_matrix(files[0])
    if chains is not None:
        changes["chains"] = tuple(chains)
    return replace(base, **changes) if changes else base


def _claim(folder: Path, config: ReproduceConfig) -> None:
    """Make ``folder`` this configuration's, or refuse before anything is written."""
    recorded = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, and {folder} is a file")
    if recorded.exists():
        if ReproduceConfig.load(recorded) != config:
            raise ValueError(
                f"out must be a new folder or one of this configuration, and {folder} holds another "
                "configuration's run (its config.json tells which)"
            )
        return
    if folder.exists() and (folder / "result.nc").exists():
        raise ValueError(f"out must be a new folder, and {folder} holds a result without its config.json")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(recorded, config.to_json())


def _execute_all(
    config: ReproduceConfig, runs: list[Run], folder: Path, jobs: int | None, progress: bool | None
) -> None:
    files = folder / "runs"
    files.mkdir(exist_ok=True)
    for place in (folder, files):
        clear_leftovers(place)
    missing = [run for run in runs if not (files / f"{run.name}.nc").exists()]
    bar = tqdm(
        total=len(runs),
        initial=len(runs) - len(missing),
        desc="runs",
        unit="run",
        disable=None if progress is None else not progress,
    )
    with bar, one_thread():
        tasks = [joblib.delayed(_execute)(config, run, files / f"{run.name}.nc") for run in missing]
        for name in in_parallel(jobs, tasks):
            bar.set_postfix_str(name, refresh=False)
            bar.update()


def _execute(config: ReproduceConfig, run: Run, path: Path) -> str:
    execute(config, run, path)
    return run.name


def _assemble(config: ReproduceConfig, runs: list[Run], folder: Path) -> xr.Dataset:
    """All runs as one labelled dataset, in the configuration's order; what was not run is NaN."""
    parts = [read_netcdf(folder / "runs" / f"{run.name}.nc") for run in runs]
    merged = xr.merge(parts, join="outer", compat="no_conflicts", combine_attrs="drop")
    # What was read remembers the string length of its own file, which would cut longer labels.
    merged = merged.drop_encoding()
    ordered: xr.Dataset = merged.sel(
        chain=list(config.chains),
        xi=list(config.xi),
        seed=list(config.seeds),
        stage=list(STAGES),
        view=list(views_of(config)),
    )
    samples = [finite_sample(config)[view] for view in views_of(config)]
    ordered = ordered.assign(
        n=("view", [sample.rows for sample in samples]),
        effective_rank_baseline=("view", [sample.isotropic_rank for sample in samples]),
        sample_limited=("view", [sample.limited for sample in samples]),
    )
    ordered.attrs = {
        "format": "rgfast.reproduce/1",
        "config": config.to_json(),
        "versions": json.dumps(versions()),
        "setup": "default" if _is_default(replace(config, chains=DEFAULT_CHAINS)) else "other",
    }
    ordered.effective_rank.attrs = {
        "long_name": "effective rank (singular values, centred over samples)",
        "units": "dimensions",
    }
    ordered.effective_rank_baseline.attrs = {
        "long_name": "effective rank of isotropic Gaussian data with as many rows and features",
        "units": "dimensions",
    }
    ordered.n.attrs = {"long_name": "rows behind every value: at each position, or in all", "units": "1"}
    ordered.sample_limited.attrs = {"long_name": "fewer than 16 rows a feature"}
    ordered.kernel_drift.attrs = {"long_name": "kernel drift 1 − CKA(l, l+1), biased", "units": "1"}
    ordered.kernel_change.attrs = {"long_name": "‖K_{l+1} − K_l‖ / ‖K_l‖", "units": "1"}
    ordered.captured.attrs = {"long_name": "captured fraction of what Bayes predicts", "units": "1"}
    ordered.survival.attrs = {
        "long_name": "held-out linear R² of a chain's eigenspace (0 the slowest) from a layer",
        "units": "1",
    }
    for name in ("posterior_rank", "log_posterior_rank"):
        ordered[name].attrs = {
            "long_name": "effective rank of masked rows' Bayes posterior",
            "units": "dimensions",
        }
    for name, words in LONG_NAMES.items():
        if name in ordered:  # runs that an older version finished lack them
            ordered[name].attrs = {"long_name": words, "units": "nats" if name.endswith("loss") else "1"}
    return ordered


def summary_rows(dataset: xr.Dataset) -> list[tuple[str, str, int, str, str, str, int, str]]:
    """The long form of a result: one row a number, in a fixed order; an undefined value is ``nan``."""
    rows = []
    for chain in dataset.chain.values:
        for xi in dataset.xi.values:
            for seed in dataset.seed.values:
                for stage in dataset.stage.values:
                    run = dataset.sel(chain=chain, xi=xi, seed=seed, stage=stage)
                    head = (str(chain), _number(float(xi)), int(seed), str(stage))
                    for view in dataset.view.values:
                        for measure in (*RANKS, DRIFTS[0]):
                            values = np.asarray(run[measure].sel(view=view).values)
                            rows += [
                                (*head, str(view), measure, layer, _number(float(value)))
                                for layer, value in enumerate(values)
                            ]
                    rows.append((*head, "masked", "captured", -1, _number(float(run.captured))))
    return rows


def _number(value: float) -> str:
    return "nan" if math.isnan(value) else repr(value)


def _write(
    folder: Path, config: ReproduceConfig, dataset: xr.Dataset, verdicts: dict[str, tuple[Verdict, ...]]
) -> None:
    # matplotlib is slow to import and only needed here.
    from rgfast.report import figures, write_report

    write_netcdf(folder / "result.nc", dataset)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(SUMMARY_COLUMNS)
    writer.writerows(summary_rows(dataset))
    write_text(folder / "summary.csv", table.getvalue())
    document = {
        "format": FORMAT,
        "setup": SETUP if _is_default(config) else "in the set-up that config.json records",
        "verdicts": {chain: [v.to_dict() for v in each] for chain, each in verdicts.items()},
        "config": json.loads(config.to_json()),
    }
    write_text(folder / "verdict.json", as_json(document))
    done = Reproduction(config, dataset, verdicts, folder)
    for name, (draw, needed) in {
        "order_parameter": (figures.plot_order_parameter, "effective_rank"),
        "heat_map": (figures.plot_heat_map, "effective_rank_by_position"),
        "drift": (figures.plot_drift, "kernel_drift"),
        "survival": (figures.plot_survival, "survival"),
        "training": (figures.plot_training, "training_loss"),
        "cka": (figures.plot_cka, "cka"),
        "spectra": (figures.plot_spectra, "relative_spectrum"),
    }.items():
        if needed not in dataset:  # runs that an older version finished
            continue
        for chain in config.chains:
            own = "".join(c if c.isalnum() else "_" for c in chain)
            suffix = f"-{own}" if len(config.chains) > 1 else ""
            figures.save_figure(draw(done, chain=chain), folder / f"{name}{suffix}.png")
    write_report(done)


def _is_default(config: ReproduceConfig) -> bool:
    """Whether this is the set-up that was selected because it reproduces, at any ξ and seeds."""
    same = {"seeds": config.seeds, "xi": config.xi}
    return any(config == ReproduceConfig.preset(name, **same) for name in ("quick", "full"))


def verdict_table(verdicts: dict[str, tuple[Verdict, ...]], config: ReproduceConfig) -> str:
    """The verdicts as text: per finding a line as stated and one on its reading, each with its numbers."""
    lines = []
    for chain, each in verdicts.items():
        seeds = f"{len(config.seeds)} seed" + ("s" if len(config.seeds) > 1 else "")
        lines.append(f"{chain}, {seeds}, ξ = {', '.join(f'{x:g}' for x in config.xi)}")
        for verdict in each:
            lines += _lines(verdict)
        if _is_default(config):
            lines.append(f"  ({SETUP})")
    return "\n".join(lines)


def _lines(verdict: Verdict) -> list[str]:
    stated, reading = verdict.as_stated, verdict.reading
    if reading is None:
        return [f"  {verdict.title}", *_hanging("", f"{stated.status.upper()}: {stated.summary}")]
    lines = [f"  {verdict.title}"]
    lines += _hanging("as stated", f"{stated.status.upper()}: {stated.summary}")
    if stated.status in ("partial", "not reproduced"):
        lines += [line for text in missed(stated.checks) for line in _hanging("", f"missed, {text}")]
    lines += _hanging("its reading", f"{reading.status.upper()}, “{reading.claim}”: {reading.summary}")
    lines += _hanging("beside it", verdict.beside) if verdict.beside else []
    return lines + [line for note in verdict.notes for line in _hanging("", f"note: {note}")]


def _hanging(name: str, text: str) -> list[str]:
    start = f"    {name:<13}"
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))
