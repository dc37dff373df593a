"""The model of time of eigenvalues in stages gives what prototypes took. The README has its figures."""

from pathlib import Path

import gpu_spectrum_stages as script
import pytest
import torch

from rgfast.ops.spectrum import stages

ROOT = Path(__file__).resolve().parents[2]


def test_what_was_measured_is_given_as_the_readme_says():
    rows = script.validation()
    assert len(rows) == 22
    assert max(abs(row.ratio - 1) for row in rows) <= 0.17


def test_a_row_far_off_is_marked(capsys, monkeypatch):
    monkeypatch.setattr(script, "FITTED_CHAIN", 4.0)
    script.main()
    printed = capsys.readouterr().out
    assert printed.count("OFF BY MORE THAN A QUARTER") > 15
    assert "not run on a GPU" in printed


def blocks(n):
    return [script.fitting(*launch) for launch in stages.STAGES.launches(n, torch.float64)]


def test_blocks_fit_by_registers_and_shared_memory():
    assert blocks(200) == [4, 4, 5]
    assert blocks(256) == [4, 3, 5]
    assert blocks(384) == [2, 2, 5]
    assert blocks(512) == [2, 1, 5]
    assert blocks(1024) == [1, 1, 5]


@pytest.mark.parametrize("n", [193, 256, 1000])
def test_time_follows_from_what_is_counted(n, monkeypatch):
    stages_of = (script.band, script.chase, script.counts)
    for seconds, fitting in zip(stages_of, blocks(n), strict=True):
        full = 132 * fitting
        assert seconds(n, 2 * full) == pytest.approx(2 * seconds(n, full))
        assert seconds(n, full + 1) > seconds(n, full)
    most = stages.at_once(n)
    assert script.predicted(n, 2 * most, 8) == pytest.approx(2 * script.predicted(n, most, 8), rel=1e-3)
    assert script.predicted(n, 64, 4) > script.predicted(n, 64, 8)
    before = script.band(n, 132)
    monkeypatch.setattr(script, "LOADED", 1e9)  # memory that slow is all that counts
    passes = 8 * sum(m * m for m in script.below(n)) * 132 / 1e9
    assert script.band(n, 132) > passes > before


def test_products_are_counted_by_tiles():
    assert script.below(33) == [32, 16]
    assert script.strips(16, 4) == [1]
    assert script.strips(96, 4) == [2, 6]  # two blocks of rows, then four more
    assert script.strips(128, 8) == [8]
    ours, theirs = script.our_products(512, 8), script.triangle(512, 8)
    assert ours.bytes == 16 * 256 * (32 * 33 // 2)
    assert ours.busy >= 32 * 33 // 2 * 8 * script.MMA_BUSY
    assert ours.chain > script.our_products(512, 16).chain
    assert theirs.chain > script.triangle(512, 16).chain


def test_parts_add_up():
    for n in (200, 512, 1000):
        assert script.band(n, 64) == pytest.approx(sum(map(sum, script.band_by_part(n, 64).values())))
    assert script.our_panel(256, 4).chain > script.our_panel(128, 4).chain


def test_the_readme_has_the_table():
    readme = (ROOT / "rgfast" / "ops" / "spectrum" / "README.md").read_text(encoding="utf-8")
    assert script.table() in readme
