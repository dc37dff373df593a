"""The named calls of the oracle, their seeded inputs, and how a result becomes named arrays and strings."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch
import xarray as xr

CALLS = {}

# Other processors add in another order. Exact paths keep fp64's digits; what is refined or near singular
# keeps the effective rank's contract; fp32 products keep theirs, and what a whole fp32 model adds is ten
# times that.
FP64, CONTRACT, FP32, FP32_MODEL = 1e-11, 1e-6, 1e-5, 1e-4


@dataclasses.dataclass(frozen=True)
class Call:
    """One call: ``run()`` returns anything :func:`outputs` takes apart.

    ``tol`` is what its values may differ by on another processor, relative to the largest of the array.
    """

    name: str
    run: Callable[[], object]
    tol: float


def add(name, run, tol=FP64):
    if name in CALLS:
        raise ValueError(f"name must be new, got {name!r} twice")
    CALLS[name] = Call(name, run, tol)


def call(name, tol=FP64):
    """A decorator: the function below is the call ``name``."""

    def taken(run):
        add(name, run, tol)
        return run

    return taken


def normal(seed, *shape, dtype=torch.float64):
    """Standard normal numbers with the same bits everywhere: NumPy's, since torch's depend on vectors."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def with_spectrum(seed, n, sigma, dtype=torch.float64):
    """Rows ``[n, d]`` with about the singular values ``sigma``, by two random reflections."""
    d = len(sigma)
    u, v = normal(seed, n), normal(seed + 1, d)
    x = torch.zeros(n, d, dtype=torch.float64)
    x[range(min(n, d)), range(min(n, d))] = torch.as_tensor(sigma, dtype=torch.float64)[: min(n, d)]
    x = x - 2 * (u[:, None] * (u @ x)) / (u @ u)
    return (x - 2 * ((x @ v)[:, None] * v) / (v @ v)).to(dtype)


def filled(model, scale=1.0):
    """``model`` in evaluation mode, every parameter drawn by NumPy from a seed that is its name."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = normal(zlib.crc32(name.encode()), *weight.shape)
            fan = weight.shape[-1] if weight.dim() > 1 else 10.0
            weight.copy_(scale * drawn / fan**0.5 + (1.0 if name.endswith("norm.weight") else 0.0))
    return model.eval()


def outputs(value):
    """``value`` taken apart: name -> array or string, whatever tensors, tables and records it consists of."""
    found = {}
    _take(found, "", value)
    return found


def _take(found, name, value):
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        found[name] = _plain(value.float() if value.dtype == torch.bfloat16 else value)
    elif isinstance(value, np.ndarray):
        found[name] = str(value.tolist()) if value.dtype.kind in "OUST" else np.ascontiguousarray(value)
    elif value is None or isinstance(value, str):
        found[name] = str(value)
    elif isinstance(value, bool | int | float | complex | np.generic):
        found[name] = np.asarray(value)
    elif isinstance(value, xr.Dataset):
        _each(found, name, {str(key): value[key].values for key in value.variables})
    elif isinstance(value, pd.DataFrame):
        _each(found, name, {str(key): value[key].to_numpy() for key in value})
    elif dataclasses.is_dataclass(value):
        _each(found, name, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        _each(found, name, value)
    elif isinstance(value, list | tuple):
        _each(found, name, dict(enumerate(value)))
    else:
        raise TypeError(f"{name or 'the result'} must be of a kind that can be recorded, got {type(value)}")


def _plain(value):
    return np.ascontiguousarray(value.resolve_conj().resolve_neg().numpy())


def _each(found, name, parts):
    for key, part in parts.items():
        _take(found, f"{name}.{key}" if name else str(key), part)
