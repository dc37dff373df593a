"""How a check judges: a value against the truth and what is allowed, or the error that is documented."""

import numpy as np
import torch

import rgfast
from rgfast.validation import as_tensor

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ILL = 1e7  # magnification of rounding errors beyond which a value says nothing


def kind_of(x):
    return torch.from_numpy(x).dtype if isinstance(x, np.ndarray) else x.dtype


def refused(call, error, words):
    """The outcome where ``call`` raises ``error`` with ``words`` in its message."""
    try:
        call()
    except error as raised:
        if words in str(raised):
            return "refused", 0.0
        raise
    raise AssertionError(f"expected {error.__name__} with {words!r}, got a value")


def excess(got, want, allowed, what=""):
    """|got − want| in units of ``allowed``; raises where that is over 1, or where only one of them is NaN."""
    got = np.asarray(got.double() if isinstance(got, torch.Tensor) else got, dtype=np.float64)
    want = np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape, (what, got.shape, want.shape)
    assert np.array_equal(np.isnan(got), np.isnan(want)), (what, got, want)
    error = np.abs(got - want) / np.broadcast_to(allowed, want.shape)
    found = float(np.nan_to_num(error, nan=0.0, posinf=np.inf).max(initial=0.0))
    assert found <= 1, (what, found, got, want)
    return found


def impl_of(draw):
    return draw.choose(("auto", "auto", "auto", "native", "reference"))


def tried(call, impl):
    """``call(impl)``, or with "auto" where a named implementation says that it cannot."""
    try:
        return call(impl)
    except rgfast.ImplUnavailable:
        if impl == "auto":
            raise
        return call("auto")


def poisoned(draw, x):
    """A copy of ``x`` with NaN or infinity somewhere."""
    bad = as_tensor(x, "x").clone(memory_format=torch.contiguous_format)
    bad.view(-1)[int(draw.rng.integers(bad.numel()))] = draw.choose((torch.nan, torch.inf, -torch.inf))
    return bad


def judged(got, want, magnified, allowed, what):
    """As :func:`excess`; where the value is lost in rounding it may be anything, NaN included."""
    got, lost = as_tensor(got, "got").double().numpy().copy(), magnified > ILL
    got[lost], want = 0.0, np.where(lost, 0.0, want)
    return ("undefined" if lost.all() else "right"), excess(got, want, np.where(lost, 1.0, allowed), what)
