"""Time the cases of ``rgfast/bench/similarity.py``."""

from rgfast.bench import similarity

ROOM = similarity


def test_similarity(entry, time_checked):
    time_checked(entry)
