"""Every finding in many set-ups: does it hang on choices that the source does not tell?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from rgfast.experiments.config import ReproduceConfig
from rgfast.experiments.finite import finite_sample
from rgfast.experiments.points import Point, resumable, run_numbers
from rgfast.experiments.runs import RANKS, Run, build_model, one_thread, probe_data, probe_run, train_run
from rgfast.experiments.study import chosen, run_study, write_table
from rgfast.experiments.survival import FROM_LAYER, mode_survival
from rgfast.files import as_json, write_text
from rgfast.flow import broken_stick_share, paired_interval, top_share
from rgfast.flow.relevance import CAPTURED
from rgfast.probing import probe
from rgfast.training import TrainingConfig

__all__ = ["EFFECTS", "Multiverse", "Universe", "multiverse"]

FORMAT = "rgfast.multiverse/1"
GROUPS = 5

# Name of an effect -> (what is drawn, the bar it is held against).
EFFECTS = {
    "fall_visible": ("(i) 1 − R, short ξ, visible", 0.15),
    "fall_masked": ("concentration: 1 − R, short ξ, masked", 0.15),
    "gap_visible": ("(ii) R long − R short, visible", 0.15),
    "gap_masked": ("(ii) R long − R short, masked", 0.15),
    "survival": ("reading of (i), (ii): slow − fast mode, short ξ, visible", 0.25),
    "top2_visible": ("(iii) top-2 share − broken stick, short ξ, visible", 0.0),
}

Options = tuple[tuple[str, tuple[Any, ...]], ...]


@dataclass(frozen=True)
class Universe:
    """All combinations of ``options`` on top of ``base``, at two ξ; the first value of each is the default.

    Options are fields of :class:`ReproduceConfig` or of its training. ``hidden`` is ``hidden_ratio * width``.
    """

    name: str = "multiverse"
    options: Options = (
        ("w2_scale", (0.0, 0.5)),
        ("norm", ("layer", "rms")),
        ("mixing", ("mixer", "flat")),
        ("width", (16, 24)),
        ("mask_rate", (0.2, 0.35)),
        ("lr", (5e-3, 1e-2)),
    )
    chain: str = "two-scale"
    xi: tuple[float, float] = (1.0, 7.0)
    seeds: tuple[int, ...] = (0,)
    base: ReproduceConfig = field(default_factory=lambda: ReproduceConfig.preset("quick"))
    hidden_ratio: int = 2

    def setups(self) -> list[dict[str, Any]]:
        """Every set-up as option -> value, the default first."""
        names = [name for name, _ in self.options]
        return [
            dict(zip(names, values, strict=True))
            for values in itertools.product(*(values for _, values in self.options))
        ]

    def point(self, setup: dict[str, Any], xi: float, seed: int) -> Point:
        """The run of one set-up at one ξ and seed."""
        own = {k: v for k, v in setup.items() if k in TrainingConfig.__dataclass_fields__}
        rest = {k: v for k, v in setup.items() if k not in own}
        training = replace(self.base.training, **own)
        width = rest.get("width", self.base.width)
        rows = self.base.probe_sequences
        while rows * training.mask_rate < 16 * width:
            rows *= 2
        config = replace(
            self.base,
            **rest,
            chains=(self.chain,),
            xi=(xi,),
            seeds=(seed,),
            hidden=self.hidden_ratio * width,
            probe_sequences=rows,
            training=training,
        )
        return Point(self.name, config)

    def points(self) -> list[Point]:
        """All points, set-up by set-up, seed by seed, the short ξ first."""
        return [
            self.point(setup, xi, seed) for setup in self.setups() for seed in self.seeds for xi in self.xi
        ]


QUICK = Universe(
    name="multiverse-quick",
    options=(("w2_scale", (0.0, 0.5)), ("norm", ("layer", "rms"))),
    base=replace(ReproduceConfig.preset("quick"), depth=4, training=TrainingConfig(lr=5e-3, steps=200)),
)


@dataclass(frozen=True)
class Multiverse:
    """What ``multiverse`` leaves: a row a set-up with every effect, R by view and rank, the folder.

    ``interval_of`` says what the intervals are over: ``"seeds"`` (paired t, from five on) or ``"sequences"``
    (jackknife over groups of the probed sequences of one seed each; it knows nothing of other seeds).
    """

    universe: Universe
    table: pd.DataFrame
    views: pd.DataFrame
    interval_of: str
    out: Path

    def __str__(self) -> str:
        return multiverse_text(self)


def multiverse(
    universe: Universe | None = None,
    *,
    out: str | Path | None = None,
    quick: bool = False,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    merge: Sequence[str | Path] = (),
    progress: bool | None = None,
) -> Multiverse:
    """Run every set-up; the effects of all findings, also written as CSV, JSON and one figure.

    Args:
        universe: what is varied; by default 64 set-ups (initialisation × norm × mixing × width × mask rate ×
            learning rate) at two ξ.
        out: the output folder, default ``runs/multiverse``; resumable as :func:`rgfast.sweep` is.
        quick: 4 set-ups with short training, to see that it runs; no result.
        seeds: instead of one; five or more give intervals over seeds.
        jobs, merge, progress: as in :func:`rgfast.sweep`.

    Raises ValueError as :func:`rgfast.sweep` does.

    >>> from rgfast.experiments.multiverse import Universe
    >>> len(Universe().setups()), Universe().xi
    (64, (1.0, 7.0))
    """
    universe = chosen(universe, Universe, QUICK, quick, seeds, "universe")
    folder, _, results = run_study(
        universe, FORMAT, numbers_with_jackknife, out=out, jobs=jobs, merge=merge, progress=progress
    )
    done = _collected(universe, results, folder)
    with resumable(folder):
        _write(done)
    return done


def numbers_with_jackknife(config: ReproduceConfig) -> dict[str, Any]:
    """The numbers of a point, and those that effects are made of with each group of sequences left out."""
    label, xi, seed = config.chains[0], config.xi[0], config.seeds[0]
    run = Run("trained", seed, ((label, xi),))
    with one_thread():
        model = build_model(config, seed)
        log = train_run(config, run, model)
        dataset = probe_run(config, run, model, log, label, xi)
        numbers = run_numbers(dataset.squeeze(("chain", "xi", "seed", "stage"), drop=True))
        chain = config.chain(label, xi)
        tokens, mask = probe_data(config, chain, seed)
        left_out: dict[str, list[float]] = {f"{k}_{v}": [] for k in ("R", "top2") for v in FROM_LAYER}
        left_out["survival"] = []
        for group in range(GROUPS):
            keep = np.arange(len(tokens)) % GROUPS != group
            shown = tokens[keep].masked_fill(mask[keep], model.mask_token)
            found = probe(
                model,
                {"tokens": shown, "mask": mask[keep]},
                mask="mask",
                views=tuple(FROM_LAYER),
                measures=("effective_rank", "kernel_drift"),
                progress=False,
                distributed=False,
            )
            for view, first in FROM_LAYER.items():
                rank = found.order_parameter(view).values[first:]
                left_out[f"R_{view}"].append(float(rank[-1] / rank[0]))
                drift = found.order_parameter(view, "kernel_drift").values[first:]
                left_out[f"top2_{view}"].append(top_share(drift))
            modes = mode_survival(model, chain, tokens[keep], mask[keep]).r2[0]
            left_out["survival"].append(float(modes[0, -1] - modes[-1, -1]))
    return {**numbers, "left_out": left_out}


def _collected(universe: Universe, results: list[dict[str, Any]], out: Path) -> Multiverse:
    over_seeds = len(universe.seeds) >= 5
    rows, free, at = [], [], iter(results)
    for number, setup in enumerate(universe.setups()):
        pairs = [(next(at), next(at)) for _ in universe.seeds]
        row: dict[str, Any] = {"setup": number, "default": number == 0, **setup}
        samples = finite_sample(universe.point(setup, universe.xi[0], universe.seeds[0]).config)
        row["sample_limited"] = any(samples[view].limited for view in FROM_LAYER)
        row["captured_short"] = min(short["captured"] for short, _ in pairs)
        row["captured_long"] = min(long["captured"] for _, long in pairs)
        row["trained"] = min(row["captured_short"], row["captured_long"]) >= CAPTURED
        for name in EFFECTS:
            values = [_effect(name, *pair) for pair in pairs]
            low, high = _over_seeds(values) if over_seeds else _over_sequences(name, pairs)
            row |= {name: float(np.mean(values)), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
        free += _by_view(number, row["trained"], pairs)
    return Multiverse(
        universe, pd.DataFrame(rows), pd.DataFrame(free), "seeds" if over_seeds else "sequences", out
    )


def _ratio(result: dict[str, Any], view: str, measure: str = "effective_rank") -> float:
    rank = result[measure][view]
    first = rank[FROM_LAYER.get(view, 0)]
    return float(rank[-1] / first) if first else math.nan


def _effect(name: str, short: dict[str, Any], long: dict[str, Any]) -> float:
    kind, _, view = name.partition("_")
    if kind == "fall":
        return 1 - _ratio(short, view)
    if kind == "gap":
        return _ratio(long, view) - _ratio(short, view)
    if kind == "survival":
        modes = short["survival"]["visible"]
        return float(modes[0][-1] - modes[-1][-1])
    drift = short["kernel_drift"][view][FROM_LAYER[view] :]
    return top_share(drift) - broken_stick_share(len(drift))


def _over_seeds(values: list[float]) -> tuple[float, float]:
    found = paired_interval(values)
    return found.low, found.high


def _over_sequences(name: str, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[float, float]:
    """Jackknife interval over groups of sequences, of the mean over seeds."""
    kind, _, view = name.partition("_")
    each = []
    for short, long in pairs:
        left = {k: np.asarray(v, float) for k, v in short["left_out"].items()}
        other = {k: np.asarray(v, float) for k, v in long["left_out"].items()}
        if kind == "fall":
            each.append(1 - left[f"R_{view}"])
        elif kind == "gap":
            each.append(other[f"R_{view}"] - left[f"R_{view}"])
        else:
            each.append(left["survival" if kind == "survival" else f"top2_{view}"])
    values: NDArray[np.float64] = np.mean(each, axis=0)
    n = len(values)
    error = math.sqrt((n - 1) / n * float(((values - values.mean()) ** 2).sum()))
    half = float(stats.t.ppf(0.975, n - 1)) * error
    centre = float(np.mean([_effect(name, *pair) for pair in pairs]))
    return centre - half, centre + half


def _by_view(number: int, trained: bool, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[Any]:
    return [
        {
            "setup": number,
            "trained": trained,
            "view": view,
            "measure": measure,
            "R_short": float(np.mean([_ratio(short, view, measure) for short, _ in pairs])),
            "R_long": float(np.mean([_ratio(long, view, measure) for _, long in pairs])),
        }
        for measure in RANKS
        for view in pairs[0][0][measure]
    ]


def summary(done: Multiverse) -> dict[str, Any]:
    """In how many trained set-ups each effect reaches its bar, its range, and what each option moves."""
    trained = done.table[done.table.trained]
    found: dict[str, Any] = {
        "setups": len(done.table),
        "trained": len(trained),
        "intervals_over": done.interval_of,
    }
    for name, (words, bar) in EFFECTS.items():
        values, low = trained[name], trained[f"{name}_low"]
        found[name] = {
            "what": words,
            "bar": bar,
            "reaches_bar": int((values >= bar).sum()),
            "interval_above_zero": int((low > 0).sum()) if low.notna().any() else None,
            "median": float(values.median()),
            "lowest": float(values.min()),
            "highest": float(values.max()),
            "default": float(done.table[name].iloc[0]),
            "option_moves_it_by": {
                option: {
                    str(value): float(
                        values[trained[option] == value].mean() - values[trained[option] == first].mean()
                    )
                    for value in others
                }
                for option, (first, *others) in done.universe.options
            },
        }
    return found


def _write(done: Multiverse) -> None:
    from rgfast.report import write_report
    from rgfast.report.figures import plot_multiverse, save_figure

    write_table(done.out / "table.csv", done.table)
    write_table(done.out / "views.csv", done.views)
    write_text(done.out / "summary.json", as_json({"format": FORMAT, **summary(done)}))
    save_figure(plot_multiverse(done), done.out / "multiverse.png")
    write_report(done)


def multiverse_text(done: Multiverse) -> str:
    """The summary as text: a line an effect, then what each option moves, then the free choices."""
    found = summary(done)
    n = found["trained"]
    lines = [f"{n} of {found['setups']} set-ups trained (captured ≥ 0.90 at both ξ)"]
    for name in EFFECTS:
        part = found[name]
        above = part["interval_above_zero"]
        sure = "" if above is None else f", interval over {done.interval_of} above 0 in {above}"
        lines.append(
            f"  {part['what']}: ≥ {part['bar']:g} in {part['reaches_bar']} of {n}{sure}; median "
            f"{part['median']:+.2f} ({part['lowest']:+.2f} to {part['highest']:+.2f}), "
            f"default {part['default']:+.2f}"
        )
        moved = [
            f"{option} → {value} {by:+.2f}"
            for option, values in part["option_moves_it_by"].items()
            for value, by in values.items()
        ]
        lines.append(f"    moved by {', '.join(moved)}")
    good = done.views[done.views.trained]
    for (measure, view), part in good.groupby(["measure", "view"], sort=False):
        gap = part.R_long - part.R_short
        lines.append(
            f"  {measure}, {view}: R short {part.R_short.median():.2f}, long {part.R_long.median():.2f}; "
            f"R long − R short > 0 in {int((gap > 0).sum())} of {len(part)}"
        )
    return "\n".join(lines)
