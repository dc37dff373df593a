"""One network, every ξ: a stack trained at a long ξ, shown only every k-th token at identical weights.

The named chains are semigroups: tokens k steps apart form the same chain at ξ/k. On that grid the task *is*
the short chain, while the weights stay those of the long one. What changes with k is what the input demands;
what does not is what training chose.
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
from torch import Tensor

from rgfast.chains import MarkovChain, captured_fraction
from rgfast.experiments.config import ReproduceConfig
from rgfast.experiments.finite import FiniteSample
from rgfast.experiments.points import Point, resumable
from rgfast.experiments.runs import Run, Stage, build_model, one_thread, train_run
from rgfast.experiments.study import chosen, run_study, write_table
from rgfast.experiments.survival import FROM_LAYER, mode_survival, posterior_rank
from rgfast.files import as_json, write_text
from rgfast.flow import Interval, paired_interval
from rgfast.flow.stages import in_words
from rgfast.masking import balanced_counts, balanced_mask
from rgfast.probing import probe
from rgfast.stack import MaskedTokenModel
from rgfast.training import TrainingConfig, seeded_generator

__all__ = ["RANDOM_MASKS", "Decimation", "DecimationDesign", "decimate"]

FORMAT = "rgfast.decimation/1"
ARMS = ("grid", "block")
STAGES: tuple[Stage, ...] = ("trained", "control_iid")
PROBE_RATE = 0.2

# Mask rates from 0.1 to 0.95 in one training, so that a window of which little is visible is nothing new.
RANDOM_MASKS = ReproduceConfig(
    seeds=(0,),
    xi=(7.0,),
    length=24,
    depth=6,
    hidden=32,
    training=TrainingConfig(lr=5e-3, steps=1500, mask_rate=0.1, mask_rate_max=0.95),
    probe_sequences=4096,
)


@dataclass(frozen=True)
class DecimationDesign:
    """The spacings k, the seeds, and the training set-up ``base`` (its chain and ξ are those trained on)."""

    name: str = "decimation"
    spacings: tuple[int, ...] = (1, 2, 3, 4, 5, 7)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    base: ReproduceConfig = field(default_factory=lambda: RANDOM_MASKS)

    def __post_init__(self) -> None:
        fit = [k for k in self.spacings if not 1 <= k < self.base.length]
        if fit or not self.spacings:
            raise ValueError(
                f"spacings must lie in 1..{self.base.length - 1} (the length), got {list(self.spacings)}"
            )

    def points(self) -> list[Point]:
        """A point a seed; the spacings are part of its study's name."""
        study = f"{self.name}-k{'_'.join(map(str, self.spacings))}"
        return [Point(study, replace(self.base, seeds=(seed,))) for seed in self.seeds]


QUICK = DecimationDesign(
    "decimation-quick",
    (1, 3),
    (0,),
    replace(RANDOM_MASKS, length=12, depth=4, training=replace(RANDOM_MASKS.training, steps=200)),
)


def shown_positions(arm: str, spacing: int, length: int) -> list[int]:
    """The positions that may be visible: every ``spacing``-th, or as many side by side in the middle."""
    grid = list(range(0, length, spacing))
    if arm == "grid":
        return grid
    start = (length - len(grid)) // 2
    return list(range(start, start + len(grid)))


@dataclass(frozen=True)
class Decimation:
    """What ``decimate`` leaves: a row a (stage, arm, k, seed), curves by layer, slopes against ln k.

    ``slopes[arm]`` holds for each measure the slope against ln k over seeds; under ``difference`` grid minus
    block: what spacing does beyond showing fewer tokens.
    """

    design: DecimationDesign
    table: pd.DataFrame
    curves: pd.DataFrame
    slopes: dict[str, dict[str, Interval]]
    out: Path

    def __str__(self) -> str:
        return decimation_text(self)


