"""The first screen of a page: what was measured, what came out and what it means, a sentence each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import xarray as xr

from rgfast.flow.probed import FALL, ViewFlow
from rgfast.flow.saved import VIEW
from rgfast.flow.stages import TRAINED_ON
from rgfast.probing.result import ProbeResult
from rgfast.report.definitions import number
from rgfast.report.extract import by_seed, mean_of, ratios_of, sorted_xi
from rgfast.report.markup import Markup, join, table, tag
from rgfast.report.parts import plain

__all__ = [
    "MEASURED",
    "deciding_view",
    "opening_of_probe",
    "opening_of_run",
    "terms_table",
    "verdict_badge",
    "words_of_view",
]

MEASURED = "effective rank and kernel drift of at least two layers"
# What the rows of a view are.
_VIEW_WORDS = {
    "visible": "the rows at each position whose token the model sees",
    "masked": "the rows at each position whose token is hidden",
    "position": "all rows at each position",
    "pooled": "the rows of all positions together",
    "mean_pooled": "each sequence's mean over positions",
    "flattened": "each whole sequence as one row",
}
_RANK = "effective rank, roughly the number of independent directions"
_MARKS = {"reproduced": "good", "valid": "good", "supported": "good", "partial": "part", "undecided": "part"}
_MARKS |= {"not reproduced": "bad", "undertrained": "bad", "refuted": "bad", "not supported": "bad"}
# What each finding states and what the paper reads in it, for who has not read the paper.
_FINDINGS = {
    "i": ("The rank falls with depth", "what is lost is what the task does not need"),
    "ii": ("It does so at the short ξ and not at the long one", "exactly what the task needs is kept"),
    "iii": ("One or two blocks make most of the change", "it is a step, then a plateau"),
}


def words_of_view(view: str) -> str:
    """What the rows of a view are."""
    return _VIEW_WORDS.get(view, f"the rows that rows= selects as {view!r}")


def verdict_badge(status: str) -> Markup:
    """The word of a verdict with its mark; color says nothing that the word does not."""
    return tag("span", status, class_=f"verdict {_MARKS.get(status, '')}".strip())


def terms_table(terms: Sequence[tuple[str, str]]) -> Markup:
    """The table of terms and what they mean."""
    rows = [(tag("b", term), meaning) for term, meaning in terms]
    return table(("term", "meaning"), rows, words=(1,), stack=True)


def deciding_view(result: xr.Dataset) -> str:
    """The view of a reproduction that decides what is as stated; the first of a result without it."""
    known = [str(view) for view in result.view.values]
    return VIEW if VIEW in known else known[0]


def opening_of_run(result: xr.Dataset, verdicts: dict[str, list[dict[str, Any]]], setup: str) -> list[Markup]:
    """Three paragraphs on a reproduction; the last two have a sentence per chain."""
    chains, xis = [str(chain) for chain in result.chain.values], sorted_xi(result)
    view, seeds = deciding_view(result), result.sizes["seed"]
    many = f"Residual networks of {result.sizes['layer'] - 1} blocks ({seeds} for each ξ)"
    memory = f"{' or '.join(f'{xi:g}' for xi in xis)} step{'' if xis == [1.0] else 's'}"
    measured = (
        f"{many} were trained to fill in hidden tokens of random sequences that forget their past within "
        f"about ξ = {memory}; after every block we took the {_RANK} that its output uses."
    )
    came: list[object] = []
    says: list[object] = []
    for chain in chains:
        name = f"{chain}: " if len(chains) > 1 else ""
        came.append(f"{name}{_came_out(result, chain, view)}")
        says += _says(verdicts.get(chain, []), name)
    if setup:
        says.append(tag("span", f"Every verdict holds {setup}.", class_="line"))
    return [
        _started("What was measured.", measured),
        _started("What came out.", *came),
        _started("What it says of the paper", "(arXiv 2606.10324).", *says),
    ]


def _started(title: str, *sentences: object) -> Markup:
    return join([tag("b", title), *(part for sentence in sentences for part in (" ", sentence))])


def _listed(words: Sequence[object]) -> Markup:
    """``a, b and c``."""
    parts: list[object] = []
    for k, word in enumerate(words):
        parts += ["" if not k else " and " if k == len(words) - 1 else ", ", word]
    return join(parts)


def _came_out(result: xr.Dataset, chain: str, view: str) -> str:
    xis, told = sorted_xi(result), []
    for xi in xis:
        _, curves = by_seed(result, "effective_rank", chain=chain, xi=xi, stage="trained", view=view)
        ratio, (first, *_, last) = _mean_ratio(result, chain, xi, "trained", view), mean_of(curves)
        if not math.isfinite(ratio):
            told.append(f"is undefined at ξ = {xi:g}")
            continue
        word = "fell" if ratio <= FALL else "rose" if ratio >= 1 / FALL else "changed little,"
        told.append(f"{word} from {number(first)} to {number(last)} at ξ = {xi:g} (ratio R = {ratio:.2f})")
    text = f"From the first to the last layer the rank {_listed(told)}"
    ratios = {words: _mean_ratio(result, chain, xis[0], stage, view) for stage, words in TRAINED_ON.items()}
    controls = [f"R = {ratio:.2f} ({words})" for words, ratio in ratios.items() if math.isfinite(ratio)]
    if controls:
        text += (
            f"; networks with nothing to learn, trained as long, reach {_listed(controls)} at ξ = {xis[0]:g}"
        )
    return f"{text}."


def _mean_ratio(result: xr.Dataset, chain: str, xi: float, stage: str, view: str) -> float:
    if stage not in result.stage.values:
        return math.nan
    good = [ratio for ratio in ratios_of(result, chain, xi, stage, view) if math.isfinite(ratio)]
    return sum(good) / len(good) if good else math.nan


def _says(verdicts: Sequence[dict[str, Any]], name: str) -> list[Markup]:
    """A line per finding: whether it is as stated, and whether its reading is supported."""
    known = {str(verdict["key"]): verdict for verdict in verdicts}
    lines = []
    for key, (stated, read) in _FINDINGS.items():
        if key in known:
            parts = [f"{name}({key}) {stated}: ", verdict_badge(known[key]["as_stated"]["status"])]
            if (reading := known[key]["reading"]) is not None:
                parts += [f"; that {read}: ", verdict_badge(reading["status"])]
            lines.append(tag("span", *parts, class_="line"))
    if not lines:
        return [tag("span", f"{name}no finding was judged.", class_="line")]
    if known.get("valid", {}).get("as_stated", {}).get("status") == "undertrained":
        missed = f"{name}not every network learned the task; those that did not are in no reading."
        lines.append(tag("span", missed, class_="line"))
    return lines


def opening_of_probe(result: ProbeResult) -> list[Markup]:
    """Three paragraphs on a probe."""
    head, *_ = repr(result).splitlines()
    what = head.removeprefix("ProbeResult of ")
    measured = (
        f"{what}: at every layer the {_RANK} that its activations use, and how far each block moves them."
    )
    if not {"effective_rank", "kernel_drift"} <= set(result.measures) or len(result.layers) < 2:
        measured = f"{what}: {_listed([plain(name) for name in result.measures])}."
        return [
            _started("What was measured.", measured),
            _started("What came out.", f"See the pictures and tables: findings need {MEASURED}."),
        ]
    flow = result.flow()
    return [
        _started("What was measured.", measured),
        _started("What came out.", _ranks(result, flow)),
        _started("What it means.", _means(result, flow)),
    ]


def _ranks(result: ProbeResult, flow: ViewFlow) -> Markup:
    rank, last = flow.rank, len(result.layers) - 1
    rows = f"Over {words_of_view(flow.view)} the effective rank "
    if not math.isfinite(rank.ratio):
        return join([rows, "is undefined: nothing varies there."])
    drop = "" if math.isnan(flow.error) else f", drop {number(rank.drop)} ± {number(flow.error)}"
    ends = (
        f": from {number(rank.first)} at layer {flow.first_layer} to {number(rank.last)} at layer {last} "
        f"(ratio R = {rank.ratio:.2f}{drop})"
    )
    others: dict[str, list[str]] = {}
    for view in result.views:
        if view != flow.view:
            others.setdefault(_verb(result.flow(view).word), []).append(plain(view))
    told = [
        f"it {verb} in the view{'s'[: len(views) > 1]} {_listed(views)}" for verb, views in others.items()
    ]
    rest = f"; {_listed(told)}" if told else ""
    return join([rows, tag("b", _verb(flow.word)), ends, rest, "."])


def _verb(word: str) -> str:
    return f"is {word}" if word in ("flat", "not measured") else word


def _means(result: ProbeResult, flow: ViewFlow) -> str:
    if control := result.dataset.attrs.get("control"):
        parts = [f"This is a control ({plain(str(control))}); flow(control=...) compares the model with it."]
    else:
        parts = [
            f"These ranks and the moves by block ({flow.shape}) are evidence of something learned only where "
            "a control (random weights, shuffled tokens) shows less of it: flow(control=...)."
        ]
    if result.sample_limited(flow.view):
        parts.append("There are too few rows for these ranks: compare with the isotropic baseline.")
    return " ".join(parts)
