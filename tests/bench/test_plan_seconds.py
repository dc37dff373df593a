"""The comparison of planned with measured seconds runs, and compares the same probe; no time is judged."""

import os
import re
import subprocess
import sys
from pathlib import Path

import plan_seconds as script
import pytest
from launch import needs_gloo

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "plan_seconds.py"
SMALL = """
import runpy, sys
found = runpy.run_path(sys.argv[1])
Shape, shared = found["Shape"], found["SHARED"]
found["FITTED"][:] = [Shape(3, 16, 512, 4), Shape(3, 16, 512, 4, 2)]
found["OTHERS"][:] = [Shape(3, 24, 512, 4, 2), Shape(4, 16, 512, 4, 2, shared)]
sys.argv[1:] = ["--rounds", "1"]
found["main"]()
"""


@needs_gloo
def test_every_shape_is_measured_and_compared():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SMALL, str(SCRIPT)],
        capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| ([34]) x \d+, .* \| ([\d.]+) s \| ([\d.]+) s \| ", done.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == ["3", "4"]
    assert all(float(seconds) > 0 for _, _, seconds in rows)
    rates = re.search(r"^rates per second: forward (\S+), products (\S+), eigenvalues (\S+),", done.stdout)
    assert all(0 < float(rate) < float("inf") for rate in rates.groups())
    assert "of 2 shapes that nothing was fitted to are within 25%" in done.stdout


def test_nothing_is_fitted_to_the_shapes_that_are_compared():
    assert not {(s.layers, s.width) for s in script.FITTED} & {(s.layers, s.width) for s in script.OTHERS}
    for shape in (*script.FITTED, *script.OTHERS):
        assert shape.tokens % (shape.length * shape.ranks) == 0  # the same number on every rank
        parameters = sum(p.numel() for p in script.Model(shape).parameters())
        assert parameters == 12 * (shape.layers - 1) * shape.width**2  # as the plan assumes


def test_the_option_that_is_run_is_the_one_that_is_predicted():
    one = {"forward": 1e9, "products": 1e9, "eigenvalues": 1.0, "network": 1e9, "copies": 1e9}
    shared, whole = (script.Shape(4, 64, 4096, 4, 2, *options) for options in ([script.SHARED], []))
    assert script.planned(shared, one).call == "views=['pooled'], owner='layers'"
    option = script.planned(whole, one)
    assert option.call == "views=['pooled']"
    forward, rest = script.predicted(whole, one)
    assert forward == 2 * 12 * 3 * 64**2 * 2048 / 1e9
    assert forward + rest == pytest.approx(option.total_seconds)
