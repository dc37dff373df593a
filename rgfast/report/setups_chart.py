"""The chart of the study of set-ups: rank by layer, a panel per arm, and the gap in every convention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from rgfast.report.palette import kind_colours, xi_colours
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
    mean, *ends = (f"{end:+.3f}".replace("-", "−") for end in (gap["mean"], *_ends(gap)))
    return f"{mean} [{', '.join(ends)}]" if ends else f"{mean} (n = {gap['n']})"


def _ends(gap: dict[str, Any]) -> list[float]:
    """Both ends of the interval, or none below five seeds."""
    ends = [gap.get("low"), gap.get("high")]
    return [float(end) for end in ends if end is not None and np.isfinite(end)]


def setups_chart(study: Study) -> Chart:
    """Effective rank at a position by layer, for every arm with a finished run; gaps of those with pairs."""
    curves, panels = study.tables["curves"], []
    states = float(study.tables["table"]["states"].iloc[0])
    drawn = {view for _, view, *_ in _DRAWN}
    ranks = curves[(curves.measure == "effective_rank") & curves["view"].isin(drawn)]
    # One scale, on which a rank of 0 lies off the axis.
    y = Axis("effective rank", low=-0.8, high=1.05 * max(states, float(ranks.value.max())))
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
        rule = Rule(f"V = {states:g}", states, ":")
        panels.append(Panel(Axis("layer", whole=True), y, title, tuple(series), (rule,), note=note))
    panels += _gaps(study)
    return Chart(
        "Effective rank by layer and set-up",
        "Lines are means over seeds, points the seeds. Masked rows start at layer 1. Without mixing, a "
        "masked rank above 0 and a rank above V are both impossible. The last panel has the gap for "
        "other rows and without centering, with 95% paired intervals from five seeds on.",
        tuple(panels),
        heading="Effective rank by layer and set-up",
        columns=2,
        size=(5.8, 3.6),
        legend="right",
    )


def _gaps(study: Study) -> list[Panel]:
    """The gap by convention, for the arms with a seed at both ξ."""
    arms = [arm for arm in study.summary["arms"] if arm["gaps"]["position"]["n"]]
    if not arms:
        return []
    short, long = study.design["xi"]
    rows = list(dict.fromkeys(name.partition(",")[0] for name in arms[0]["gaps"]))
    colours = kind_colours([arm["arm"] for arm in study.summary["arms"]])
    series = []
    for k, arm in enumerate(arms):
        for raw in (False, True):
            found = {n.partition(",")[0]: gap for n, gap in arm["gaps"].items() if ("uncentered" in n) == raw}
            ends = np.array([_ends(gap) for gap in found.values()])
            style: dict[str, Any] = {
                "low": ends[:, 0] if ends.size else None,
                "high": ends[:, 1] if ends.size else None,
                "spread": "95% interval",
                "line": False,
                "marker": "os^DvP"[k % 6],
                "open": raw,
                "facts": (f"{arm['gaps']['position']['n']} seeds",),
            }
            place = 0.1 * (k - (len(arms) - 1) / 2) + (0.03 if raw else -0.03)
            x = np.array([rows.index(name) + place for name in found])
            y = np.array([gap["mean"] for gap in found.values()])
            name = f"{arm['part']}) {arm['arm']}{', uncentered' if raw else ''}"
            series.append(Series(name, x, y, colours[arm["arm"]], **style))
    x_axis, y_axis = Axis("rows", labels=tuple(rows)), Axis("gap", f"R({long:g}) − R({short:g})")
    return [Panel(x_axis, y_axis, "The gap in R by rows and centering", tuple(series), (Rule("", 0.0),))]


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
