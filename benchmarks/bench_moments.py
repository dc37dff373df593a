"""Time the cases of ``rgfast/bench/moments.py``."""

from rgfast.bench import moments

ROOM = moments


def test_moments(entry, time_checked):
    time_checked(entry)
