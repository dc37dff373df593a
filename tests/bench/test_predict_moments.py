"""The model of the kernels of moments gives what prototypes of them took, and what it predicts is enough."""

from pathlib import Path

import predict_moments as script
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "predict_moments.py"


def test_prototypes_are_given_within_a_quarter():
    rows = script.validation()
    assert len(rows) == 3
    assert all(0.75 <= model / measured <= 1.25 for _, measured, model in rows)


def test_occupancy_is_that_of_the_compiled_kernels():
    assert script.resident("rgfast_moments_exact_float32") == 3
    assert script.resident("rgfast_moments_exact_float64") == 2


def test_counts_are_those_of_the_tiles():
    full, corner = script.exact(64, 64, diagonal=False), script.exact(2, 2, diagonal=True)
    assert full.products == (8 * 4 * 16 + 2 * 64 * 16 / 64,) * 4
    assert [p > 16 for p in corner.products] == [True, False, False, False]
    assert [len(script.tiles(width)) for width in (1, 64, 65, 256, 258)] == [1, 1, 3, 10, 15]
    assert full.together(3) == pytest.approx(3 * full.together(1), rel=0.5)


def test_a_call_has_the_tiles_of_all_its_pairs():
    assert len(script.tiles(64, 130)) == 3
    assert len(script.tiles(130, 130)) == 9
    one = script.products(448, 1024, 64, extended=True)
    rows, shifts = list(one.rows) * 2, list(one.shifts) * 2
    sums = dict.fromkeys(((0, 0), (0, 1), (1, 1)), one.sums[0, 0])
    three = one._replace(rows=rows, shifts=shifts, sums=sums, exponents=[0, 0])
    launches, alone = script.of_call(one)
    assert launches == 2  # norms and products
    assert script.of_call(three)[0] == 2
    assert 2 * alone < script.of_call(three)[1] < 5 * alone  # of two layers a whole square is multiplied
    assert script.second_moments(448, 1024, 64, extended=True) == alone


def test_predictions_are_what_was_wanted(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["predict_moments.py"])
    script.main()
    said = capsys.readouterr().out
    assert "QUARTER" not in said
    assert said.count("PREDICTED, not run on a GPU") == 2
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.count("|") == 9 and "[4" in line]
    assert len(rows) == len(script.SHAPES)
    assert all(float(row[3]) >= float(row[4]) for row in rows)


@pytest.mark.parametrize("extended", [True, False])
def test_auto_leaves_to_the_library_what_it_is_faster_at(extended):
    """By more than the 6% that the model is off where it was measured."""
    taken, slower = [], []
    for shape in (*script.SHAPES, *script.OTHERS, (4, 512, 512), (16, 1024, 128), (400, 512, 16)):
        call = script.products(*shape, extended=extended)
        if script.kernels.MOMENTS.cost(call) < script.library.MOMENTS.cost(call):
            taken.append(shape)
            ratio = script.by_the_library(*shape, extended=extended) / script.second_moments(
                *shape, extended=extended
            )
            slower += [(shape, ratio)] * (ratio < 1 / 1.06)
    assert slower == []
    assert {*script.SHAPES} <= {*taken}
