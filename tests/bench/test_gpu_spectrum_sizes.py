"""Predicted times of the eigenvalue kernels by size: below the library, with the steps that are said."""

from pathlib import Path

import gpu_spectrum_sizes as script
import pytest

from rgfast.ops.spectrum.impl import cuda

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("batch", [64, 400, 2048])
def test_no_size_takes_longer_than_the_library(bits, batch):
    measured = script.library(batch, bits)
    assert len(measured) >= 5
    assert all(script.predicted(n, batch, bits) < each for n, each in measured)


def test_time_grows_by_steps_where_the_next_kernel_begins():
    kernels = {kernel.rows + 1 for kernels in script.KERNELS.values() for kernel in kernels}
    begins = kernels | {209}  # from which on a block of `chase` less fits a multiprocessor
    assert [n for n, _ in script.jumps(400, 64)] == [17, 33, 103, 129, 209]
    assert max(ratio for _, ratio in script.jumps(400, 64)) < 1.85
    for bits, most in ((64, 3.0), (32, 2.5)):
        found = dict(script.jumps(2048, bits))
        assert {*found} <= begins
        assert max(found.values()) < most


@pytest.mark.parametrize("bits", [64, 32])
def test_the_room_chooses_by_what_is_predicted(bits):
    dtype = script.DTYPES[bits]
    assert script.times(bits) == cuda._TIMES[dtype]
    for n in (1, 5, 12, 20, 33, 50, 80, 102, 103, 110, 140, 200, 230, 257, 300, 512, 800, 1024):
        for count in (1, 30, 132, 400, 2048):
            predicted = 1e-6 * count * script.predicted(n, count, bits)
            assert 0.5 < cuda._solving(count, n, dtype) / predicted < 2


def test_a_figure_is_drawn(tmp_path):
    script.draw(tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
