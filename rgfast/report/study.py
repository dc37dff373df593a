"""The pages of the studies: what was found, the whole table, and the interactive figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from rgfast.flow.relevance import CAPTURED
from rgfast.flow.stages import in_words
from rgfast.report.definitions import number
from rgfast.report.markup import Markup, join, table, tag
from rgfast.report.openings import verdict_badge
from rgfast.report.page import Page, as_rows
from rgfast.report.setups_chart import gap_words, setups_chart
from rgfast.report.sources import Study
from rgfast.report.study_charts import multiverse_chart, observer_chart, ratio_chart, spacing_chart

__all__ = ["study_page"]


def study_page(study: Study) -> Page:
    """The whole page of a study."""
    page = _PAGES[study.kind](study)
    page.heading("Design")
    page.add(as_rows(study.design))
    page.heading("Provenance")
    page.add(as_rows({"study": study.kind, "folder": study.folder.name, "points": _points(study)}))
    return page


def _points(study: Study) -> int:
    found = (study.folder / "points").glob("*.json")
    return sum(1 for path in found if not path.name.startswith("."))  # those are half-written


def _interval(part: Mapping[str, Any]) -> str:
    ends = (part.get("low"), part.get("high"))
    if not part.get("n"):
        return "undefined"
    if any(end is None or not math.isfinite(end) for end in ends):
        return f"{number(part['mean'])} (n = {part['n']}, no interval below five seeds)"
    return f"{number(part['mean'])} [{number(ends[0])}, {number(ends[1])}]"


def _whole(data: pd.DataFrame, caption: str) -> Markup:
    rows = ([_value(value) for value in row] for row in data.itertuples(index=False))
    return tag("details", tag("summary", caption), table(list(data.columns), rows))


def _value(value: Any) -> object:
    if isinstance(value, str):
        return in_words(value)
    return number(value) if isinstance(value, float) else value


def _multiverse(study: Study) -> Page:
    found, data = study.summary, study.tables["table"]
    trained = data[data.trained]
    lead = (
        f"Every finding in {len(data)} set-ups, {len(trained)} of them trained (captured ≥ {CAPTURED:g} at "
        f"both ξ). Intervals are over {found['intervals_over']}."
    )
    if found["intervals_over"] == "sequences":
        lead += " They come from one seed per set-up and say nothing about other seeds."
    page = Page("rgfast: multiverse report", lead)
    effects = [name for name, part in found.items() if isinstance(part, dict)]
    page.charts("Specification curves", [multiverse_chart(study)])
    page.heading("Robustness")
    heads = ("effect", "bar", "reach it", "interval above 0", "median", "range", "default set-up")
    rows = [_effect(found[name], len(trained)) for name in effects]
    page.add(table(heads, rows, caption="Each finding's effect over the trained set-ups."))
    options = list(dict.fromkeys(option for name in effects for option in found[name]["option_moves_it_by"]))
    moved = [(found[name]["what"], *_moves(found[name], options)) for name in effects]
    caption = "What each choice moves the effect by, against that of the default set-up."
    page.add(table(("effect", *options), moved, caption=caption))
    page.add(table(*_by_view(study.tables["views"]), caption="Views and rank definitions cost no training."))
    page.add(_whole(data, f"All {len(data)} set-ups"))
    return page


def _effect(part: dict[str, Any], trained: int) -> tuple[object, ...]:
    above = part["interval_above_zero"]
    reach = f"{part['reaches_bar']} of {trained}"
    sure = "no intervals" if above is None else f"{above} of {trained}"
    spread = f"{number(part['lowest'])} to {number(part['highest'])}"
    middle = (number(part["bar"]), reach, sure, number(part["median"]), spread)
    return (part["what"], *middle, number(part["default"]))


def _moves(part: dict[str, Any], options: Sequence[str]) -> list[str]:
    moved = part["option_moves_it_by"]
    return [
        ", ".join(f"{value}: {number(by)}" for value, by in moved.get(option, {}).items())
        for option in options
    ]


def _by_view(views: pd.DataFrame) -> tuple[Sequence[str], list[tuple[object, ...]]]:
    rows: list[tuple[object, ...]] = []
    for (measure, view), part in views[views.trained].groupby(["measure", "view"], sort=False):
        gap = part.R_long - part.R_short
        names = (str(measure).replace("_", " "), str(view).replace("_", " "))
        medians = (number(float(part.R_short.median())), number(float(part.R_long.median())))
        rows.append((*names, *medians, f"{int((gap > 0).sum())} of {len(part)}"))
    return ("rank", "rows", "R short, median", "R long, median", "R long > R short in"), rows


def _sweep(study: Study) -> Page:
    data, found = study.tables["table"], study.summary
    trained = data[data.captured >= CAPTURED]
    lead = (
        f"A grid of chain, ξ, width and seed: {len(trained)} of {len(data)} points trained (captured ≥ "
        f"{CAPTURED:g})."
    )
    page = Page("rgfast: sweep report", lead)
    page.charts("Figures", [ratio_chart(data, against) for against in ("xi", "log_posterior_rank")])
    if found:
        page.heading("Verdict")
        claim = (
            "On masked rows, the effective rank of the last layer is that of the centred log-posterior: y "
            "= x, nothing fitted. Refuted where a rival with a fitted line errs no more on cells left out, "
            "or where the final rank grows as the square root of the width or faster; undecided where the "
            "difference is within its interval."
        )
        width = found["width_exponent"]
        exponent = (
            f"exponent of the final rank in the width: {number(width[0])} [{number(width[1])}, "
            f"{number(width[2])}]"
        )
        rows = [
            (verdict_badge(found["status"]), join((tag("b", found["reason"]), tag("p", exponent))), claim)
        ]
        page.add(table(("verdict", "numbers", "what is claimed"), rows, words=(1, 2)))
        predictors = [_predictor(p) for p in found["predictors"]]
        heads = ("predictor", "width", "error in ln rank", "minus that of y = x", "Spearman")
        page.add(table(heads, predictors, caption="Predictors of the final rank, on the cell left out."))
    page.heading("Robustness")
    groups = trained.groupby(["chain", "xi", "width"], sort=False)
    cells = [(chain, f"{xi:g}", width, len(part), *_cell(part)) for (chain, xi, width), part in groups]
    names = ("chain", "ξ", "width", "seeds", "R visible", "R masked", "last layer, masked", "log-posterior")
    page.add(table(names, cells, caption="Every cell: means over trained seeds (smallest to largest)."))
    page.add(_whole(data, f"All {len(data)} points"))
    return page


def _predictor(p: dict[str, Any]) -> tuple[object, ...]:
    excess = f"{number(p['excess'])} [{number(p['excess_low'])}, {number(p['excess_high'])}]"
    order = f"{number(p['spearman'])} [{number(p['spearman_low'])}, {number(p['spearman_high'])}]"
    return (p["name"], p["width"], number(p["error"]), excess, order)


def _cell(part: pd.DataFrame) -> list[str]:
    ranges = [
        f"{number(part[name].mean())} ({number(part[name].min())} to {number(part[name].max())})"
        for name in ("visible_R", "masked_R")
    ]
    return [*ranges, number(part.masked_last.mean()), number(part.log_posterior_rank.mean())]


def _decimation(study: Study) -> Page:
    data, slopes = study.tables["table"], study.summary.get("slopes_against_ln_k", {})
    xi = study.design["base"]["xi"][0]
    lead = (
        f"One network trained at ξ = {xi:g}, shown only every k-th token (grid: the task is the chain at "
        "ξ/k) or as many side by side (block: the task stays). Same weights: what changes with k is "
        "demanded by the input."
    )
    page = Page("rgfast: decimation report", lead)
    page.charts("Figures", [spacing_chart(study)])
    page.heading("Robustness")
    measures = list(dict.fromkeys(name for each in slopes.values() for name in each))
    rows = [
        (name.replace("_", " "), *(_interval(each[name]) for each in slopes.values())) for name in measures
    ]
    caption = (
        "Slope against ln k, with 95% t-intervals over seeds; difference: grid minus block, paired by seed."
    )
    page.add(table(("measure", *slopes), rows, caption=caption))
    page.add(_whole(data, f"All {len(data)} rows"))
    return page


def _observer(study: Study) -> Page:
    data, slopes = study.tables["table"], study.tables["slopes"]
    lead = (
        "Every layer against ideal observers who know the exact posterior from the tokens within a radius "
        "w. If depth is scale, the radius a layer is most like grows with it."
    )
    page = Page("rgfast: observer report", lead)
    page.charts("Figures", [observer_chart(study)])
    page.heading("Robustness")
    records = [{str(key): value for key, value in row.items()} for row in slopes.to_dict("records")]
    rows = [(in_words(str(row["stage"])), f"{row['xi']:g}", _interval(row), int(row["n"])) for row in records]
    caption = "Slope of ln w against the layer, with 95% t-intervals over seeds."
    page.add(table(("stage", "ξ", "slope per layer", "seeds"), rows, caption=caption))
    learnt = study.summary.get("captured", {})
    page.add(table(("run", "captured"), [(name, number(value)) for name, value in learnt.items()]))
    means = data.groupby(["stage", "xi", "layer", "radius"], sort=False).cka.mean().reset_index()
    page.add(_whole(means, "All means over seeds"))
    return page


_STATED = {
    "neighbors": "rows depend on their neighbors",
    "lifted": "first block lifts the rank above V",
    "i": "(i) falls at the short ξ after training",
    "ii": "(ii) not at the long ξ",
    "iii": "(iii) drift in one or two transitions",
}


def _setups(study: Study) -> Page:
    arms, data = study.summary["arms"], study.tables["table"]
    missing = sum(arm["missing"] for arm in arms)
    at = " and ".join(f"{xi:g}" for xi in study.design["xi"])
    lead = (
        f"Set-ups that the papers may have had: {len(data)} runs at ξ = {at}"
        f"{f', {missing} more not run yet' if missing else ''}. Without mixing across positions a stack sees "
        "its own token alone: captured is at most 0, masked rows are all alike, and the rank at a position "
        "is at most V."
    )
    page = Page("rgfast: set-ups report", lead)
    page.charts("Figures", [setups_chart(study)])
    page.heading("What holds together")
    labels, names = [f"{arm['part']}) {arm['arm']}" for arm in arms], list(arms[0]["gaps"])
    rows = [
        (label, len(arm["seeds"]), arm["missing"], *(_badge(arm, name) for name in _STATED))
        for label, arm in zip(labels, arms, strict=True)
    ]
    caption = "Every set-up by the same rules, fixed before the runs."
    page.add(table(("set-up", "seeds", "runs missing", *_STATED.values()), rows, caption=caption))
    gaps = [
        (label, *(gap_words(arm["gaps"][name]) for name in names))
        for label, arm in zip(labels, arms, strict=True)
    ]
    caption = "R_long − R_short by rows and centering, with paired 95% t-intervals over seeds (from five on)."
    page.add(table(("set-up", *names), gaps, caption=caption))
    told = [
        (label, _STATED.get(name, "the gap is 0: an exact null"), _badge(arm, name), answer["summary"])
        for label, arm in zip(labels, arms, strict=True)
        for name, answer in arm["answers"].items()
    ]
    page.add(table(("set-up", "statement", "verdict", "numbers"), told, words=(1, 3)))
    page.add(_whole(data, f"All {len(data)} runs"))
    return page


def _badge(arm: Mapping[str, Any], statement: str) -> Markup:
    return verdict_badge(arm["answers"][statement]["status"])


_PAGES = {
    "multiverse": _multiverse,
    "sweep": _sweep,
    "decimation": _decimation,
    "observer": _observer,
    "setups": _setups,
}
