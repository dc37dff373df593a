"""Time the cases of ``rgfast/bench/residual_mlp.py``."""

from rgfast.bench import residual_mlp

ROOM = residual_mlp


def test_residual_mlp(entry, time_checked):
    time_checked(entry)
