"""The charts of the studies. Color is ξ, the chain or the view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from rgfast.flow.relevance import CAPTURED
from rgfast.flow.stages import in_words
from rgfast.report.extract import SPACING_ARMS, SPACING_PANELS, observer_cells, observer_grid
from rgfast.report.palette import CONTROL, DASHES, LIGHT, MARKED, kind_colours
from rgfast.report.sources import Study
from rgfast.report.spec import Axis, Chart, Panel, Rule, Series, heat_panel

__all__ = ["POSTERIOR", "multiverse_chart", "observer_chart", "ratio_chart", "spacing_chart"]

POSTERIOR = "effective rank of the centered log-posterior"
_RATIOS = {
    "visible_R": Axis("R", "R: last over first layer, visible rows"),
    "masked_R": Axis("R", "R: last over first layer, masked rows"),
}
_LAST = {"masked_last": Axis("effective rank", "effective rank of the last layer, masked rows")}
_SIZE = {2: (6.1, 3.9), 3: (4.3, 3.9)}


def multiverse_chart(study: Study) -> Chart:
    """A specification curve per effect: trained set-ups sorted by it, with intervals."""
    data = study.tables["table"]
    trained, options = data[data.trained], [name for name, _ in study.design["options"]]
    panels = []
    for name, part in study.summary.items():
        if not isinstance(part, dict):
            continue
        ordered = trained.sort_values(name, ignore_index=True)
        series = []
        for label, default, color, marker, size in (
            ("set-up", False, CONTROL, "o", 2.8),
            ("default set-up", True, MARKED, "*", 5.0),
        ):
            own = ordered[ordered["default"] == default]
            low, high = (own[f"{name}_{end}"].to_numpy(float) for end in ("low", "high"))
            texts = tuple(_specification(row, options) for row in _records(own))
            ends: dict[str, Any] = {"low": low, "high": high, "spread": "95% interval", "texts": texts}
            x, y = own.index.to_numpy(float), own[name].to_numpy(float)
            series.append(Series(label, x, y, color, line=False, marker=marker, size=size, **ends))
        rules = [Rule("0", 0.0)] + ([Rule("bar", part["bar"], ":")] if part["bar"] else [])
        label = f"{len(ordered)} of {len(data)} set-ups (trained), sorted"
        x_axis, y_axis = Axis("place", label, whole=True), Axis("effect")
        panels.append(Panel(x_axis, y_axis, part["what"], tuple(series), tuple(rules)))
    caption = "Trained set-ups sorted by each effect; the diamond is the default, the dotted line the bar."
    return Chart("Every effect over all trained set-ups", caption, tuple(panels))


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _specification(row: dict[str, Any], options: Sequence[str]) -> str:
    lines = [f"{option}: {row[option]}" for option in options]
    lines.append(f"captured {min(row['captured_short'], row['captured_long']):.3f}")
    return "\n".join(lines)


def ratio_chart(table: pd.DataFrame, against: str) -> Chart:
    """R by chain against ``"xi"`` or ``"log_posterior_rank"``; the latter also with the last layer's rank."""
    of_xi = against == "xi"
    responses = _RATIOS if of_xi else _RATIOS | _LAST
    ticks = tuple(sorted(float(xi) for xi in table.xi.unique()))
    x = (
        Axis("ξ", "correlation length ξ (steps)", log=True, ticks=ticks)
        if of_xi
        else Axis("log-posterior rank", POSTERIOR)
    )
    panels = []
    for width, wide in table.groupby("width"):
        seeds = wide.seed.nunique()
        for response, y in responses.items():
            series, rules = _by_chain(wide, against, response), [Rule("R = 1", 1.0)]
            if response in _LAST:
                both = wide[[against, response]].to_numpy(float)
                ends = np.array([0.9 * both.min(), 1.1 * both.max()])
                series.append(Series("y = x", ends, ends, "ink", width=1.2, size=1))
                rules = []
                if "masked_isotropic" in wide:
                    rules = [Rule("isotropic, same n", float(wide.masked_isotropic.mean()), ":")]
            note = f"{seeds} seed{'s' if seeds > 1 else ''}"
            panels.append(Panel(x, y, f"width {width}", tuple(series), tuple(rules), note=note))
    captions = {
        True: ("R against ξ", "Points are runs (open: undertrained), lines means over the trained."),
        False: (
            "Against the posterior's rank",
            "The same R, and the rank it ends at, against the rank of the exact Bayes posterior.",
        ),
    }
    columns = len(responses)
    layout: dict[str, Any] = {"columns": columns, "size": _SIZE[columns], "legend": "right"}
    return Chart(*captions[of_xi], tuple(panels), shared="y" if of_xi else "", **layout)


