"""Imports the package before pytest collects doctests, which would make a module and its classes anew."""

import importlib.util

import rgfast.probing  # noqa: F401 (see above)

# Modules of kernels import Triton, which exists for Linux alone.
KERNELS = ("backward", "elements", "forward", "passes")
collect_ignore = (
    []
    if importlib.util.find_spec("triton")
    else [f"rgfast/ops/residual_mlp/gpu/{name}.py" for name in KERNELS]
)
