"""Predicted times of the eigenvalue kernels by size: below the library, with the steps that are said."""

from pathlib import Path

import gpu_spectrum_sizes as script
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("batch", [64, 400, 2048])
def test_no_size_takes_longer_than_the_library(bits, batch):
    measured = script.library(batch, bits)
    assert len(measured) >= 5
    assert all(script.predicted(n, batch, bits) < each for n, each in measured)


def test_time_grows_by_steps_where_the_next_kernel_begins():
    begins = {kernel.rows + 1 for kernels in script.KERNELS.values() for kernel in kernels}
    assert [n for n, _ in script.jumps(400, 64)] == [17, 33, 65, 129, 193]
    assert max(ratio for _, ratio in script.jumps(400, 64)) < 2.05
    for bits in (64, 32):
        found = dict(script.jumps(2048, bits))
        assert {*found} - {214} <= begins  # from 214 rows on one block less fits a multiprocessor
        assert max(found.values()) < 4


def test_a_figure_is_drawn(tmp_path):
    script.draw(tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
