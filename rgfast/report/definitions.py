"""What each verdict asks, in words, and the numbers with intervals that it rests on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rgfast.flow import Check, Interval, Thresholds, paired_interval
from rgfast.flow.stages import in_words

__all__ = ["HINT", "PROBE_TERMS", "TERMS", "definition", "interval_text", "missed", "number", "numbers_of"]

_BARS = Thresholds()

HINT = (
    "Point at a value, touch it, or step through with the arrow keys; names in a legend switch their "
    "curves off and on."
)

TERMS = (
    ("effective rank", "exp of the entropy of the normalised singular values (Roy and Vetterli 2007) of "
                       "the residual "
     "stream X_l[:, t, :], centred over samples, averaged over positions t"),
    ("R", "effective rank of the last layer over that of the first"),
    ("position", "all rows at each position, their token seen or hidden; decides what is as stated"),
    ("visible, masked", "rows whose token the model sees at t, from the input on (what the stack forgets); "
                        "rows whose "
     "token is hidden at t, from layer 1 on (what it infers; at the input they are constant)"),
    ("kernel drift", "1 − linear CKA between neighbouring layers, by position, averaged"),
    ("captured", "1 − E[KL(posterior‖model)] / E[KL(posterior‖π)] at hidden positions, with the exact "
                 "Bayes posterior: "
     "0 for knowing the stationary distribution π alone, 1 for Bayes"),
    ("correlation length ξ", "−1/ln|λ₂| of the chain's transition matrix, in steps"),
    ("as stated, its reading", "whether the numbers are those that the paper states, and whether they mean "
     "what it reads there"),
    ("trained controls", "stacks trained equally long on i.i.d. tokens (control_iid in the files) and on "
     "targets permuted across the batch (control_permuted): the same start, nothing to learn but "
     "frequencies"),
)  # fmt: skip

PROBE_TERMS = (
    (
        "effective rank",
        "exp of the entropy of the normalized singular values (Roy and Vetterli 2007) of a layer's rows, "
        "centered over samples: 1 for rows on a line, the width for rows that vary alike in all directions",
    ),
    ("R", "effective rank of the last layer over that of the first that has one"),
    ("view", "which rows a value is of (below); n is how many, at each position where there are positions"),
    (
        "kernel drift",
        "1 − linear CKA between neighboring layers: 0 if a block only rotates and scales the rows",
    ),
    ("transition", "the step from a layer to the next"),
    ("isotropic, same n", "what Gaussian rows of the same number and width, alike in all directions, give"),
    ("±", "one jackknife standard error over groups of sequences; none without groups"),
)

_FALL = (
    f"As stated: R ≤ {_BARS.short_ratio:g} for every seed, and no upward step of the mean curve beyond "
    f"{100 * _BARS.rise:g}% of its drop. Partial: mean R ≤ {_BARS.short_ratio:g}."
)
_MODES = (
    "D = (R² fast of the control − R² fast) − (R² slow of the control − R² slow), with the held-out R² of "
    "the own token's fastest and slowest eigenspace in the last layer on visible rows: above 0 for every "
    f"seed, in the mean at least {_BARS.modes:g}"
)
_DEFINITIONS = {
    "valid": f"Every run captured at least {_BARS.captured:g} of what Bayes predicts. A run below did not "
    "learn the task and is left out of every reading.",
    "i": f"All rows at each position, from the input. {_FALL} Its reading: falls more than both trained "
    f"controls for every seed; or, if a control falls as far, the modes tell them apart: {_MODES}.",
    "concentration": f"Rows whose token is hidden, from layer 1 on. {_FALL} A fall here alone is inference "
    "concentrating, not coarse-graining. Its reading takes another study: one result cannot tell.",
    "ii": "Paired by seed (same start, same draws at both ξ). As stated: R_long − R_short above 0 for every "
    f"seed, at least {_BARS.gap:g} in the mean (in another than the default set-up {_BARS.gap_elsewhere:g}), "
    f"with a 95% interval above 0 from five seeds on; R_long ≥ {_BARS.long_ratio:g}. Partial: mean above 0. "
    f"Its reading: {_MODES}; and on masked rows at both ξ the R² of the posterior's slowest and fastest "
    "eigenspace is at least the captured fraction.",
    "iii": "As stated: the mean share of the two largest transitions exceeds what 95% of broken sticks "
    "(i.i.d. exponential drifts) show for as many seeds; on the mean curve the median of the others is at "
    f"most {100 * _BARS.rest_share:g}% of the largest and {_BARS.rest_median:g}. Partial: the first alone. "
    "Its reading is not supported if a trained control is as concentrated. Otherwise step + plateau, at any "
    "one or two transitions, competes with a geometric decay on ln drift: a sum of BIC differences beyond 6, "
    "with the same sign in 80% of seeds, decides. A profile is flat unless a shape beats it by more than "
    "flat draws show by chance and the largest transition is twice the median.",
    "control": "A chain on which another outcome is expected: lazy must not collapse (R ≥ 1), two-scale with "
    "r = 30 must collapse at the long ξ too (R ≤ 0.7).",
}


def definition(key: str) -> str:
    """What the verdict ``key`` asks, in words; empty for one that is not known."""
    words = _DEFINITIONS.get(key.removesuffix("-long"), "")
    return f"{words} Reported, not judged, at the long ξ." if key.endswith("-long") and words else words


def number(value: Any) -> str:
    """A number for a table: three significant digits, or "undefined"."""
    if value is None or not math.isfinite(value):
        return "undefined"
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return text.replace("-", "−") if "e" not in text else text


def interval_text(found: Interval, values: Sequence[float] = ()) -> str:
    """Mean and 95% interval, or the range of values too few for one."""
    if not found.n:
        return "undefined"
    if math.isfinite(found.low):
        return f"{number(found.mean)} [{number(found.low)}, {number(found.high)}]"
    good = [value for value in values if value is not None and math.isfinite(value)]
    if len(good) > 1:
        return f"{number(found.mean)} ({number(min(good))} to {number(max(good))})"
    return number(found.mean)


def numbers_of(verdict: dict[str, Any]) -> list[tuple[str, Interval, list[float]]]:
    """The quantities of a verdict as ``verdict.json`` has it: name, interval over seeds, value by seed."""
    found = []
    for quantity in verdict.get("quantities", ()):
        values = [math.nan if v is None else float(v) for v in quantity["by_seed"].values()]
        if any(math.isfinite(value) for value in values):
            found.append((in_words(str(quantity["name"])), paired_interval(values), values))
    return found


def missed(checks: Iterable[Check]) -> list[str]:
    """One line for every check that fails, its seeds together."""
    failed: dict[str, list[Check]] = {}
    for check in checks:
        if not check.holds:
            failed.setdefault(check.name, []).append(check)
    lines = []
    for name, found in failed.items():
        who = (
            "all seeds together" if found[0].seed is None else f"seed {' '.join(str(c.seed) for c in found)}"
        )
        values = ", ".join(f"{c.value:.3g}" for c in found)
        bars = ", ".join(dict.fromkeys(c.bar for c in found))
        lines.append(f"{who}: {in_words(name)} = {values}, wanted {bars}")
    return lines
