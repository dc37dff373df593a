"""Time the cases of ``rgfast/bench/cka.py``."""

from rgfast.bench import cka

ROOM = cka


def test_cka(entry, time_checked):
    time_checked(entry)
