"""Predicted times of effective ranks are counts of the package's operators. The README has its figures."""

from pathlib import Path

import gpu_spectrum_ranks as script
import pytest
from gpu_stand_in import solved

from rgfast.ops.device import LAUNCH, STREAM, WAIT
from rgfast.ops.spectrum import krylov, lanczos

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_has_the_tables():
    readme = (ROOT / "rgfast" / "ops" / "spectrum" / "README.md").read_text(encoding="utf-8")
    assert script.table_of_ranks() in readme
    assert script.table_of_estimates() in readme


@pytest.mark.parametrize("d", script.SIDES)
def test_ranks_are_read_once_and_fast_enough(d):
    cost = script.ranks(script.BATCH, d)
    assert cost.waits == 1
    assert not cost.unknown
    assert cost.device > solved(script.BATCH, d, ours=True) - LAUNCH
    assert script.by_svdvals(d) * script.BATCH / cost.seconds > script.WANTED


def test_a_batch_takes_longer_than_its_kernels_alone():
    few, many = (script.ranks(batch, 64) for batch in (8, 800))
    assert few.kernels <= many.kernels  # parts of a batch that fit the cache
    assert few.seconds == pytest.approx(max(few.host, few.device) + WAIT)
    assert many.device > 3 * few.device


def test_estimates_read_every_moment_for_every_step():
    cost = script.estimates(script.FEW, script.WIDE)
    products = lanczos._STEPS + krylov.DEPTH
    assert cost.device > products * script.FEW * script.WIDE**2 * 8 / STREAM
    assert not cost.unknown
    # Three times eigenvectors for every block, its space's and those of four tridiagonal matrices; a read.
    assert cost.waits == 3 * krylov.DEPTH + 1 + 4 + 1
    alone = script.estimates(1, script.WIDE)  # of several, blocks are laid out anew for every step
    assert alone.kernels <= cost.kernels <= alone.kernels + lanczos._STEPS + 8


def test_what_was_not_measured_is_extrapolated(capsys):
    assert script.by_eigvalsh(1024) == pytest.approx((2203e-6, 2203e-6))
    low, high = script.by_eigvalsh(4096)
    assert high == pytest.approx(64 * 2203e-6)
    assert low == pytest.approx(2203e-6 * (2203 / 552.2) ** 2)
    script.main()
    said = capsys.readouterr().out
    assert said.count("PREDICTED, not run on a GPU") == 2
    assert "left out: nothing" in said
