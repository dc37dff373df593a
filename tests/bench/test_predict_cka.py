"""The model of the kernels of CKA gives what prototypes of them took, and the README has what it predicts."""

import re
from pathlib import Path

import predict_cka as script
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "predict_cka.py"
README = ROOT / "rgfast" / "ops" / "cka" / "README.md"


def test_prototypes_are_given_within_a_quarter():
    rows = script.validation()
    assert len(rows) == 8
    assert all(0.75 <= model / measured <= 1.25 for _, measured, model in rows)


def test_counts_are_those_of_the_tiles():
    assert len(script.strips_of_samples(1024)) == 136
    assert len(script.cross(256, 49, near=True)) == 49 * 10 + 48 * 16
    assert len(script.cross(64, 7, near=False)) == 28
    # A row is moved twice: 2,048 subtractions of a whole tile.
    more = script.gram(diagonal=False).products[0] - script.exact(64, 64, diagonal=False).products[0]
    assert more == 2 * 64 * 16 / 64
    one, two = (script.products_of_layers(25, spans) for spans in (132 * 300, 132 * 600))
    assert two == pytest.approx(2 * one, rel=0.1)


def table(text):
    """Cells of the rows for each shape, numbers as such."""
    rows = [line.strip("|").split("|") for line in re.findall(r"^\| \[\d.*\|$", text, re.MULTILINE)]
    return [[cell.strip(), *map(str.strip, rest)] for cell, *rest in rows]


def test_the_readme_has_what_is_predicted(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["predict_cka.py"])
    script.main()
    said = capsys.readouterr().out
    assert "QUARTER" not in said
    assert "PREDICTED, not run on a GPU" in said
    found, written = table(said), table(README.read_text(encoding="utf-8"))
    assert len(found) == len(written) == 2 * len(script.SHAPES) + len(script.NULLS)
    for row, other in zip(found, written, strict=True):
        words = {5: {0, 1}, 6: {0, 3}, 7: {0, 4}}[len(row)]
        assert [row[k] for k in words] == [other[k] for k in words]
        for k in {*range(len(row))} - words:
            # Versions of torch differ by an operator or two.
            assert float(row[k]) == pytest.approx(float(other[k]), rel=0.07)


def test_the_readme_has_how_much_faster_than_pytorch_cka():
    shape, times = script.over_pytorch_cka()
    assert shape == (7, 64, 1024, 64)
    said = re.search(r"\*\*(\d+) times as\s+fast as pytorch-cka", README.read_text(encoding="utf-8"))
    assert times == pytest.approx(float(said[1]), rel=0.07)


def test_auto_leaves_to_the_library_what_it_is_faster_at():
    from rgfast.ops.cka.impl import library

    taken = []
    for shape, near, *_ in script.SHAPES:
        call = script.call_of(shape, near=near)
        taken.append(script.kernels.CKA.cost(call) < library.CKA.cost(call))
    assert taken == [True, True, True, True, False]
