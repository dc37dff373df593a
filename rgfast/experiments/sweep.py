"""Grids of chain × ξ × width × seed: what decides where the flow ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rgfast.chains import MarkovChain
from rgfast.experiments.config import ReproduceConfig
from rgfast.experiments.finite import finite_sample
from rgfast.experiments.points import Point, numbers_of_run, resumable
from rgfast.experiments.study import run_study, with_seeds, write_table
from rgfast.files import as_json, write_text
from rgfast.flow.relevance import CAPTURED, RelevanceTest, relevance_test
from rgfast.training import TrainingConfig
from rgfast.validation import check_choice

__all__ = ["DESIGNS", "Design", "Sweep", "sweep"]

FORMAT = "rgfast.sweep/1"


@dataclass(frozen=True)
class Design:
    """A grid: every chain at every ξ and width with every seed, on top of the set-up ``base``.

    ``hidden`` is ``hidden_ratio * width``; the probe sees as many sequences as the width needs.
    """

    name: str
    chains: tuple[str, ...]
    xi: tuple[float, ...]
    widths: tuple[int, ...]
    seeds: tuple[int, ...]
    base: ReproduceConfig
    hidden_ratio: int = 2

    def points(self) -> list[Point]:
        """All points, the widest (longest) first."""
        return [
            Point(self.name, self._config(chain, xi, width, seed))
            for width in sorted(self.widths, reverse=True)
            for chain in self.chains
            for xi in self.xi
            for seed in self.seeds
        ]

    def _config(self, chain: str, xi: float, width: int, seed: int) -> ReproduceConfig:
        rows = self.base.probe_sequences
        while rows * self.base.training.mask_rate < 16 * width:
            rows *= 2
        return replace(
            self.base,
            chains=(chain,),
            xi=(xi,),
            seeds=(seed,),
            width=width,
            hidden=self.hidden_ratio * width,
            probe_sequences=rows,
        )


_BASE = ReproduceConfig.preset("quick")
_CLUSTERS, _EXPONENTS = (2, 4, 8), ("1.5", "4", "12")


def _two_scale(clusters: Sequence[int], exponents: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"two-scale:K={k},r={r}" for k in clusters for r in exponents)


DESIGNS = {
    "xi": Design(
        "xi",
        ("two-scale", "lazy", "ring-heat", "random-reversible"),
        (0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0),
        (16,),
        (0, 1, 2),
        _BASE,
    ),
    "relevance": Design(
        "relevance", _two_scale(_CLUSTERS, _EXPONENTS), (1.0, 3.0, 7.0), (16, 48), (0, 1), _BASE
    ),
}
_SHORT = replace(_BASE, depth=4, training=TrainingConfig(lr=5e-3, steps=200))
QUICK = {
    "xi": Design("xi-quick", ("two-scale", "lazy"), (1.0, 7.0), (16,), (0,), _SHORT),
    "relevance": Design(
        "relevance-quick", _two_scale((2, 4), ("1.5", "12")), (1.0, 7.0), (16, 24), (0,), _SHORT
    ),
}


@dataclass(frozen=True)
class Sweep:
    """What ``sweep`` leaves: a row a point, the test of the claim (``relevance`` alone), the folder."""

    design: Design
    table: pd.DataFrame
    test: RelevanceTest | None
    out: Path

    def __str__(self) -> str:
        return sweep_text(self)


def sweep(
    design: str | Design = "xi",
    *,
    out: str | Path | None = None,
    quick: bool = False,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    merge: Sequence[str | Path] = (),
    progress: bool | None = None,
) -> Sweep:
    """Run a grid of experiments; its table, also written as CSV, JSON and a figure.

    Args:
        design: ``"xi"`` (four kinds of chain, ξ from 0.5 to 10), ``"relevance"`` (27 two-scale cells at two
            widths, and the test whether the final rank is that of the Bayes posterior), or a :class:`Design`.
        out: the output folder, default ``runs/sweep-<design>``. Every finished point is a file in
            ``points/``, so a sweep that was stopped goes on where it was, and each can be computed elsewhere.
        quick: a reduced grid with short training, to see that it runs; no result.
        seeds: instead of the design's.
        jobs: processes at once, default one per core.
        merge: folders of the same sweep computed elsewhere; their points are taken over first.
        progress: show a bar on stderr; by default only on a terminal.

    Raises ValueError for an unknown design, bad seeds or jobs, a folder of another sweep, and what
    :func:`rgfast.experiments.points.open_study` raises.

    >>> from rgfast.experiments.sweep import DESIGNS
    >>> len(DESIGNS["relevance"].points())
    108
    """
    chosen = _chosen(design, quick, seeds)
    out = Path("runs") / f"sweep-{chosen.name}" if out is None else out
    folder, points, results = run_study(
        chosen, FORMAT, numbers_of_run, out=out, jobs=jobs, merge=merge, progress=progress
    )
    table = pd.DataFrame([_row(p, r) for p, r in zip(points, results, strict=True)])
    table = table.sort_values(["chain", "xi", "width", "seed"], ignore_index=True)
    test = relevance_test(table) if chosen.name.startswith("relevance") else None
    done = Sweep(chosen, table, test, folder)
    with resumable(folder):
        _write(done)
    return done


def _chosen(design: str | Design, quick: bool, seeds: Sequence[int] | None) -> Design:
    if isinstance(design, str):
        check_choice(design, "design", DESIGNS)
        design = (QUICK if quick else DESIGNS)[design]
    elif quick:
        raise ValueError("quick goes with the name of a design, got a Design")
    return with_seeds(design, seeds)


def transition_rank(chain: MarkovChain) -> float:
    """Effective rank of the transition matrix: exp of the entropy of its normalised singular values."""
    values = np.linalg.svd(chain.transition.numpy(), compute_uv=False)
    p = values[values > 0] / values.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _row(point: Point, result: dict[str, Any]) -> dict[str, Any]:
    chain = point.config.chain(point.chain, point.xi)
    row: dict[str, Any] = {
        "chain": point.chain,
        "xi": point.xi,
        "width": point.config.width,
        "seed": point.seed,
        "captured": result["captured"],
    }
    for view, first in (("visible", 0), ("masked", 1), ("position", 0)):
        rank = result["effective_rank"][view]
        row |= {f"{view}_first": rank[first], f"{view}_last": rank[-1], f"{view}_R": rank[-1] / rank[first]}
    row |= {name: result[name] for name in ("posterior_rank", "log_posterior_rank")}
    samples = finite_sample(point.config)
    row |= {f"{view}_isotropic": samples[view].isotropic_rank for view in ("visible", "masked")}
    row["sample_limited"] = any(samples[view].limited for view in ("visible", "masked", "position"))
    row["over_log_posterior"] = row["masked_last"] / row["log_posterior_rank"]
    for process in ("visible", "masked"):
        modes = result["survival"][process]
        row |= {f"{process}_slow": modes[0][-1], f"{process}_fast": modes[-1][-1]}
    row["relaxation_time"] = chain.relaxation_time
    row["mutual_information"] = chain.mutual_information(1)
    row["transition_rank"] = transition_rank(chain)
    return row


def _write(done: Sweep) -> None:
    from rgfast.report import write_report
    from rgfast.report.figures import plot_posterior_rank, plot_relevance, plot_xi, save_figure

    write_table(done.out / "table.csv", done.table)
    if done.test is not None:
        document = {"format": "rgfast.relevance/1", **done.test.to_dict()}
        write_text(done.out / "verdict.json", as_json(document))
        save_figure(plot_relevance(done), done.out / "relevance.png")
    save_figure(plot_xi(done), done.out / "xi.png")
    save_figure(plot_posterior_rank(done), done.out / "posterior_rank.png")
    write_report(done)


def sweep_text(done: Sweep) -> str:
    """A sweep as text: a line a (chain, ξ, width) with means over seeds, then the test."""
    trained = done.table[done.table.captured >= CAPTURED]
    lines = [f"{len(trained)} of {len(done.table)} points trained (captured ≥ 0.90)"]
    groups = trained.assign(length=trained.xi).groupby(["chain", "length", "width"])
    for (chain, xi, width), part in groups:
        mean = part.mean(numeric_only=True)
        lines.append(
            f"  {chain:<22} ξ={xi:<4g} d={width:<3} R visible {mean.visible_R:.2f}, "
            f"masked {mean.masked_R:.2f}; final rank {mean.masked_last:.2f}, "
            f"posterior's {mean.log_posterior_rank:.2f} (ratio {mean.over_log_posterior:.2f})"
        )
    if done.test is not None:
        lines.append(f"{done.test.status.upper()}: {done.test.reason}")
        for p in done.test.predictors:
            lines.append(
                f"  d={p.width:<3} {p.name:<28} error {p.error:.3f} in ln rank, minus y = x "
                f"{p.excess:+.3f} [{p.excess_low:+.3f}, {p.excess_high:+.3f}]; Spearman {p.spearman:.2f} "
                f"[{p.spearman_low:.2f}, {p.spearman_high:.2f}]"
            )
        mean, low, high = done.test.width_exponent
        lines.append(f"  exponent of the final rank in the width {mean:.2f} [{low:.2f}, {high:.2f}]")
    return "\n".join(lines)
