"""Every recorded call still gives the values of version 0.1, but for the rounding of another processor.

Verdicts, shapes of a drift and their texts (``verdicts``, ``flow``, ``text/…``) are those of 0.2.
Equal bits are checked between two checkouts on one machine: ``record.py`` and ``compare.py`` say how.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import CALLS
from compare import differences, read
from record import write_bits
from registry import outputs
from values import disagreement, summarized

HELD = json.loads(Path(__file__).with_name("values.json").read_text())


def test_every_call_is_recorded():
    assert list(HELD) == list(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_values_are_those_recorded(name):
    call = CALLS[name]
    found = summarized(outputs(call.run()), call.tol)
    lost = HELD[name].keys() - found.keys()
    assert not lost, f"{name} no longer gives {sorted(lost)}"
    wrong = [disagreement(key, line, found[key], call.tol) for key, line in HELD[name].items()]
    assert not any(wrong), "\n".join(filter(None, wrong))


CHANGES = {
    "value": lambda x: x * (1 + 1e-9),
    "one value": lambda x: torch.where(torch.arange(9) == 4, x + 1e-9, x),
    "undefined": lambda x: torch.where(torch.arange(9) == 4, torch.nan, x),
    "sign": lambda x: -x,
    "zero": lambda x: 0 * x,
    "shape": lambda x: x[:8],
    "type": lambda x: x.float(),
    "text": lambda x: "text",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("size", [9, 3])
def test_a_change_is_seen(change, size):
    x = torch.linspace(1.0, 2.0, 9, dtype=torch.float64)
    y = CHANGES[change](x)
    if size == 3 and isinstance(y, torch.Tensor):
        x, y = x[3:6], y[3 if len(y) == 9 else 4 : 6]
    held, found = (summarized(outputs({"x": value}), 1e-12)["x"] for value in (x, y))
    assert disagreement("x", held, found, 1e-12)
    assert not disagreement("x", held, held, 1e-12)


def test_rounding_is_no_change():
    x = torch.linspace(1.0, 2.0, 9, dtype=torch.float64)
    held, found = (summarized(outputs(value), 1e-12)[""] for value in (x, x * (1 + 2e-16)))
    assert not disagreement("", held, found, 1e-12)


def test_recordings_are_compared_bit_by_bit(tmp_path):
    x = np.linspace(1.0, 2.0, 9)
    near = x.copy()
    near[4] = np.nextafter(near[4], 2.0)
    for name, value in (("a", x), ("b", near), ("same", x.copy())):
        write_bits(tmp_path / f"{name}.npz", {"call": outputs({"x": value, "text": "said"})})
    a, b, same = (read(tmp_path / f"{name}.npz") for name in ("a", "b", "same"))
    assert differences(a, same) == {}
    assert list(differences(a, b)) == ["call"]
    assert differences(a, b)["call"]["x"].startswith("1 of 9 differ, by 1.")
