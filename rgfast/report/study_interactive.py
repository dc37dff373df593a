"""The interactive figures of the studies, as what ``page.js`` draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from rgfast.flow.relevance import CAPTURED
from rgfast.report.extract import SPACING_ARMS, SPACING_PANELS, observer_cells, observer_grid
from rgfast.report.interactive import DASHES, Panel, dots, heat_panel, line
from rgfast.report.palette import CONTROL, LIGHT, MARKED, kind_colours
from rgfast.report.sources import Study

__all__ = ["multiverse_panels", "observer_panels", "ratio_panels", "spacing_panels"]

FOR_XI = {"name": "ξ", "label": "correlation length ξ (steps)", "log": True}
FOR_RANK = {"name": "log-posterior rank", "label": "effective rank of the centred log-posterior"}


def multiverse_panels(study: Study) -> list[Panel]:
    """A specification curve an effect."""
    data = study.tables["table"]
    trained, options = data[data.trained], [name for name, _ in study.design["options"]]
    panels = []
    for name, part in study.summary.items():
        if not isinstance(part, dict):
            continue
        ordered = trained.sort_values(name, ignore_index=True)
        series = []
        for label, default, style in (
            ("set-up", False, {"colour": CONTROL, "size": 2.8}),
            ("default set-up", True, {"colour": MARKED, "size": 5, "shape": "diamond"}),
        ):
            own = ordered[ordered["default"] == default]
            points = [_specification(place, row, name, options) for place, row in _records(own)]
            series.append({"name": label, "points": points, "spread": "95% interval", **style})
        rules = [{"name": "0", "y": 0.0}]
        if part["bar"]:
            rules.append({"name": "bar", "y": part["bar"], "dash": "2 4"})
        label = f"{len(ordered)} of {len(data)} set-ups (trained), sorted"
        x, y = {"name": "place", "label": label, "whole": True}, {"name": "effect", "label": "effect"}
        panels.append({"title": part["what"], "x": x, "y": y, "series": series, "rules": rules})
    return panels


def _records(table: pd.DataFrame) -> list[tuple[int, dict[str, Any]]]:
    rows = [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
    return list(zip([int(k) for k in table.index], rows, strict=True))


def _specification(place: int, row: dict[str, Any], name: str, options: Sequence[str]) -> list[Any]:
    told = [f"{option}: {row[option]}" for option in options]
    told.append(f"captured {min(row['captured_short'], row['captured_long']):.3f}")
    return [place, row[name], row[f"{name}_low"], row[f"{name}_high"], "\n".join(told)]


def ratio_panels(study: Study, against: str) -> list[Panel]:
    """R by chain against ξ or the posterior's rank; against the rank also the rank of the last layer."""
    data = study.tables["table"]
    responses = {"visible_R": "R, visible rows", "masked_R": "R, masked rows"}
    axis: dict[str, Any] = {**FOR_XI, "ticks": sorted(float(xi) for xi in data.xi.unique())}
    if against != "xi":
        responses["masked_last"] = "effective rank of the last layer, masked rows"
        axis = FOR_RANK
    panels = []
    for width, wide in data.groupby("width"):
        for response, label in responses.items():
            series, rules = _by_chain(wide, against, response), [{"name": "R = 1", "y": 1.0}]
            if response == "masked_last":
                both = wide[[against, response]].to_numpy(float)
                ends = [float(both.min()), float(both.max())]
                series.append(line("y = x", ends, ends, "ink", width=1.2, size=1))
                rules = []
                if "masked_isotropic" in wide:
                    expected = float(wide.masked_isotropic.mean())
                    rules = [{"name": "isotropic, same n", "y": expected, "dash": "2 4"}]
            y = {"name": label.partition(",")[0], "label": label}
            panels.append({"title": f"width {width}", "x": axis, "y": y, "series": series, "rules": rules})
    return panels


