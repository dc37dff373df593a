"""The chart of the study of set-ups: rank by layer, a panel per arm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from rgfast.report.definitions import number
from rgfast.report.palette import xi_colours
from rgfast.report.sources import Study
from rgfast.report.spec import Axis, Chart, Panel, Rule, Series

__all__ = ["gap_words", "setups_chart"]

# Stage, rows at a fixed position, words, dash.
_DRAWN = (
    ("trained", "position", "all rows", "-"),
    ("trained", "masked", "masked rows", "--"),
    ("untrained", "position", "untrained, all rows", ":"),
)


def gap_words(gap: dict[str, Any]) -> str:
    """A gap R_long − R_short with its interval, in words."""
    if not gap.get("n"):
        return "no seed with both ξ yet"
    sign = "+" if gap["mean"] >= 0 else "−"
    words = f"{sign}{abs(gap['mean']):.3f}"
    if gap.get("low") is None or not np.isfinite(gap["low"]):
        return f"{words} (n = {gap['n']})"
    return f"{words} [{number(gap['low'])}, {number(gap['high'])}]"


def setups_chart(study: Study) -> Chart:
    """Effective rank at a fixed position by layer, for every arm with a finished run."""
    curves, panels = study.tables["curves"], []
    states = float(study.tables["table"]["states"].iloc[0])
    ranks = curves[curves.measure == "effective_rank"]
    short, long = study.design["xi"]
    colours = xi_colours((short, long))
    for arm in study.summary["arms"]:
        own = ranks[ranks.arm == arm["arm"]]
        if own.empty:
            continue
        series = [
            _series(part, f"ξ = {xi:g}, {words}", color, dash)
            for xi, color in colours.items()
            for stage, view, words, dash in _DRAWN
            if len(part := own[(own.xi == xi) & (own.stage == stage) & (own.view == view)])
        ]
        title = (
            f"{arm['part']}) {arm['arm']}\nR({long:g}) − R({short:g}) = {gap_words(arm['gaps']['position'])}"
        )
        count = own.groupby("xi").seed.nunique()
        note = f"seeds: {', '.join(f'{n} at ξ = {xi:g}' for xi, n in count.items())}"
        x, y = Axis("layer", whole=True), Axis("effective rank", low=0)
        rule = Rule(f"V = {states:g}", states, ":")
        panels.append(Panel(x, y, title, tuple(series), (rule,), note=note))
    return Chart(
        "Effective rank by layer and set-up",
        "Lines are means over seeds, points the seeds. Masked rows start at layer 1. Without mixing, a "
        "masked rank above 0 and a rank above V are both impossible.",
        tuple(panels),
        heading="Effective rank by layer in the set-ups that the papers may have had",
        columns=2,
        size=(5.8, 3.6),
        shared="y",
        legend="right",
    )


def _series(part: pd.DataFrame, name: str, color: str, dash: str) -> Series:
    """The mean curve over seeds, and the seeds."""
    wide = part.pivot_table(index="seed", columns="layer", values="value", dropna=False)
    if (part["view"] == "masked").all():
        wide = wide.loc[:, wide.columns > 0]
    each = tuple(f"seed {seed}" for seed in wide.index)
    style: dict[str, Any] = {
        "each": each,
        "facts": (f"mean over {len(wide)} seeds",),
        "dash": dash,
        "size": 2.5,
    }
    values = wide.to_numpy(float)
    return Series(name, wide.columns.to_numpy(float), values.mean(0), color, members=values, **style)
