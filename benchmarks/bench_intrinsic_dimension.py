"""Time the cases of ``rgfast/bench/intrinsic_dimension.py``."""

from rgfast.bench import intrinsic_dimension

ROOM = intrinsic_dimension


def test_intrinsic_dimension(entry, time_checked):
    time_checked(entry)
