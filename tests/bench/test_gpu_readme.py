"""The README of the room `moments` has the figures of its scripts."""

import re
from pathlib import Path

import gpu_readme as script
import predict_moments
import pytest

# Versions of torch differ by an operator or two.
CLOSE = 0.07


def numbers(cells):
    return [float(re.match(r"[\d.,]+", cell)[0].replace(",", "")) for cell in cells]


def test_the_first_whole_probe_is_that_of_the_readme():
    """`make gate` compares all of them."""
    whole, shares = script.written()
    found = script.of_shape(0)
    said = "python benchmarks/gpu_readme.py --write puts this right"
    assert found[0] == whole[0][0]
    assert numbers(found[1:]) == pytest.approx(numbers(whole[0][1:]), rel=CLOSE), said
    own = script.share(script.predict_gpu.predict_own(*script.ON_A_GPU[0]), script.OWN[0])
    assert numbers([own]) == pytest.approx(numbers([shares[2][1]]), rel=CLOSE), said


def test_the_readme_has_every_whole_probe():
    whole, shares = script.written()
    shapes = [str(shape) for shape in script.ON_A_GPU]
    assert [row[0] for row in whole] == [*shapes, script.GPT2]
    assert {len(row) for row in whole} == {len(script.HEAD)}
    assert [len(row) for row in shares] == [6, 6, 6]
    assert [row[6] for row in whole[:-1]] == [f"{aim:g}" for aim in script.predict_gpu.WANTED[False]]


def test_tables_are_written_in_the_place_of_the_old(monkeypatch, tmp_path, capsys):
    readme = tmp_path / "README.md"
    text = script.README.read_text(encoding="utf-8")
    old = script._TABLE.findall(text)
    readme.write_text(text, encoding="utf-8")
    monkeypatch.setattr(script, "README", readme)
    monkeypatch.setattr(script, "tables", lambda: iter([old[0].replace("1", "2"), old[1]]))
    monkeypatch.setattr("sys.argv", ["gpu_readme.py", "--check"])
    assert script.main() == 1
    assert "has other figures: python benchmarks/gpu_readme.py --write" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == text
    monkeypatch.setattr("sys.argv", ["gpu_readme.py", "--write"])
    assert script.main() == 0
    changed = readme.read_text(encoding="utf-8")
    assert changed == text.replace(old[0], old[0].replace("1", "2"))
    monkeypatch.setattr("sys.argv", ["gpu_readme.py", "--check"])
    assert script.main() == 0


@pytest.mark.parametrize(
    ("seconds", "said"), [(9.4e-5, "0.09"), (0.009994, "9.99"), (0.0118, "11.8"), (1.2962, "1,296")]
)
def test_milliseconds_are_as_precise_as_they_are_large(seconds, said):
    assert script.milliseconds(seconds) == said


def test_the_readme_has_the_moments_by_kernels(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["predict_moments.py"])
    predict_moments.main()
    said, readme = capsys.readouterr().out, Path(script.README).read_text(encoding="utf-8")
    found, written = (
        [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in re.findall(r"^\| \[\d+, \d+, \d+\] \|.*", text, re.MULTILINE)
        ][: len(predict_moments.SHAPES)]
        for text in (said, readme)
    )
    assert [row[0] for row in found] == [row[0] for row in written]
    again = "write what `python benchmarks/predict_moments.py` prints into rgfast/ops/moments/README.md"
    for row, other in zip(found, written, strict=True):
        assert numbers(row[1:]) == pytest.approx(numbers(other[1:]), rel=CLOSE), again