def decimate(
    design: DecimationDesign | None = None,
    *,
    out: str | Path | None = None,
    quick: bool = False,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    merge: Sequence[str | Path] = (),
    progress: bool | None = None,
) -> Decimation:
    """Probe one trained network at every spacing of the visible tokens; table, slopes and figure.

    The tokens off the grid are hidden, those on it with probability 0.2 (balanced); measures are taken at the
    positions of the grid alone. Arm ``block`` shows as many tokens side by side instead, so that fewer tokens
    are told from a shorter ξ; the stage ``control_iid`` is a stack trained equally long on i.i.d. tokens.

    Args:
        design: spacings, seeds and training; by default ξ = 7, T = 24, k = 1, 2, 3, 4, 5, 7, five seeds.
        out, jobs, merge, progress: as in :func:`rgfast.sweep`; the default folder is ``runs/decimation``.
        quick: one seed with short training, to see that it runs; no result.
        seeds: instead of the design's; intervals from five on.

    Raises ValueError as :func:`rgfast.sweep` does.

    >>> from rgfast.experiments.decimation import shown_positions
    >>> shown_positions("grid", 7, 24), shown_positions("block", 7, 24)
    ([0, 7, 14, 21], [10, 11, 12, 13])
    """
    design = chosen(design, DecimationDesign, QUICK, quick, seeds, "design")
    work = _Work(design.spacings)
    folder, _, results = run_study(design, FORMAT, work, out=out, jobs=jobs, merge=merge, progress=progress)
    rows = [row for result in results for row in result["rows"]]
    table = pd.DataFrame(
        [
            {k: v for k, v in row.items() if not isinstance(v, list)}
            | _sample(design.base, row["tokens_shown"])
            for row in rows
        ]
    )
    long = []
    for row in rows:
        head = {name: row[name] for name in ("stage", "arm", "spacing", "seed")}
        for measure, values in row.items():
            if isinstance(values, list):
                long += [
                    {**head, "measure": measure, "layer": layer, "value": value}
                    for layer, value in enumerate(values)
                ]
    curves = pd.DataFrame(long)
    done = Decimation(design, table, curves, _slopes(table), folder)
    with resumable(folder):
        _write(done)
    return done


@dataclass(frozen=True)
class _Work:
    """Trains the stacks of one seed and probes them at every spacing."""

    spacings: tuple[int, ...]

    def __call__(self, config: ReproduceConfig) -> dict[str, Any]:
        label, xi, seed = config.chains[0], config.xi[0], config.seeds[0]
        chain = config.chain(label, xi)
        rows = []
        with one_thread():
            for stage in STAGES:
                model = build_model(config, seed)
                train_run(config, Run(stage, seed, ((label, xi),)), model)
                for arm in ARMS:
                    for spacing in self.spacings:
                        numbers = probe_spaced(model, chain, config, seed, arm, spacing)
                        rows.append({"stage": stage, "arm": arm, "spacing": spacing, "seed": seed, **numbers})
        return {"rows": rows}


def probe_spaced(
    model: MaskedTokenModel, chain: MarkovChain, config: ReproduceConfig, seed: int, arm: str, spacing: int
) -> dict[str, Any]:
    """The numbers of one model with the visible tokens of ``arm`` and ``spacing``, at those positions."""
    where = shown_positions(arm, spacing, config.length)
    tokens, mask, asked = spaced_data(chain, config, seed, where)
    shown = tokens.masked_fill(mask, model.mask_token)
    found = probe(
        model,
        {"tokens": shown, "mask": mask},
        mask="mask",
        positions=where,
        views=tuple(FROM_LAYER),
        measures=("effective_rank", "kernel_drift"),
        progress=False,
        distributed=False,
    )
    numbers: dict[str, Any] = {"tokens_shown": len(where)}
    for view, first in FROM_LAYER.items():
        rank = found.order_parameter(view).values
        numbers[f"rank_{view}"] = rank.tolist()
        numbers[f"drift_{view}"] = found.order_parameter(view, "kernel_drift").values.tolist()
        numbers[f"R_{view}"] = float(rank[-1] / rank[first]) if rank[first] > 0 else math.nan
        numbers[f"total_drift_{view}"] = float(np.nansum(numbers[f"drift_{view}"]))
    modes = mode_survival(model, chain, tokens, mask, positions=where).r2
    for process, part in zip(FROM_LAYER, modes, strict=True):
        numbers[f"slow_{process}"], numbers[f"fast_{process}"] = float(part[0, -1]), float(part[-1, -1])
    numbers["final_rank_masked"] = numbers["rank_masked"][-1]
    _, numbers["log_posterior_rank"] = posterior_rank(chain, tokens, asked)
    with torch.no_grad():
        log_probs = torch.log_softmax(model(shown).double(), -1)
    posterior = chain.bayes_posterior(tokens, mask)
    numbers["captured"] = float(captured_fraction(log_probs, posterior, asked, chain.stationary))
    return numbers


