"""Time the cases of ``rgfast/bench/spectrum.py``."""

from rgfast.bench import spectrum

ROOM = spectrum


def test_spectrum(entry, time_checked):
    time_checked(entry)
