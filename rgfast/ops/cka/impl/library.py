"""CKA and drift by torch's batched fp64 products (batched.py): when, and what it costs."""

from __future__ import annotations

import math

from rgfast.dispatch import Impl
from rgfast.ops.cka.batched import product_seconds, run
from rgfast.ops.cka.call import Call
from rgfast.ops.cka.sums import TASKS, wanted_by
from rgfast.ops.device import by_name_on_cpu, seconds

__all__ = ["CKA"]


def _can_run(call: Call) -> str | None:
    if call.task not in TASKS:
        return f"only CKA and drift of linear kernels are batched, not {call.task!r}"
    return "a gradient is wanted" if call.recorded() else None


def _cost(call: Call) -> float:
    if call.device.type == "cpu":
        return 5e-4 + call.multiplications() / 8e9
    sides = call.sides
    *lead, n, _ = sides[0][0].shape
    width = max(x.shape[-1] for side in sides for x in side)
    rows = float(math.prod(lead)) * n * width * sum(len(side) for side in sides)
    return seconds(30, 80.0 * rows) + min(product_seconds(math.prod(lead), n, width, wanted_by(call)))


CKA = Impl("library", run, _can_run, _cost, by_name_only=by_name_on_cpu)
