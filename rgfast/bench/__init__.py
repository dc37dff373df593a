"""``rgfast bench``: the cases of every benchmark, their rivals, and the gate before them.

A module per room, each with ``gate(device)`` (small inputs against fp64 truth) and ``contests(device, size)``
(what is timed, against whom). ``benchmarks/bench_<room>.py`` times the same cases by pytest-benchmark.
"""

# What each benchmark times, in the order of the table; each is the module of its name.
ROOMS = {
    "spectrum": "eigvalsh in both precisions, effective_rank",
    "cka": "CKA of all pairs and of neighbours",
    "similarity": "measures beside CKA, calibrated by permutations",
    "intrinsic_dimension": "TwoNN",
    "moments": "products of rows added to second moments",
    "residual_mlp": "the residual block, forward and backward",
    "probe": "a whole probe against a forward that measures nothing",
}
