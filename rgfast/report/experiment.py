"""The page of a reproduction: verdicts with their definitions, robustness, figures, configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from rgfast.flow import Check, Interval, paired_interval
from rgfast.flow.stages import in_words
from rgfast.report.definitions import HINT, TERMS, definition, interval_text, missed, number, numbers_of
from rgfast.report.experiment_charts import experiment_charts, rank_chart
from rgfast.report.extract import ratios_of, sorted_xi
from rgfast.report.markup import Markup, bullets, join, table, tag
from rgfast.report.openings import deciding_view, opening_of_run, terms_table, verdict_badge
from rgfast.report.page import Page, as_rows
from rgfast.report.sources import Experiment
from rgfast.report.spec import Chart

__all__ = ["experiment_page"]

_RANKS = ("effective_rank", "effective_rank_variance", "participation_ratio", "stable_rank")


def experiment_page(source: Experiment) -> Page:
    """The whole page of a reproduction."""
    data, verdicts = source.dataset, source.verdicts
    chains, xis = [str(chain) for chain in data.chain.values], sorted_xi(data)
    seeds = [int(seed) for seed in data.seed.values]
    page = Page("rgfast: reproduction report", *opening_of_run(data, verdicts, source.setup))
    several = len(chains) > 1
    for chain in chains:
        page.chart(_first_chart(data, chain, several=several))
    page.add(tag("p", HINT, class_="faint"))
    setup = (
        f"Chain {', '.join(chains)}; ξ = {', '.join(f'{xi:g}' for xi in xis)}; seeds "
        f"{', '.join(map(str, seeds))}; {data.sizes['layer']} layers. Masked-token stacks on Markov chains, "
        "probed at every layer and position (the experiment of arXiv 2606.10324)."
    )
    page.add(tag("p", setup, class_="faint"))
    page.heading("Terms")
    page.add(terms_table(TERMS))
    if source.rejudged:
        words = "verdict.json is that of rgfast 0.1; the findings below are judged anew from result.nc."
        page.add(tag("p", words))
    few = len(seeds) < 5
    told = (
        "mean (smallest to largest seed); 95% intervals are given from five seeds on"
        if few
        else "mean [95% paired t-interval over seeds]"
    )
    for chain in chains:
        name = f", {chain}" if several else ""
        page.heading(f"Verdicts{name}")
        page.add(_verdicts(verdicts.get(chain, []), f"Numbers: {told}."))
        page.heading(f"Robustness{name}")
        page.add(_controls(data, chain, told), _views(data, chain, told), _seeds(data, chain))
        page.charts(f"Figures{name}", experiment_charts(data, chain))
    page.heading("Configuration")
    page.add(as_rows(source.config) if source.config else tag("p", "The result holds none."))
    page.heading("Provenance")
    origin: dict[str, Any] = {"format": data.attrs.get("format", "unknown"), **source.versions}
    page.add(as_rows(origin))
    return page


def _first_chart(data: xr.Dataset, chain: str, *, several: bool) -> Chart:
    """The picture of the first screen: the effective rank by layer in the view that decides."""
    title = f"Does the effective rank fall with depth?{f' ({chain})' if several else ''}"
    return replace(rank_chart(data, chain, [deciding_view(data)]), title=title)


def _verdicts(verdicts: Sequence[dict[str, Any]], caption: str) -> Markup:
    rows = []
    for verdict in verdicts:
        numbers = [
            f"{name}: {interval_text(found, values)}, n\u00a0=\u00a0{found.n}"
            for name, found, values in numbers_of(verdict)
        ]
        finding = [tag("b", verdict["title"])]
        if verdict["reading"] is None:
            finding.append(_answer("", verdict["as_stated"]))
        else:
            finding.append(_answer("As stated", verdict["as_stated"]))
            finding.append(_answer("Its reading", verdict["reading"]))
        if verdict["beside"]:
            finding.append(tag("p", f"Other views. {verdict['beside']}"))
        finding.append(bullets([f"note: {in_words(text)}" for text in verdict["notes"]]))
        folded = tag("details", tag("summary", f"{len(numbers)} numbers over seeds"), bullets(numbers))
        rows.append((join(finding), folded if numbers else "", definition(str(verdict["key"]))))
    heads = ("finding", "numbers and intervals", "what is asked")
    return table(heads, rows, caption=caption, words=(0, 1, 2), stack=True)


def _answer(name: str, answer: dict[str, Any]) -> Markup:
    checks = [Check(**{**check, "value": _float(check["value"])}) for check in answer["checks"]]
    failed = missed(checks) if answer["status"] in ("partial", "not reproduced", "undertrained") else []
    claim = f" “{answer['claim']}”" if answer["claim"] else ""
    line = tag(
        "p",
        f"{name}{claim}: " if name else "",
        verdict_badge(str(answer["status"])),
        f" {in_words(answer['summary'])}",
    )
    parts = [line, bullets([f"missed, {text}" for text in failed])]
    return join([*parts, _checks(checks)] if checks else parts)


def _checks(checks: Sequence[Check]) -> Markup:
    rows = [
        (
            in_words(c.name),
            "all" if c.seed is None else c.seed,
            number(c.value),
            c.bar,
            "holds" if c.holds else "fails",
        )
        for c in checks
    ]
    held = sum(c.holds for c in checks)
    summary = tag("summary", f"{held} of {len(checks)} checks hold")
    return tag("details", summary, table(("check", "seed", "value", "wanted", ""), rows))


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _told(values: Sequence[float]) -> str:
    good = [value for value in values if math.isfinite(value)]
    found = paired_interval(good) if good else Interval(math.nan, math.nan, math.nan, 0)
    return interval_text(found, good)


def _controls(data: xr.Dataset, chain: str, told: str) -> Markup:
    rows = []
    for stage in (str(name) for name in data.stage.values):
        for view in ("visible", "masked"):
            cells = [_told(ratios_of(data, chain, xi, stage, view)) for xi in sorted_xi(data)]
            rows.append((in_words(stage), view, *cells))
    heads = ("stage", "rows", *(f"R at ξ = {xi:g}" for xi in sorted_xi(data)))
    return table(heads, rows, caption=f"Controls: R of the effective rank, {told}; masked rows from layer 1.")


def _views(data: xr.Dataset, chain: str, told: str) -> Markup:
    xis, rows = sorted_xi(data), []
    for measure in (name for name in _RANKS if name in data):
        for view in (str(name) for name in data.view.values):
            each = [ratios_of(data, chain, xi, "trained", view, measure) for xi in xis]
            limited = "sample_limited" in data and bool(data.sample_limited.sel(view=view))
            cells = [_told(values) for values in each]
            if len(xis) > 1:
                cells.append(_told(list(np.subtract(each[-1], each[0]))))
            rows.append(
                (
                    measure.replace("_", " "),
                    view.replace("_", " ") + (" (sample limited)" if limited else ""),
                    *cells,
                )
            )
    heads = ["rank", "rows", *(f"R at ξ = {xi:g}" for xi in xis)]
    heads += ["R long − R short"] if len(xis) > 1 else []
    return table(
        heads,
        rows,
        caption=f"Views and rank definitions: R of the trained stacks, {told}; masked rows from layer 1.",
    )


def _seeds(data: xr.Dataset, chain: str) -> Markup:
    rows = []
    for seed in (int(s) for s in data.seed.values):
        own = data.sel(seed=[seed])
        captured = own.captured.sel(chain=chain, stage="trained", seed=seed)
        row: list[object] = [seed]
        for xi in sorted_xi(data):
            row.append(number(float(captured.sel(xi=xi))))
            row += [number(ratios_of(own, chain, xi, "trained", view)[0]) for view in ("visible", "masked")]
        rows.append(row)
    heads = ["seed"]
    for xi in sorted_xi(data):
        heads += [f"captured, ξ = {xi:g}", f"R visible, ξ = {xi:g}", f"R masked, ξ = {xi:g}"]
    return table(heads, rows, caption="Seeds: every trained run.")
