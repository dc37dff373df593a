"""``rgfast monitor``."""

import json

import pytest
import torch

import rgfast
from rgfast.cli import main


@pytest.fixture
def path(tmp_path):
    model = rgfast.ResidualStack(width=4, depth=2, mixing="none", w2_scale=1.0)
    monitor = rgfast.Monitor(model, torch.randn(64, 3, 4), every=1, path=tmp_path / "run.jsonl")
    for i in range(3):
        monitor.step(i)
    return tmp_path / "run.jsonl"


def test_what_it_prints(path, capsys):
    assert main(["monitor", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("MonitorResult of ResidualStack: 3 steps from 0 to 2, 3 layers\n")
    assert "collapsed at" in out


def test_json(path, capsys):
    assert main(["monitor", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == [0, 1, 2]
    result = rgfast.MonitorResult.load(path)
    assert (
        found["views"]["pooled"]["effective_rank"]
        == result.by_step("effective_rank", "pooled").values.tolist()
    )
    assert found["views"]["pooled"]["collapsed_at"] == [None, None, None]


def test_figure_and_report(path, tmp_path, capsys):
    figure, page = tmp_path / "a.png", tmp_path / "a.html"
    words = ["--figure", str(figure), "--measure", "kernel_drift", "--views", "pooled", "--report", str(page)]
    assert main(["monitor", str(path), *words]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "0 of 3 layers collapsed" in page.read_text()
    assert f"written to {figure}\nwritten to {page}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none.jsonl"], "there is no file none.jsonl"),
        (["--measure", "rank", "--figure", "a.png"], "measure must be one of effective_rank"),
        (["--views", "masked", "--figure", "a.png"], "view must be one of position, pooled, mean_pooled"),
    ],
)
def test_wrong_arguments(path, words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = words if words[0] == "none.jsonl" else [str(path), *words]
    assert main(["monitor", *given]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_report_takes_the_file_too(path, capsys):
    assert main(["report", str(path)]) == 0
    assert "monitor report" in path.with_suffix(".html").read_text()
