"""The flow with depth: numbers and verdicts from a saved result, with no model in memory."""

from rgfast.flow.curves import (
    Descent,
    DriftShape,
    Interval,
    broken_stick_share,
    descent,
    drift_shape,
    effective_transitions,
    paired_interval,
    top_share,
)
from rgfast.flow.verdicts import Check, Thresholds, Verdict, curve, judge

__all__ = [
    "Check",
    "Descent",
    "DriftShape",
    "Interval",
    "Thresholds",
    "Verdict",
    "broken_stick_share",
    "curve",
    "descent",
    "drift_shape",
    "effective_transitions",
    "judge",
    "paired_interval",
    "top_share",
]