def _by_chain(table: pd.DataFrame, against: str, response: str) -> list[Series]:
    """A point per run, open if undertrained; against ξ also the mean of the trained runs."""
    series, of_xi = [], against == "xi"
    for k, (chain, color) in enumerate(kind_colours(list(dict.fromkeys(table.chain))).items()):
        part = table[table.chain == chain]
        good = part.captured >= CAPTURED
        mean = part[good].groupby("xi")[response].mean()
        if of_xi and len(mean):
            x, y, dash = mean.index.to_numpy(float), mean.to_numpy(float), DASHES[k // 9 % len(DASHES)]
            facts = ("mean over trained seeds",)
            series.append(Series(chain, x, y, color, group=chain, dash=dash, facts=facts))
        for own, trained in ((part[good], True), (part[~good], False)):
            x, y = own[against].to_numpy(float), own[response].to_numpy(float)
            style: dict[str, Any] = {"group": chain, "marker": "o", "size": 3.0 if of_xi else 4.5}
            style |= {"faint": trained and of_xi, "open": not trained}
            texts = tuple(_run(row) for row in _records(own))
            series.append(Series(chain, x, y, color, line=False, texts=texts, **style))
    return series


def _run(row: dict[str, Any]) -> str:
    lines = [
        f"ξ {row['xi']:g}",
        f"width {row['width']}",
        f"seed {row['seed']}",
        f"captured {row['captured']:.3f}",
        f"R visible {row['visible_R']:.3f}, masked {row['masked_R']:.3f}",
    ]
    return "\n".join(lines)


def spacing_chart(study: Study) -> Chart:
    """Every measure of one network against the spacing of what it is shown."""
    data, xi = study.tables["table"], float(study.design["base"]["xi"][0])
    x = Axis("k", f"k: every k-th token shown (ξ = {xi:g}/k on the grid)", whole=True)
    panels = []
    for title, drawn in SPACING_PANELS:
        series, low = [], None
        for stage, arm, dash in SPACING_ARMS:
            part = data[(data.stage == stage) & (data.arm == arm)]
            for name, words, color in drawn:
                if stage != "trained" and name == "log_posterior_rank":
                    continue
                paint = color if stage == "trained" else (CONTROL if color == drawn[0][2] else LIGHT)
                label = f"{words}, {arm if stage == 'trained' else in_words(stage)}"
                curves = part.pivot_table(index="seed", columns="spacing", values=name, dropna=False)
                each = tuple(f"seed {seed}" for seed in curves.index)
                facts = (f"mean over {len(curves)} seeds",)
                style: dict[str, Any] = {"dash": dash, "each": each, "facts": facts, "width": 1.8}
                at, mean = curves.columns.to_numpy(float), curves.mean().to_numpy(float)
                series.append(Series(label, at, mean, paint, members=curves.to_numpy(float), **style))
        if title == SPACING_PANELS[-1][0] and "masked_isotropic" in data:
            expected, low = data.groupby("spacing").masked_isotropic.mean(), 0
            at, mean = expected.index.to_numpy(float), expected.to_numpy(float)
            series.append(Series("isotropic, same n", at, mean, "ink", dash=":", width=1.0, size=1))
        y, note = Axis(title.partition(":")[0], title, low=low), f"{data.seed.nunique()} seeds"
        panels.append(Panel(x, y, series=tuple(series), note=note))
    return Chart(
        "Against the spacing k",
        "Lines are means over seeds, points the seeds; grey is a stack trained on i.i.d. tokens.",
        tuple(panels),
        heading=f"One network trained at ξ = {xi:g}, probed at every ξ/k",
        columns=2,
        size=(5.6, 4),
    )


def observer_chart(study: Study) -> Chart:
    """CKA of layer and observer over the layer's largest, and the ridge, a panel per stage and ξ."""
    curves, ridges = study.tables["table"], study.tables["ridges"]
    panels = []
    for stage, xi in observer_cells(curves):
        grid, relative, place = observer_grid(curves, ridges, stage, xi)
        radius = ridges[(ridges.stage == stage) & (ridges.xi == xi)].groupby("layer").radius.mean()
        texts = [f"mean radius {w:.3g}" if math.isfinite(w) else "" for w in radius.reindex(grid.columns)]
        style: dict[str, Any] = {"halo": True, "size": 4.5, "marker": "o", "width": 1.6}
        at = np.arange(len(place), dtype=float)
        ridge = Series("ridge", at, place, "#FFFFFF", texts=tuple(texts), **style)
        count = curves[(curves.stage == stage) & (curves.xi == xi)].seed.nunique()
        cell = f"{in_words(stage)}, ξ = {xi:g}"
        panel = heat_panel(
            relative,
            name="CKA over the layer's largest",
            label="debiased CKA over the layer's largest",
            x=("layer", list(grid.columns)),
            y=("radius w of the observer", list(grid.index)),
            limits=(0.5, 1.0),
            facts=(cell, f"mean over {count} seeds", "masked rows, mean over positions"),
            above=[f"{value:.2f}" if math.isfinite(value) else "" for value in grid.max()],
            title=cell,
            note=f"{count} seed{'s' if count > 1 else ''}",
            series=(ridge,),
        )
        panels.append(panel)
    return Chart(
        "Layers against observers",
        "Debiased CKA of masked rows over the layer's largest, means over seeds; the line joins the smallest "
        "radius that reaches 99% of a layer's largest.",
        tuple(panels),
        heading="Layers against ideal observers (masked rows; above: the layer's largest CKA)",
        columns=4,
        size=(3.6, 4.2),
        shared="y",
        one_bar=True,
        legend="none",
    )
