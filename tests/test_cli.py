import subprocess
import sys

import pytest

from rgfast import cli


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--xi", "0"], "xi must be finite and > 0, got 0"),
        (["--xi", "nan"], "xi must be finite and > 0, got nan"),
        (["--xi", "inf"], "xi must be finite and > 0, got inf"),
        (["--seeds", "-1"], "seeds must be whole numbers >= 0, got -1"),
        (["--chain", "two-scale:K=3"], "divi"),
        (["--config", "missing.json"], "config must be a file, and missing.json is none"),
        (["--jobs", "0"], "jobs must be at least 1, got 0"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert message in told.err
    assert told.err.startswith("rgfast: ")
    assert told.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [[], ["reproduce", "--xi", "one"], ["reproduce", "--preset", "slow"], ["sing"]]
)
def test_wrong_usage_is_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "usage: rgfast" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="xi must be"):
        cli.main(["--debug", "reproduce", "--xi", "0", "--out", str(tmp_path / "x")])


def test_info_names_versions_and_ops(capsys):
    assert cli.main(["info"]) == 0
    told = capsys.readouterr().out
    for word in ("torch", "native", "threads", "gpus", "residual_mlp", "spectrum", "cka", "RGFAST_ISA"):
        assert word in told


def test_the_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "rgfast", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("rgfast ")
