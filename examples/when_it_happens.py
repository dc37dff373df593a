"""When the rank falls in training, by layer: `python examples/when_it_happens.py [--out DIR] [--seeds …]`.

Stacks of the preset `quick` are trained at ξ = 1 and 7, and probed every 25 steps in the view `position`.
Does the fall of the rank come with the loss, or after it? Writes `when_it_happens.png` and `table.csv`, and
prints the step at which half of each has come.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt

import rgfast
from rgfast.experiments.config import ReproduceConfig
from rgfast.experiments.runs import build_model, probe_data
from rgfast.report.palette import depth_colours
from rgfast.training import captured, train

XIS = (1.0, 7.0)


def run(config: ReproduceConfig, xi: float, seed: int, every: int) -> list[dict[str, float]]:
    """Captured, effective rank and drift by step and layer of one training, from before it on."""
    chain, model = config.chain("two-scale", xi), build_model(config, seed)
    tokens, mask = probe_data(config, chain, seed)
    shown = tokens.masked_fill(mask, model.mask_token)
    rows: list[dict[str, float]] = []

    def look(step: int, fraction: float) -> None:
        found = rgfast.probe(
            model,
            shown,
            views=["position"],
            measures=["effective_rank", "kernel_drift"],
            progress=False,
            distributed=False,
        )
        ranks = found.order_parameter("position").values
        drifts = found.order_parameter("position", "kernel_drift").values
        for layer, rank in enumerate(ranks):
            drift = drifts[layer] if layer < len(drifts) else np.nan
            where = {"xi": xi, "seed": seed, "step": step, "layer": layer}
            rows.append({**where, "captured": fraction, "rank": rank, "drift": drift})

    model.eval()
    look(0, captured(model, chain, tokens, mask))
    training = replace(config.training, log_every=every)
    train(model, chain, training, seed=seed, on_log=lambda step, _, fraction: look(step, fraction))
    return rows


def crossing(steps: np.ndarray, values: np.ndarray, level: float) -> float:
    """The first step at which ``values`` reach ``level`` from below, interpolated; NaN if they do not."""
    k = int(np.argmax(values >= level))
    if values[k] < level:
        return float("nan")
    return float(np.interp(level, values[k - 1 : k + 1], steps[k - 1 : k + 1])) if k else float(steps[0])


def halves(table: pd.DataFrame) -> pd.DataFrame:
    """By ξ and seed: R at the end, and when half of the captured fraction and half of the fall of ln R came.

    Captured counts from 0, what knowing the stationary distribution alone is worth.
    """
    found = []
    for (xi, seed), part in table.groupby(["xi", "seed"]):
        ranks = part.pivot(index="step", columns="layer", values="rank")
        steps, fall = ranks.index.to_numpy(float), -np.log(ranks.iloc[:, -1] / ranks.iloc[:, 0]).to_numpy()
        fraction = part.groupby("step").captured.first().to_numpy()
        half = crossing(steps, fraction, fraction[-1] / 2)
        row = {"xi": xi, "seed": seed, "R": np.exp(-fall[-1]), "half_captured": half}
        row["R_then"] = np.exp(-np.interp(half, steps, fall))
        row["half_fall"] = crossing(steps, fall, fall[-1] / 2) if fall[-1] > 0 else np.nan
        row["lowest_R"], row["lowest_at"] = np.exp(-fall.max()), steps[fall.argmax()]
        found.append(row)
    return pd.DataFrame(found)


def draw(table: pd.DataFrame, path: Path) -> None:
    """Rank (above) and drift (below) by step, a line per layer, with the captured fraction dashed."""
    figure, axes = plt.subplots(2, 2, figsize=(11.5, 7), sharex=True, sharey="row", layout="constrained")
    for column, xi in enumerate(XIS):
        mean = table[table.xi == xi].groupby(["step", "layer"])[["rank", "drift", "captured"]].mean()
        for row, (name, words) in enumerate((("rank", "effective rank"), ("drift", "kernel drift 1 − CKA"))):
            panel = axes[row, column]
            values = mean[name].unstack().dropna(axis=1)
            for layer, color in zip(values, depth_colours(len(values.columns)), strict=True):
                label = f"layer {layer}" if name == "rank" else f"{layer}→{layer + 1}"
                panel.plot(values.index, values[layer], color=color, label=label)
            beside = panel.twinx()
            fraction = mean.captured.unstack()[0]
            beside.plot(fraction.index, fraction, "k--", lw=1.2, label="_")
            beside.set_ylim(-0.05, 1.05)
            beside.set_ylabel("captured fraction" if column else "")
            panel.set_title(f"ξ = {xi:g}")
            panel.set_ylabel(words if column == 0 else "")
            panel.set_xlabel("training step" if row else "")
    axes[0, 0].set_ylim(0, 1.05 * table["rank"].max())
    for row in (0, 1):
        handles, labels = axes[row, 1].get_legend_handles_labels()
        title = {"title": "dashed: captured"}
        axes[row, 1].legend(
            handles, labels, fontsize=8, loc="center left", bbox_to_anchor=(1.12, 0.5), **title
        )
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/when-it-happens"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--steps", type=int, help="of training (default: the preset's)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(1)
    config = ReproduceConfig.preset("quick")
    if options.steps is not None:
        config = replace(config, training=replace(config.training, steps=options.steps, warmup=1))
    rows = [row for seed in options.seeds for xi in XIS for row in run(config, xi, seed, options.every)]
    table = pd.DataFrame(rows)
    table.to_csv(options.out / "table.csv", index=False)
    print(halves(table).round(3).to_string(index=False))
    draw(table, options.out / "when_it_happens.png")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
