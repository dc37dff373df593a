"""Recorded values that fit in a text file, and how new ones are compared with them.

An output is one line: ``f8[3] is=1,2,3`` (all of it), or ``f8[40] max=2.5 sum=...``: its largest magnitude
and, in units of that, two weighted sums that every value enters. ``sha=`` hashes what must be equal, ``nan=``
says which values are undefined. Texts are a list of one, a long one its beginning and hash.
"""

import hashlib
import math

import numpy as np

_WHOLE, _TEXT = 3, 400
# A drift, a CKA and an R² are shares of one: so are their rounding errors.
_SHARES = ("cka", "drift", "matrix", "target_r2", "correlation")
# What follows rounding errors keeps only its order of magnitude.
_ROUNDING = ("bound", "singular_value_error", "decay_rss", "step_rss", "floor_error", "depth_error")


def summarized(found, tol):
    """The outputs of a call in lines, with as many digits as ``tol`` needs."""
    digits = min(17, 2 - math.floor(math.log10(tol)))
    return {key: _text(v) if isinstance(v, str) else _line(v, digits) for key, v in found.items()}


def _text(value):
    if len(value) <= _TEXT:
        return [value]
    return [f"{value[:40]}… {hashlib.sha256(value.encode()).hexdigest()[:12]}"]


def _line(value, digits):
    flat = value.reshape(-1)
    kind = f"{value.dtype.str[1:]}[{','.join(map(str, value.shape))}]"
    if value.dtype.kind not in "fc":
        whole = f"is={','.join(map(str, flat.astype(int)))}"
        return f"{kind} {whole if flat.size <= 8 else f'sha={_digest(value)}'}"
    if value.dtype.kind == "c":
        flat = flat.view(flat.real.dtype)
    flat = flat.astype(np.float64)
    undefined = np.isnan(flat)
    if undefined.any():
        kind += f" nan={'all' if undefined.all() else _digest(undefined)}"
    flat = np.where(undefined, 0.0, flat)
    if flat.size <= _WHOLE:
        return f"{kind} is={_shown(flat, digits)}"
    largest = np.abs(flat).max()
    unit = flat / (largest or 1.0)
    sums = [unit @ np.cos(np.arange(flat.size)), unit @ np.cos(2.0 * np.arange(flat.size))]
    return f"{kind} max={_shown([largest], digits)} sum={_shown(sums, digits)}"


def _shown(values, digits):
    return ",".join(f"{value:.{digits}g}" for value in values)


def _digest(value):
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:8]


def disagreement(key, held, found, tol):
    """How the line ``found`` of an output contradicts the recorded ``held``; nothing where it does not."""
    if held == found:
        return ""
    told = f"{key}: {held} became {found}"
    if isinstance(held, list) or isinstance(found, list):
        return told
    (kind, a), (other, b) = _parsed(held), _parsed(found)
    exact = [{name: part for name, part in parts.items() if name in ("nan", "sha")} for parts in (a, b)]
    if kind != other or exact[0] != exact[1] or not kind.startswith(("f", "c")):
        return told
    for name, allowed in _allowed(key, kind, a, b, tol).items():
        x, y = (np.array(parts[name].split(","), float) for parts in (a, b))
        with np.errstate(invalid="ignore"):
            off = np.where(x == y, 0.0, np.abs(x - y))
        if not (off <= allowed).all():
            return f"{told}: {name} off by {off.max():.1e}, more than {allowed:.1e}"
    return ""


def _allowed(key, kind, a, b, tol):
    """What each part of two lines may differ by."""
    if any(word in key.rsplit(".", 1)[-1] for word in _ROUNDING):
        tol = 1.0
    name = "is" if "is" in a else "max"
    largest = [max(abs(float(v)) for v in parts[name].split(",") if v) for parts in (a, b)]
    scale = max(largest)
    if any(share in key for share in _SHARES) and scale > 1e-6:
        scale = max(scale, 1.0)
    if name == "is":
        return {"is": tol * scale}
    size = math.prod(int(n) for n in kind[kind.index("[") + 1 : -1].split(",")) * (1 + (kind[0] == "c"))
    # The sums are in units of the largest value, which may be off itself.
    return {"max": tol * scale, "sum": 2 * tol * size * scale / max(min(largest), 1e-300)}


def _parsed(line):
    kind, *parts = line.split(" ")
    return kind, dict(part.split("=", 1) for part in parts)