def _by_chain(table: pd.DataFrame, against: str, response: str) -> list[dict[str, Any]]:
    """A point a run, open where undertrained; against ξ also the mean of the trained."""
    series = []
    for chain, colour in kind_colours(list(dict.fromkeys(table.chain))).items():
        part = table[table.chain == chain]
        good = part.captured >= CAPTURED
        mean = part[good].groupby("xi")[response].mean()
        if against == "xi" and len(mean):
            facts = ["mean over trained seeds"]
            series.append(line(chain, mean.index, mean, colour, group=chain, facts=facts))
        for own, style in ((part[good], {"faint": against == "xi"}), (part[~good], {"open": True})):
            texts = [_run(row) for _, row in _records(own)]
            series.append(dots(chain, own[against], own[response], colour, texts, group=chain, **style))
    return series


def _run(row: dict[str, Any]) -> str:
    told = [
        f"ξ {row['xi']:g}",
        f"width {row['width']}",
        f"seed {row['seed']}",
        f"captured {row['captured']:.3f}",
    ]
    return "\n".join([*told, f"R visible {row['visible_R']:.3f}, masked {row['masked_R']:.3f}"])


def spacing_panels(study: Study) -> list[Panel]:
    """Every measure of one network against the spacing of what it is shown."""
    data = study.tables["table"]
    panels = []
    for title, drawn in SPACING_PANELS:
        series: list[dict[str, Any]] = []
        for stage, arm, dash in SPACING_ARMS:
            part = data[(data.stage == stage) & (data.arm == arm)]
            for name, words, colour in drawn:
                if stage != "trained" and name == "log_posterior_rank":
                    continue
                paint = colour if stage == "trained" else (CONTROL if colour == drawn[0][2] else LIGHT)
                label = f"{words}, {arm if stage == 'trained' else 'i.i.d. control'}"
                mean = part.groupby("spacing")[name].mean()
                facts = [f"mean over {part.seed.nunique()} seeds"]
                series.append(line(label, mean.index, mean, paint, dash=DASHES[dash], facts=facts))
                texts = [f"seed {seed}" for seed in part.seed]
                series.append(dots(label, part.spacing, part[name], paint, texts, faint=True))
        x = {"name": "k", "label": "k: every k-th token shown", "whole": True}
        panels.append(
            {"title": title, "x": x, "y": {"name": title.partition(":")[0], "label": title}, "series": series}
        )
    return panels


def observer_panels(study: Study) -> list[Panel]:
    """CKA of layer and observer over the layer's largest, and the ridge, by stage and ξ."""
    curves, ridges = study.tables["table"], study.tables["ridges"]
    panels = []
    for stage, xi in observer_cells(curves):
        grid, relative, place = observer_grid(curves, ridges, stage, xi)
        radius = ridges[(ridges.stage == stage) & (ridges.xi == xi)].groupby("layer").radius.mean()
        texts = [f"mean radius {w:.3g}" if math.isfinite(w) else "" for w in radius.reindex(grid.columns)]
        points = [
            [float(k), float(y), None, None, text]
            for k, (y, text) in enumerate(zip(place, texts, strict=True))
        ]
        ridge = {
            "name": "ridge",
            "colour": "#FFFFFF",
            "halo": True,
            "line": True,
            "points": points,
            "size": 4.5,
        }
        count = curves[(curves.stage == stage) & (curves.xi == xi)].seed.nunique()
        axes: dict[str, Any] = {"x": ("layer", list(grid.columns)), "y": ("radius w", list(grid.index))}
        cell, name = f"{stage}, ξ = {xi:g}", "CKA over the layer's largest"
        facts = [cell, f"mean over {count} seeds", "masked rows, mean over positions"]
        more: dict[str, Any] = {"limits": (0.5, 1.0), "facts": facts, "series": [ridge], **axes}
        panels.append(heat_panel(relative, title=cell, name=name, **more))
    return panels
