"""``rgfast bench``: the cases of every benchmark, what they are held against, and the gate before them.

A module an op, each with ``gate(device)`` (small inputs against fp64 truth) and ``contests(device, quick)``
(what is timed, against whom). The scripts in ``benchmarks/`` time the same contenders on more shapes.
"""