def spaced_data(
    chain: MarkovChain, config: ReproduceConfig, seed: int, where: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, what is hidden of them, and what is hidden at the positions ``where``; ``[n, T]`` each."""
    generator = seeded_generator(seed, "probe")
    tokens = chain.sample(config.probe_sequences, config.length, generator)
    asked = torch.zeros(tokens.shape, dtype=torch.bool, device="cpu")
    asked[:, where] = balanced_mask(len(tokens), len(where), PROBE_RATE, generator)
    mask = torch.ones(tokens.shape, dtype=torch.bool, device="cpu")
    mask[:, where] = asked[:, where]
    return tokens, mask, asked


def _sample(config: ReproduceConfig, shown: int) -> dict[str, float | bool]:
    """What isotropic data of as many masked rows would give, and whether they are too few."""
    hidden, _ = balanced_counts(config.probe_sequences, shown, PROBE_RATE)
    masked = FiniteSample(hidden, config.stream_width)
    visible = FiniteSample(config.probe_sequences - hidden, config.stream_width)
    return {"masked_isotropic": masked.isotropic_rank, "sample_limited": masked.limited or visible.limited}


MEASURES = ("R_visible", "R_masked", "slow_visible", "fast_visible", "total_drift_visible")


def _slopes(table: pd.DataFrame) -> dict[str, dict[str, Interval]]:
    """Slopes of the trained stack's measures against ln k: by arm, and grid minus block, over seeds."""
    found: dict[str, dict[str, Interval]] = {}
    trained = table[table.stage == "trained"]
    if trained.spacing.nunique() < 2:
        return found
    by_arm: dict[str, dict[str, list[float]]] = {}
    for arm, part in trained.groupby("arm"):
        by_arm[str(arm)] = {
            name: [float(np.polyfit(np.log(own.spacing), own[name], 1)[0]) for _, own in part.groupby("seed")]
            for name in MEASURES
        }
    for arm in ARMS:
        found[arm] = {name: paired_interval(by_arm[arm][name]) for name in MEASURES}
    found["difference"] = {
        name: paired_interval(np.subtract(by_arm["grid"][name], by_arm["block"][name])) for name in MEASURES
    }
    return found


def _write(done: Decimation) -> None:
    from rgfast.report import write_report
    from rgfast.report.figures import plot_decimation, save_figure

    write_table(done.out / "table.csv", done.table)
    write_table(done.out / "curves.csv", done.curves)
    slopes = {arm: {k: asdict(v) for k, v in each.items()} for arm, each in done.slopes.items()}
    write_text(done.out / "summary.json", as_json({"format": FORMAT, "slopes_against_ln_k": slopes}))
    save_figure(plot_decimation(done), done.out / "decimation.png")
    write_report(done)


def decimation_text(done: Decimation) -> str:
    """The study as text: a line a (stage, arm, k), then the slopes."""
    xi, lines = done.design.base.xi[0], []
    for (stage, arm, spacing), part in done.table.groupby(["stage", "arm", "spacing"], sort=False):
        mean, k = part.mean(numeric_only=True), int(part.spacing.iloc[0])
        length = xi / k if arm == "grid" else xi
        lines.append(
            f"  {in_words(str(stage)):<24} {arm:<5} k={spacing} (ξ={length:.2f}, "
            f"{mean.tokens_shown:.0f} shown) captured {mean.captured:.2f}; R visible {mean.R_visible:.2f}, "
            f"masked {mean.R_masked:.2f}; own token slow {mean.slow_visible:.2f}, fast "
            f"{mean.fast_visible:.2f}; final rank {mean.final_rank_masked:.2f}, posterior's "
            f"{mean.log_posterior_rank:.2f}"
        )
    for name in MEASURES if done.slopes else ():
        told = []
        for arm, each in done.slopes.items():
            found = each[name]
            ends = f" [{found.low:+.3f}, {found.high:+.3f}]" if math.isfinite(found.low) else ""
            told.append(f"{arm} {found.mean:+.3f}{ends}")
        lines.append(f"  slope of {name} against ln k: {', '.join(told)}")
    return "\n".join(lines)
