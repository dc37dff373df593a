"""Time the cases of ``rgfast/bench/probe.py``."""

from rgfast.bench import probe

ROOM = probe


def test_probe(entry, time_checked):
    time_checked(entry)
