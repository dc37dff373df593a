"""What each verdict asks, in words, and the numbers with intervals that it rests on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rgfast.flow import Check, Interval, Thresholds, paired_interval

__all__ = ["HINT", "TERMS", "definition", "interval_text", "missed", "number", "numbers_of"]

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
    ("visible, masked", "rows whose token the model sees at t, from the input on (what the stack forgets); "
                        "rows whose "
     "token is hidden at t, from layer 1 on (what it infers; at the input they are constant)"),
    ("kernel drift", "1 − linear CKA between neighbouring layers, by position, averaged"),
    ("captured", "1 − E[KL(posterior‖model)] / E[KL(posterior‖π)] at hidden positions, with the exact "
                 "Bayes posterior: "
     "0 for knowing the stationary distribution π alone, 1 for Bayes"),
    ("correlation length ξ", "−1/ln|λ₂| of the chain's transition matrix, in steps"),
    ("trained controls", "stacks trained equally long on i.i.d. tokens (control_iid) and on targets "
                         "permuted across the "
     "batch (control_permuted): the same start, nothing to learn but frequencies"),
)  # fmt: skip

_FALL = (
    f"R ≤ {_BARS.short_ratio:g} for every seed and below both trained controls; the mean curve has no "
    f"upward step beyond {100 * _BARS.rise:g}% of its drop or two standard errors. Partial: mean R ≤ "
    f"{_BARS.short_ratio:g} alone."
)
_DRIFT = (
    "ln drift is better described (BIC) by a step of one or two transitions with a plateau after it than "
    "by a geometric decay, for every seed; partial for most seeds; otherwise it is called a relaxation to "
    "a fixed point. The top-2 share stands beside what i.i.d. exponential drifts would give (broken stick)."
)
_DEFINITIONS = {
    "valid": f"Every run captured at least {_BARS.captured:g} of what Bayes predicts. A run below is "
             f"undertrained and left "
    "out of every finding.",
    "i": f"Rows whose token is seen, from the input on. {_FALL}",
    "i-masked": f"Rows whose token is hidden, from layer 1 on. {_FALL} A fall here alone is inference "
                f"concentrating, not "
    "coarse-graining.",
    "ii": "Paired by seed (same start, same draws at both ξ): R_long − R_short > 0 for every seed in both "
          "views and at least "
    f"{_BARS.gap:g} in the mean of visible rows; R_long ≥ {_BARS.long_visible:g} visible and ≥ "
    f"{_BARS.long_masked:g} masked. Partial: both mean differences above 0.",
    "ii-b": "Last layer, visible rows: held-out linear R² of the chain's slowest eigenspace at least "
    f"{_BARS.slow_survival:g} and above that of the fastest for every seed; mean difference at least "
    f"{_BARS.survival_gap:g} (interval above 0 from five seeds on); the fastest below that in both trained "
    "controls. Partial: slow above fast for every seed.",
    "iii": _DRIFT,
    "control": "A chain on which another outcome is expected: lazy must not collapse (R ≥ 1), two-scale "
               "with r = 30 must "
    "collapse at the long ξ too (R ≤ 0.7).",
}  # fmt: skip


def definition(key: str) -> str:
    """What the verdict ``key`` asks, in words; empty for one that is not known."""
    words = (
        _DEFINITIONS.get(key)
        or _DEFINITIONS.get(key.removesuffix("-long"))
        or _DEFINITIONS.get(key.partition("-")[0], "")
    )
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
    rows, key = verdict.get("per_seed") or (), str(verdict["key"])
    found: list[tuple[str, list[float]]] = []
    if key == "valid" or key == "control":
        names = dict.fromkeys(check["name"] for check in verdict["checks"])
        found = [(name, [c["value"] for c in verdict["checks"] if c["name"] == name]) for name in names]
    elif key in ("i", "i-masked"):
        found = [("R", [row["ratio"] for row in rows])]
        controls = [name for name in (rows[0] if rows else {}) if name.startswith("R_control")]
        found += [(name.replace("R_", "R of "), [row[name] for row in rows]) for name in controls]
    elif key == "ii":
        for view in dict.fromkeys(row["view"] for row in rows):
            part = [row for row in rows if row["view"] == view]
            found.append((f"R_long − R_short, {view}", [row["R_long"] - row["R_short"] for row in part]))
            found.append((f"R_long, {view}", [row["R_long"] for row in part]))
    elif key.startswith("ii-b"):
        found = [(f"R² {name}", [row[name] for row in rows]) for name in ("slow", "fast")]
        found.append(("slow − fast", [row["slow"] - row["fast"] for row in rows]))
    elif key.startswith("iii"):
        told = [row for row in rows if row.get("preferred")]
        found = [
            ("rate per layer", [row["decay_rate"] for row in told]),
            ("top-2 share", [row["top2"] for row in told]),
            ("N_eff", [row["effective_transitions"] for row in told]),
            ("BIC(decay) − BIC(step)", [row["bic_difference"] for row in told]),
        ]
    cleaned = [
        (name, [np.nan if value is None else float(value) for value in values]) for name, values in found
    ]
    return [(name, paired_interval(values), values) for name, values in cleaned if values]


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
        lines.append(f"{who}: {name} = {values}, wanted {bars}")
    return lines
