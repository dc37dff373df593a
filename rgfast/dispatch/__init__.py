"""Which implementation of an op runs, and why.

An implementation gets one validated ``Call`` and says whether it can run it (``can_run``), how long that
takes (``cost``), and what the result is (``run``). ``impl="auto"`` takes the cheapest that can. A named
implementation never falls back, not inside either: it runs or raises :class:`ImplUnavailable`.

Environment: ``RGFAST_STRICT=1`` turns a fallback that would warn into an error.
"""

from __future__ import annotations

from rgfast.dispatch.explaining import Explanation, explain, implementations, register, registered
from rgfast.dispatch.implementation import (
    Call,
    FallbackWarning,
    HandOff,
    Impl,
    ImplName,
    ImplUnavailable,
    Unproven,
    is_plain,
)
from rgfast.dispatch.op import Op
from rgfast.dispatch.records import Record, record, walk
from rgfast.dispatch.schemas import schema

__all__ = [
    "Call",
    "Explanation",
    "FallbackWarning",
    "HandOff",
    "Impl",
    "ImplName",
    "ImplUnavailable",
    "Op",
    "Record",
    "Unproven",
    "explain",
    "implementations",
    "is_plain",
    "record",
    "register",
    "registered",
    "schema",
    "walk",
]
