"""The eigenvalue kernels' model of time gives what prototypes took on an H100. The README has its figures."""

from pathlib import Path

import gpu_spectrum as script
import pytest
import torch

from rgfast.ops.spectrum.impl.cuda import KERNELS, kernel_for

ROOT = Path(__file__).resolve().parents[2]
OFF = {
    "counts by halving, fp64, 2048 of n=32",
    "counts by interpolation, fp64, 400 of n=64",
    "counts by interpolation, fp64, 400 of n=200",
}


@pytest.fixture(scope="module")
def rows():
    return script.validation()


def test_what_was_measured_is_given_within_a_quarter(rows):
    assert {row.name for row in rows if not row.close} == OFF


@pytest.mark.parametrize(
    ("size", "sizes"), [(64, (16, 32, 64, 100, 128, 192, 200)), (32, (16, 64, 128, 200, 256))]
)
def test_the_prototypes_are_among_them(rows, size, sizes):
    for n in sizes:
        assert any(
            row.name.startswith("reduction") and f"fp{size}, " in row.name and f" n={n}," in row.name
            for row in rows
        )
    assert len(rows) > 80


def test_a_row_far_off_is_marked(capsys, monkeypatch):
    monkeypatch.setattr(script, "FITTED_CHAIN", 3.0)
    script.main()
    printed = capsys.readouterr().out
    assert printed.count("OFF BY MORE THAN A QUARTER") > 20
    assert "not run on a GPU" in printed


@pytest.mark.parametrize(
    ("n", "size", "blocks"),
    [(8, 8, 4), (32, 8, 4), (64, 8, 9), (80, 8, 5), (102, 8, 4), (128, 8, 2), (222, 4, 2), (256, 4, 1)],
)
def test_blocks_fit_by_registers_and_shared_memory(n, size, blocks):
    assert script.kernel(n, size).occupancy == blocks


def test_registers_are_those_of_the_gate():
    assert script.registers("rgfast_spectrum_registers128_f64") == 255
    assert all(16 < script.registers(each.name) < 256 for kernels in KERNELS.values() for each in kernels)
    with pytest.raises(ValueError, match=r"spectrum\.txt has no rgfast_gone for sm_90"):
        script.registers("rgfast_gone")
    with pytest.raises(ValueError, match=r"129 rows of torch\.float64 are solved in stages"):
        script.kernel(129, 8)


def test_a_packed_triangle_is_counted_as_it_is_launched():
    kernel = kernel_for(101, torch.float64)
    assert kernel.packed
    assert script.packed_bytes(101, 8) == kernel.shared_bytes(101, torch.float64) - kernel.shared


@pytest.mark.parametrize(("n", "size"), [(13, 8), (45, 4), (101, 8), (120, 8), (256, 4)])
def test_time_follows_from_what_is_counted(n, size, monkeypatch):
    shape = script.kernel(n, size)
    full = 132 * shape.occupancy * shape.per_block
    assert shape.reducing(n, 2 * full) == pytest.approx(2 * shape.reducing(n, full))
    assert shape.reducing(n, full + 1) > shape.reducing(n, full)
    chain, busy = (sum(part) for part in zip(*shape.reduction(n), strict=True))
    assert shape.reducing(n, full) == pytest.approx((chain + shape.occupancy * busy) / script.CLOCK)
    assert shape.counting(n, 1, 20) == pytest.approx(2 * shape.counting(n, 1, 10))
    before = script.predicted(n, 10**4, size)
    monkeypatch.setattr(script, "LOADED", 1e9)  # memory that slow is all that counts
    assert script.predicted(n, 10**4, size) == pytest.approx(10**4 * n * n * size / 1e9, rel=1e-3)
    assert before < script.predicted(n, 10**4, size)


def test_the_readme_has_the_table():
    readme = (ROOT / "rgfast" / "ops" / "spectrum" / "README.md").read_text(encoding="utf-8")
    assert script.table() in readme
