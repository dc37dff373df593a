"""The reliability scripts at small size; docs/reliability.md has them at full size."""

import os
import subprocess
import sys
from pathlib import Path

import ops_probe
import pytest
import torch
from draws import Draw

from rgfast.probing.capture import padding
from rgfast.runtime import native

HERE = Path(__file__).parent


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_random_cases_through_every_op():
    if native.unavailable_reason() is not None:
        pytest.skip(str(native.unavailable_reason()))
    *lines, last = run("fuzz.py", "--cases", "400", "--seed", "5")
    assert last.startswith("400 cases, 0 failed")
    found = {line.split()[0]: [int(number) for number in line.split()[1:4]] for line in lines[1:]}
    assert sum(sum(counts) for counts in found.values()) == 400
    assert set(found) == {
        "spectrum", "eigvalsh", "cka", "hsic", "cka_matrix", "kernel_drift", "minibatch_cka", "residual_mlp",
        "residual_stack", "moments", "second_moments", "cka_stream", "minibatch_stream",
    }  # fmt: skip
    # Most cases compare a number, not only that an error came.
    assert sum(right for right, _, _ in found.values()) >= 280
    assert sum(refused for _, refused, _ in found.values()) >= 10


def test_random_masks_batches_and_axes_through_the_probe():
    *lines, last = run("fuzz.py", "--probe", "--cases", "40", "--seed", "5")
    assert last.startswith("40 cases, 0 failed")
    found = {line.split()[0]: [int(number) for number in line.split()[1:4]] for line in lines[1:]}
    assert sum(sum(counts) for counts in found.values()) == 40
    assert found["probe_masks"][0] >= 15
    assert found["probe_refused"][1] >= 2


@pytest.mark.parametrize("wrong", ["counts padding", "drops the first column"])
def test_the_fuzzer_fails_where_padding_is_read_wrongly(monkeypatch, wrong):
    def read(value, name, binary, unread):
        if wrong == "counts padding":
            return torch.ones_like(value, dtype=torch.bool)
        keep = right(value, name, binary, unread)
        keep[..., 0] = False
        return keep

    right = padding._elementwise
    check = dict(ops_probe.CHECKS)["probe_masks"]
    check(Draw(5, 0))
    monkeypatch.setattr(padding, "_elementwise", read)
    failed = 0
    for case in range(12):
        try:
            check(Draw(5, case))
        except (AssertionError, ValueError):
            failed += 1
    assert failed >= 6


def test_the_fuzzer_fails_where_a_number_is_wrong(tmp_path):
    """Against a package whose CKA is off by 1e-4."""
    program = f"""
import sys
sys.argv = ["fuzz.py", "--cases", "60", "--seed", "5"]
sys.path.insert(0, {str(HERE)!r})
import rgfast
right = rgfast.cka_matrix
rgfast.cka_matrix = lambda *args, **kwargs: right(*args, **kwargs) + 1e-4
import fuzz
fuzz.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED cka_matrix: --seed 5" in done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_kills_of_a_probe_and_a_sweep():
    probe, sweep = run("kills.py", "--kills", "12", "--seed", "5")
    for line, name in ((probe, "probe"), (sweep, "sweep")):
        assert line.startswith(f"{name}: 12 kills, ")
        assert ", 0 with other bits" in line
