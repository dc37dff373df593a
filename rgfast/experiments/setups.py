"""What the set-up of the papers can and cannot have been: runs that tell, the most telling first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from rgfast.experiments.config import ReproduceConfig
from rgfast.experiments.finite import finite_sample
from rgfast.experiments.points import Point, open_study, read_point, resumable, run_points
from rgfast.experiments.runs import Run, Stage, build_model, one_thread, probe_data, train_run
from rgfast.experiments.study import chosen, write_table
from rgfast.files import as_json, write_text
from rgfast.flow.setups import ArmVerdict, SetupRun, judge_arm
from rgfast.probing import probe
from rgfast.training import TrainingConfig, captured
from rgfast.validation import check_choice

__all__ = ["PARTS", "Arm", "Setups", "SetupsDesign", "setups"]

FORMAT = "rgfast.setups/1"
PARTS = {
    "a": "the exact null: no mixing, one target per sequence",
    "b": "no mixing, on a chain whose stationary distribution moves with ξ",
    "c": "no mixing, one-hot → linear, PyTorch's initialization",
    "d": "mixing across positions",
}
VIEWS = ("position", "visible", "masked", "mean_pooled")
RANKS = ("effective_rank", "effective_rank_uncentred")
STAGES: tuple[Stage, ...] = ("trained", "untrained")


@dataclass(frozen=True)
class Arm:
    """One set-up: ``options`` are fields of :class:`ReproduceConfig` or its training, on top of the base.

    ``seeds``: only so many of the design's, None for all. ``null``: nothing of ξ reaches the training.
    """

    part: str
    name: str
    options: tuple[tuple[str, Any], ...]
    seeds: int | None = None
    null: bool = False


_TORCH = (("mixing", "none"), ("initialization", "torch"), ("positions", "none"))
ARMS = (
    Arm("a", "exact null", (("mixing", "none"), ("masking", "one")), null=True),
    Arm("b", "moving π", (("mixing", "none"), ("chains", ("zipf-tree",)))),
    Arm("c", "torch, MASK", (*_TORCH, ("replacement", "mask"))),
    Arm("c", "torch, BERT", (*_TORCH, ("replacement", "bert"))),
    Arm("d", "mixer", (("mixing", "mixer"),), seeds=2),
    # 4 · 64 hidden units for all T · d = 4,096 numbers: four times as many as these are 805 million weights.
    Arm("d", "flat", (("mixing", "flat"), ("hidden", 4)), seeds=2),
)


@dataclass(frozen=True)
class SetupsDesign:
    """The arms in the order in which they run, two ξ, seeds, and the set-up ``base`` (the preset ``sequel``).

    Ranks are taken at every ``every``-th position; mean-pooled rows are means over all.
    """

    name: str = "setups"
    arms: tuple[Arm, ...] = ARMS
    xi: tuple[float, float] = (1.2, 6.7)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    base: ReproduceConfig = field(default_factory=lambda: ReproduceConfig.preset("sequel"))
    every: int = 4

    def points_of(self, arm: Arm) -> list[Point]:
        """The points of one arm, seed by seed, the short ξ first."""
        own = {k: v for k, v in arm.options if k in TrainingConfig.__dataclass_fields__}
        rest = {k: v for k, v in arm.options if k not in own}
        config = replace(self.base, **rest, training=replace(self.base.training, **own))
        name = "".join(c if c.isalnum() else "_" for c in arm.name)
        study = f"{self.name}-{arm.part}-{name}-p{self.every}"
        return [
            Point(study, replace(config, xi=(xi,), seeds=(seed,)))
            for seed in self.seeds[: arm.seeds]
            for xi in self.xi
        ]

    def points(self) -> list[Point]:
        """All points, arm by arm."""
        return [point for arm in self.arms for point in self.points_of(arm)]


_SHORT = replace(
    ReproduceConfig.preset("sequel"),
    length=8,
    width=24,
    hidden=48,
    depth=3,
    probe_sequences=2560,
    training=replace(ReproduceConfig.preset("sequel").training, steps=150, lr=3e-3, log_every=150),
)
QUICK = SetupsDesign("setups-quick", seeds=(0,), base=_SHORT, every=2)


@dataclass(frozen=True)
class Setups:
    """What ``setups`` leaves: a row per finished run, ranks and drift by layer, the verdicts, the folder."""

    design: SetupsDesign
    table: pd.DataFrame
    curves: pd.DataFrame
    verdicts: tuple[ArmVerdict, ...]
    out: Path

    def __str__(self) -> str:
        return setups_text(self)


def setups(
    design: SetupsDesign | None = None,
    *,
    out: str | Path | None = None,
    quick: bool = False,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    merge: Sequence[str | Path] = (),
    progress: bool | None = None,
    parts: Sequence[str] | None = None,
) -> Setups:
    """Run set-ups that the papers may have had; what each shows, as table, verdicts and figure.

    Parts, in their order: a, the exact null; b, no mixing on a chain whose stationary distribution moves; c,
    no mixing with PyTorch's initialization, MASK and BERT corruption; d, mixers. The rules are those of
    :mod:`rgfast.flow.setups`.

    Args:
        design: arms, ξ, seeds and training; by default the size of arXiv 2607.15449 at ξ = 1.2 and 6.7, five
            seeds (part d: two).
        parts: those that are run, by default all. Finished points of the others count too, and an empty list
            runs nothing: it reads what is there, and says what is missing.
        out, jobs, merge, progress: as in :func:`rgfast.sweep`; the default folder is ``runs/setups``.
        quick: one seed with short training, to see that it runs; no result.
        seeds: instead of the design's.

    Raises ValueError as :func:`rgfast.sweep` does, for an unknown part, and if no point is finished.

    >>> from rgfast.experiments.setups import SetupsDesign
    >>> len(SetupsDesign().points())
    48
    """
    design = chosen(design, SetupsDesign, QUICK, quick, seeds, "design")
    wanted = tuple(PARTS) if parts is None else tuple(parts)
    for part in wanted:
        check_choice(part, "parts", tuple(PARTS))
    folder = Path(out) if out is not None else Path("runs") / design.name
    everything = design.points()
    if not wanted and not folder.is_dir() and not merge:
        raise ValueError(f"parts must name at least one to run if none is finished, and there is no {folder}")
    open_study(folder, FORMAT, asdict(design), everything, merge, jobs)
    asked = [point for arm in design.arms if arm.part in wanted for point in design.points_of(arm)]
    run_points(asked, folder, _Work(design.every), jobs=jobs, progress=progress)
    found = [
        {p.name: read_point(path, p) for p in design.points_of(arm) if (path := _file(folder, p)).exists()}
        for arm in design.arms
    ]
    if not any(found):
        raise ValueError(
            f"parts must name at least one to run if none is finished, and {folder} has no point"
        )
    done = _collected(design, found, folder)
    with resumable(folder):
        _write(done)
    return done


def _file(folder: Path, point: Point) -> Path:
    return folder / "points" / f"{point.name}.json"


@dataclass(frozen=True)
class _Work:
    """Trains the stack of a point and probes it, and an untrained one on the same sequences."""

    every: int

    def __call__(self, config: ReproduceConfig) -> dict[str, Any]:
        label, xi, seed = config.chains[0], config.xi[0], config.seeds[0]
        chain = config.chain(label, xi)
        tokens, mask = probe_data(config, chain, seed)
        found: dict[str, Any] = {}
        with one_thread():
            for stage in STAGES:
                model = build_model(config, seed)
                train_run(config, Run(stage, seed, ((label, xi),)), model)
                result = probe(
                    model,
                    {"tokens": tokens.masked_fill(mask, model.mask_token), "mask": mask},
                    mask="mask",
                    positions=list(range(self.every // 2, config.length, self.every)),
                    views=VIEWS,
                    measures=(*RANKS, "kernel_drift"),
                    progress=False,
                    distributed=False,
                )
                found[stage] = {
                    name: {view: result.order_parameter(view, name).values for view in VIEWS}
                    for name in (*RANKS, "kernel_drift")
                }
                found[stage]["captured"] = captured(model, chain, tokens, mask)
        return found


def _collected(design: SetupsDesign, found: list[dict[str, dict[str, Any]]], out: Path) -> Setups:
    rows, curves, verdicts = [], [], []
    for arm, results in zip(design.arms, found, strict=True):
        points = design.points_of(arm)
        runs = []
        for point in points:
            if point.name not in results:
                continue
            run = SetupRun(point.xi, point.seed, point.config.states, results[point.name])
            runs.append(run)
            head = {"part": arm.part, "arm": arm.name, "xi": point.xi, "seed": point.seed}
            rows.append({**head, **_row(point, run)})
            curves += [{**head, **each} for each in _by_layer(run)]
        verdicts.append(judge_arm(arm.name, runs, design.xi, len(points), arm.null))
    return Setups(design, pd.DataFrame(rows), pd.DataFrame(curves), tuple(verdicts), out)


def _row(point: Point, run: SetupRun) -> dict[str, Any]:
    rank = run.curve()
    samples = finite_sample(point.config)
    row: dict[str, Any] = {
        "captured": run.captured,
        "masked_rank": run.masked_rank,
        "input_rank": rank[0],
        "layer1_rank": rank[1],
        "highest_rank": run.highest_rank,
        "states": run.states,
    }
    for stage in STAGES:
        for name, measure in zip(("R", "R_uncentered"), RANKS, strict=True):
            for view in ("position", "visible", "mean_pooled"):
                own = "" if stage == "trained" else f"{stage}_"
                row[f"{own}{name}_{view}"] = run.ratio(measure, view, stage)
    row["sample_limited"] = any(samples[view].limited for view in VIEWS)
    return row


def _by_layer(run: SetupRun) -> list[dict[str, Any]]:
    return [
        {"stage": stage, "measure": measure, "view": view, "layer": layer, "value": value}
        for stage in STAGES
        for measure in (*RANKS, "kernel_drift")
        for view in VIEWS
        for layer, value in enumerate(run.curve(measure, view, stage))
    ]


def _write(done: Setups) -> None:
    from rgfast.report import write_report
    from rgfast.report.figures import plot_setups, save_figure

    write_table(done.out / "table.csv", done.table)
    write_table(done.out / "curves.csv", done.curves)
    arms = [
        {"part": arm.part, "seeds_asked": len(done.design.seeds[: arm.seeds]), **verdict.to_dict()}
        for arm, verdict in zip(done.design.arms, done.verdicts, strict=True)
    ]
    write_text(done.out / "summary.json", as_json({"format": FORMAT, "arms": arms}))
    save_figure(plot_setups(done), done.out / "setups.png")
    write_report(done)


def setups_text(done: Setups) -> str:
    """The study as text: a block per arm with its answers, and the points that are missing."""
    lines = []
    for arm, verdict in zip(done.design.arms, done.verdicts, strict=True):
        asked = len(done.design.points_of(arm))
        missing = f", {verdict.missing} of {asked} runs missing" if verdict.missing else ""
        lines.append(f"{arm.part}) {arm.name}: {PARTS[arm.part]} ({len(verdict.seeds)} seeds{missing})")
        if not verdict.seeds:
            continue
        for name, answer in verdict.answers.items():
            lines.append(f"  {name:<9} {answer.status}: {answer.claim}; {answer.summary}")
        gaps = "; ".join(f"{name} {gap.mean:+.3f}" for name, gap in verdict.gaps.items())
        lines.append(f"  R_long − R_short: {gaps}")
    return "\n".join(lines)
