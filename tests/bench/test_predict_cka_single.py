"""The model of CKA in Triton gives what prototypes of it took, and the README has what it predicts."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "rgfast" / "ops" / "cka" / "README.md"
pytest.importorskip("triton")
script = pytest.importorskip("predict_cka_single")


def test_prototypes_are_given_within_a_quarter():
    rows = script.validation()
    assert len(rows) == 12
    assert all(0.75 <= model / measured <= 1.25 for _, measured, model in rows)


def test_bytes_of_the_cache_bind_if_all_multiprocessors_are_busy():
    alone, together = (script.step_clocks(128, busy, 2.0) for busy in (1, script.SMS))
    assert alone == 3 * 128**2 * script.COLUMNS / script.PER_CLOCK < together
    # With half as many bytes, products do.
    assert script.step_clocks(128, script.SMS, 1.0) == alone
    assert (script.tiles_of(1024, 128), script.tiles_of(130, 128)) == (36, 3)
    assert script.strips_of(1024, 128) == 2 - 8 / 36


def test_launches_are_those_of_the_implementation():
    with script.counted() as found:
        script.implementation._computed(script.call_of((25, 16, 1024, 256), near=False))
    # Three parts of the positions have four kernels each, and a position has two turns of tiles.
    assert found.count == 3 * 4 + 16 * 2 * 2


def table(text):
    """Cells of the rows for each shape."""
    rows = re.findall(r"^\| ((?:all pairs|neighbors) \[\d.*)\|$", text, re.MULTILINE)
    return [[*map(str.strip, row.split("|"))] for row in rows]


def test_the_readme_has_what_is_predicted(capsys):
    script.main()
    said = capsys.readouterr().out
    assert "QUARTER" not in said
    assert "PREDICTED, not run on a GPU" in said
    found, written = table(said), table(README.read_text(encoding="utf-8"))
    assert len(found) == len(written) == len(script.SHAPES)
    for row, other in zip(found, written, strict=True):
        assert (row[0], row[4]) == (other[0], other[4])
        for k in (1, 2, 3):
            # Versions of torch differ by an operator or two.
            assert float(row[k]) == pytest.approx(float(other[k]), rel=0.07)
