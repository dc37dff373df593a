"""Does depth integrate scale? Every layer against ideal observers who see only so far.

Observer w knows the exact posterior of each hidden token from the visible tokens within w positions. If
depth is scale, layer l is most like an observer whose radius grows with l: a ridge in the plane of the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgfast.chains import MarkovChain
from rgfast.experiments.config import ReproduceConfig
from rgfast.experiments.decimation import RANDOM_MASKS
from rgfast.experiments.points import Point, resumable
from rgfast.experiments.runs import Run, Stage, build_model, one_thread, train_run
from rgfast.experiments.study import chosen, run_study, write_table
from rgfast.files import as_json, write_text
from rgfast.flow import Interval, paired_interval
from rgfast.flow.stages import in_words
from rgfast.masking import balanced_mask
from rgfast.ops.cka import cka
from rgfast.stack import MaskedTokenModel
from rgfast.training import captured, seeded_generator

__all__ = ["Observer", "ObserverDesign", "observe", "ridge_radii"]

FORMAT = "rgfast.observer/1"
STAGES: tuple[Stage, ...] = ("trained", "control_iid", "untrained")
REACHED = 0.99


@dataclass(frozen=True)
class ObserverDesign:
    """Radii w, ξ, seeds, the share of hidden tokens when probed, and the training set-up ``base``.

    Most tokens are hidden: with few hidden ones the nearest visible neighbours, which are all that a Markov
    chain needs, lie within one or two steps and observers hardly differ.
    """

    name: str = "observer"
    radii: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 23)
    xi: tuple[float, ...] = (1.0, 7.0)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    hidden_share: float = 0.8
    base: ReproduceConfig = field(default_factory=lambda: replace(RANDOM_MASKS, probe_sequences=2560))

    def __post_init__(self) -> None:
        if list(self.radii) != sorted(set(self.radii)) or not self.radii or self.radii[0] < 1:
            raise ValueError(f"radii must be rising whole numbers >= 1, got {list(self.radii)}")
        if not 0 < self.hidden_share < 1:
            raise ValueError(f"hidden_share must lie between 0 and 1, got {self.hidden_share}")

    def points(self) -> list[Point]:
        """A point a (ξ, seed)."""
        study = f"{self.name}-w{'_'.join(map(str, self.radii))}-h{self.hidden_share:g}"
        return [
            Point(study, replace(self.base, xi=(xi,), seeds=(seed,))) for xi in self.xi for seed in self.seeds
        ]


QUICK = ObserverDesign(
    "observer-quick",
    (1, 2, 4, 8),
    (7.0,),
    (0,),
    base=replace(RANDOM_MASKS, length=12, depth=4, training=replace(RANDOM_MASKS.training, steps=200)),
)


@dataclass(frozen=True)
class Observer:
    """What ``observe`` leaves: CKA by (stage, ξ, seed, layer, radius), the ridges, their slopes, the folder.

    ``slopes`` has a row a (stage, ξ): the slope of ln w against the layer with its interval over seeds.
    """

    design: ObserverDesign
    curves: pd.DataFrame
    ridges: pd.DataFrame
    slopes: pd.DataFrame
    captured: dict[str, float]
    out: Path

    def __str__(self) -> str:
        return observer_text(self)


def observe(
    design: ObserverDesign | None = None,
    *,
    out: str | Path | None = None,
    quick: bool = False,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    merge: Sequence[str | Path] = (),
    progress: bool | None = None,
) -> Observer:
    """Compare every layer with every ideal observer on masked rows; ridge, slope, table and figure.

    CKA is debiased, by position, then averaged over positions. The ridge of a layer is the smallest radius
    whose CKA reaches 99% of that layer's largest; its slope is that of ln w by least squares over the layers
    from 1 on, with a paired t-interval over seeds from five on. Controls: a stack trained equally long on
    i.i.d. tokens, and an untrained one (the identity, whose masked rows hold nothing: undefined).

    Args:
        design: radii, ξ, seeds and training; by default ξ = 1 and 7, T = 24, five seeds.
        out, jobs, merge, progress: as in :func:`rgfast.sweep`; the default folder is ``runs/observer``.
        quick: one seed with short training, to see that it runs; no result.
        seeds: instead of the design's.

    Raises ValueError as :func:`rgfast.sweep` does.

    >>> from rgfast.experiments.observer import ridge_radii
    >>> ridge_radii([[0.2, 0.9, 0.905], [0.1, 0.2, 0.9]], (1, 2, 4))
    array([2., 4.])
    """
    design = chosen(design, ObserverDesign, QUICK, quick, seeds, "design")
    work = _Work(design.radii, design.hidden_share)
    folder, points, results = run_study(
        design, FORMAT, work, out=out, jobs=jobs, merge=merge, progress=progress
    )
    done = _collected(design, points, results, folder)
    with resumable(folder):
        _write(done)
    return done


@dataclass(frozen=True)
class _Work:
    """Trains the stacks of one (ξ, seed) and compares their layers with the observers."""

    radii: tuple[int, ...]
    hidden_share: float

    def __call__(self, config: ReproduceConfig) -> dict[str, Any]:
        label, xi, seed = config.chains[0], config.xi[0], config.seeds[0]
        chain = config.chain(label, xi)
        generator = seeded_generator(seed, "probe")
        tokens = chain.sample(config.probe_sequences, config.length, generator)
        mask = balanced_mask(len(tokens), config.length, self.hidden_share, generator)
        found: dict[str, Any] = {}
        with one_thread():
            for stage in STAGES:
                model = build_model(config, seed)
                train_run(config, Run(stage, seed, ((label, xi),)), model)
                found[stage] = {
                    "cka": observer_cka(model, chain, tokens, mask, self.radii),
                    "captured": captured(model, chain, tokens, mask),
                }
        return found


def observer_cka(
    model: MaskedTokenModel, chain: MarkovChain, tokens: Tensor, mask: Tensor, radii: Sequence[int]
) -> NDArray[np.float64]:
    """Debiased linear CKA ``[layer, radius]`` of masked rows with each observer's posterior.

    By position, averaged over the positions where it is defined (NaN where neither varies anywhere).
    """
    posteriors = [chain.bayes_posterior(tokens, mask, radius=radius) for radius in radii]
    with torch.no_grad():
        layers = [model.embed(tokens.masked_fill(mask, model.mask_token))]
        for block in model.stack.blocks:
            layers.append(block(layers[-1]))
    values = torch.full(
        (tokens.shape[1], len(layers), len(radii)), math.nan, dtype=torch.float64, device="cpu"
    )
    for t in range(tokens.shape[1]):
        hidden = mask[:, t]
        seen = [posterior[hidden, t] for posterior in posteriors]
        for layer, x in enumerate(layers):
            rows = x[hidden, t].double()
            for k, posterior in enumerate(seen):
                values[t, layer, k] = cka(rows, posterior)
    return np.asarray(values.nanmean(0).numpy())


def ridge_radii(values: Any, radii: Sequence[int]) -> NDArray[np.float64]:
    """The smallest radius that reaches 99% of each layer's largest CKA ``[layer]``; NaN where undefined.

    ``values``: CKA ``[layer, radius]``. A layer without a positive CKA has none.
    """
    cka_values = np.asarray(values, dtype=float)
    found = np.full(len(cka_values), math.nan)
    for layer, row in enumerate(cka_values):
        if np.isfinite(row).all() and row.max() > 0:
            found[layer] = radii[int((row >= REACHED * row.max()).argmax())]
    return found


def _collected(
    design: ObserverDesign, points: list[Point], results: list[dict[str, Any]], out: Path
) -> Observer:
    curves, ridges, slopes, learnt = [], [], [], {}
    for point, result in zip(points, results, strict=True):
        for stage in STAGES:
            head = {"stage": stage, "xi": point.xi, "seed": point.seed}
            values = np.asarray(result[stage]["cka"], dtype=float)
            ridge = ridge_radii(values, design.radii)
            for layer in range(1, len(values)):
                ridges.append({**head, "layer": layer, "radius": ridge[layer]})
            curves += [
                {**head, "layer": layer, "radius": radius, "cka": values[layer, k]}
                for layer in range(len(values))
                for k, radius in enumerate(design.radii)
            ]
            slopes.append({**head, "slope": _slope(ridge[1:])})
            if stage == "trained":
                learnt[f"xi{point.xi:g}-seed{point.seed}"] = float(result[stage]["captured"])
    each = pd.DataFrame(slopes)
    rows = []
    for (stage, xi), part in each.groupby(["stage", "xi"], sort=False):
        found: Interval = paired_interval(part.slope)
        rows.append({"stage": stage, "xi": xi, **asdict(found)})
    # Against the control of the same seed.
    for xi, part in each.groupby("xi", sort=False):
        wide = part.pivot(index="seed", columns="stage", values="slope")
        found = paired_interval(wide["trained"] - wide["control_iid"])
        rows.append({"stage": "trained − control_iid", "xi": xi, **asdict(found)})
    return Observer(design, pd.DataFrame(curves), pd.DataFrame(ridges), pd.DataFrame(rows), learnt, out)


def _slope(ridge: NDArray[np.float64]) -> float:
    """Of ln w against the layer; NaN below two defined layers."""
    good = np.isfinite(ridge)
    if good.sum() < 2:
        return math.nan
    return float(np.polyfit(np.flatnonzero(good), np.log(ridge[good]), 1)[0])


def _write(done: Observer) -> None:
    from rgfast.report import write_report
    from rgfast.report.figures import plot_observer, save_figure

    write_table(done.out / "table.csv", done.curves)
    write_table(done.out / "ridges.csv", done.ridges)
    write_table(done.out / "slopes.csv", done.slopes)
    document = {"format": FORMAT, "slopes": done.slopes.to_dict("records"), "captured": done.captured}
    write_text(done.out / "summary.json", as_json(document))
    save_figure(plot_observer(done), done.out / "observer.png")
    write_report(done)


def observer_text(done: Observer) -> str:
    """The study as text: captured, then for every stage and ξ the ridge by layer and its slope."""
    lines = [f"captured, trained: {min(done.captured.values()):.2f} at the least"]
    for row in done.slopes.to_dict("records"):
        stage, xi, low, high = row["stage"], float(row["xi"]), float(row["low"]), float(row["high"])
        ends = f" [{low:+.3f}, {high:+.3f}]" if math.isfinite(low) else ""
        told = f"slope of ln w a layer {row['mean']:+.3f}{ends}"
        if not row["n"]:
            told = "no ridge (masked rows hold nothing)"
        part = done.ridges[(done.ridges.stage == stage) & (done.ridges.xi == xi)]
        ridge = part.groupby("layer").radius.mean().dropna()
        own = done.curves[(done.curves.stage == stage) & (done.curves.xi == xi)].cka
        if own.notna().any():
            told += f"; largest CKA {own.max():.2f}"
        where = f"; radius by layer {' '.join(f'{w:.1f}' for w in ridge)}" if len(ridge) else ""
        lines.append(f"  {in_words(stage):<34} ξ={xi:g}: {told}{where}")
    return "\n".join(lines)
