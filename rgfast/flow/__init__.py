"""The flow with depth: numbers and verdicts from a saved result, with no model in memory."""

from rgfast.flow.answers import Answer, Check, Quantity, Thresholds, Verdict
from rgfast.flow.curves import (
    Descent,
    Interval,
    descent,
    effective_transitions,
    paired_interval,
    top_share,
)
from rgfast.flow.saved import curve
from rgfast.flow.shapes import (
    DriftShape,
    broken_stick_share,
    drift_shape,
    flat_quantile,
    top_share_quantile,
)
from rgfast.flow.verdicts import judge

__all__ = [
    "Answer",
    "Check",
    "Descent",
    "DriftShape",
    "Interval",
    "Quantity",
    "Thresholds",
    "Verdict",
    "broken_stick_share",
    "curve",
    "descent",
    "drift_shape",
    "effective_transitions",
    "flat_quantile",
    "judge",
    "paired_interval",
    "top_share",
    "top_share_quantile",
]
