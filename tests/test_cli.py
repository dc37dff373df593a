import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rgfast
from rgfast import cli
from rgfast.commands import errors
from rgfast.commands.parser import parse

COMMANDS = cli.build_parser().commands()


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
        (["--seeds", "9223372036854775808"], "seeds must be below 2^63"),
        (["--chain", "missing.npy"], "missing.npy"),
        (["--chain", "two-scale:r=x"], "r must be a number"),
        (["--chain", "lazy", "other.npy"], "chains must be labels or one .npy file"),
        (["--config", os.devnull], "config must be a file"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", *words]) == errors.WRONG
    told = capsys.readouterr()
    assert told.out == ""
    assert message in told.err
    assert told.err.startswith("rgfast: ")
    assert told.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["reproduce", "--xi", "one"], "argument --xi: invalid float value: 'one'"),
        (["reproduce", "--preset", "slow"], "argument --preset: invalid choice: 'slow'"),
        (["reproduce", "--preset", "ful"], "(did you mean full?)"),
        (["sing"], "invalid choice: 'sing'"),
        (["reprodce"], "(did you mean reproduce?)"),
        (["sweep", "--seed", "3"], "unrecognized arguments: --seed (did you mean --seeds?)"),
        (["sweep", "--desing=xi"], "(did you mean --design?)"),
        (["probe", "m", "--tex", "a.txt"], "unrecognized arguments: --tex (did you mean --text?)"),
        (["probe", "--lenght", "3"], "unrecognized arguments: --lenght (did you mean --length?)"),
        (["probe", "m", "--GROUPS", "3"], "(did you mean --groups?)"),
        (["probe", "m", "--batch_size=3"], "(did you mean --batch-size?)"),
        (["probe", "m", "--g", "3"], "(did you mean --groups?)"),
        (
            ["probe", "m", "--input", "a", "--ot", "b"],
            "--input (did you mean --inputs?), --ot (did you mean --out?)",
        ),
        (["bench", "--only", "cak"], "(did you mean cka?)"),
        (["completion", "bsh"], "(did you mean bash?)"),
        (["--debgu", "info"], "unrecognized arguments: --debgu (did you mean --debug?)"),
        (["--versoin"], "(did you mean --version?)"),
        (["--json", "info"], "unrecognized arguments: --json (it goes after info)"),
        (["info", "everything"], "unrecognized arguments: everything"),
        (["reproduce", "--preset", "full", "--config", "x.json"], "not allowed with argument --preset"),
    ],
)
def test_wrong_usage_is_exit_code_2_with_the_usage_of_the_command(words, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == errors.WRONG
    told = capsys.readouterr().err
    own = words[0] if words and words[0] in COMMANDS else ""
    assert told.startswith(f"usage: rgfast {own}".strip())
    assert hint in told.splitlines()[-1]


def test_values_that_begin_with_a_dash_are_no_options():
    words = ["probe", "m", "--text", "-my file", "--layers", "-1", "--positions", "-3", "-1"]
    args = parse(cli.build_parser(), words)
    assert (args.text, args.layers, args.positions) == ("-my file", ["-1"], ["-3", "-1"])


@pytest.mark.parametrize("words", [[], ["--debug"]])
def test_without_a_command_it_prints_the_help(words, capsys):
    assert cli.main(words) == errors.DONE
    told = capsys.readouterr()
    assert told.out == cli.build_parser().format_help()
    assert told.err == ""


WITHOUT = """
import json, sys
from rgfast import cli
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        cli.main()
    except SystemExit:
        pass
    assert "matplotlib" not in sys.modules and "pandas" not in sys.modules, f"imported by {words}"
    print("\\f")
"""


def test_helps_and_info_import_no_matplotlib_and_mind_no_notebook():
    lines = [[], ["--help"], *([c, "--help"] for c in COMMANDS), ["completion", "bash"]]
    lines += [["info"], ["info", "--json"]]
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(lines)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    told = done.stdout.split("\f\n")
    assert len(told) == len(lines) + 1
    assert all(told[:-1])


def test_a_full_disk_behind_stdout_is_one_sentence():
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is of Linux")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "rgfast", "info"],
            stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False,
        )  # fmt: skip
    assert done.returncode == errors.WRONG
    assert done.stderr == "rgfast: stdout: No space left on device\n"


def test_a_file_in_place_of_the_output_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    for words in (["reproduce"], ["sweep", "--quick"], ["observe", "--quick"]):
        assert cli.main([*words, "--out", str(tmp_path / "file")]) == errors.WRONG
        assert "out must be a folder" in capsys.readouterr().err
        assert cli.main([*words, "--out", str(tmp_path / "file" / "below")]) == errors.WRONG
        assert "file" in capsys.readouterr().err


def test_the_help_of_the_whole_names_every_command_and_exit_code(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == errors.DONE
    told = capsys.readouterr().out
    for word in (*COMMANDS, "0 ", "1 ", "2 ", "70 ", "130 ", "--debug"):
        assert re.search(rf"^ +(-h, |-V, )?{re.escape(word)}", told, re.M), word


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_explains_it(name, capsys):
    """A description, a default for everything that can be left out, and examples that are accepted."""
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    command = COMMANDS[name]
    assert command.description
    instead = {action for group in command._mutually_exclusive_groups for action in group._group_actions}
    for action in command.options():
        assert action.help
        if action.nargs != 0 and action.option_strings and not action.required and action not in instead:
            assert "(default" in action.help, action.dest
    examples = re.findall(
        r"^  (?:[A-Z_]+=\w+ |torchrun .* -m )?(rgfast .*?)(?: +[>(].*)?$", command.epilog, re.M
    )
    assert len(examples) == len(command.epilog.splitlines()) - 1
    for example in examples:
        _, *words = shlex.split(example)
        assert parse(cli.build_parser(), words).command == name


def test_the_designs_of_a_sweep_are_described(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--help"])
    told = capsys.readouterr().out
    from rgfast.experiments.sweep import DESIGNS

    for name in DESIGNS:
        assert re.search(rf"^  {name}  +\w", told, re.M)


def test_info_names_versions_and_ops(capsys):
    assert cli.main(["info"]) == errors.DONE
    told = capsys.readouterr().out
    for word in ("torch", "native", "threads", "gpus", "residual_mlp", "spectrum", "cka", "RGFAST_ISA"):
        assert word in told


def test_info_as_json_says_the_same(capsys):
    assert cli.main(["info", "--json"]) == errors.DONE
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert {"versions", "cpu", "cores", "threads", "native", "gpus", "ops", "switches"} <= set(told)
    assert told["versions"]["rgfast"] == rgfast.__version__
    assert told["native"]["active"] == rgfast.runtime.native.active_isa()


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == errors.DONE
    assert capsys.readouterr().out == f"rgfast {rgfast.__version__}\n"


def test_a_closed_pipe_is_no_traceback():
    with subprocess.Popen(
        [sys.executable, "-m", "rgfast", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == errors.READER_GONE


def test_a_terminal_without_greek_is_served():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "rgfast", "reproduce", "--chain", "ξ"],
        capture_output=True,
        env=environment,
        check=False,
    )
    assert done.returncode == errors.WRONG
    assert done.stderr.startswith(b"rgfast: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"format": "rgfast.reproduce/1", "seeds": "x"}', "seeds must be a list"),
    ],
)
def test_a_damaged_config_is_one_sentence(text, message, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(text)
    words = ["reproduce", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "out")]
    assert cli.main(words) == errors.WRONG
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def matrices():
    row = np.full((3, 3), 1 / 3)
    return {
        "object": np.array([{}], dtype=object),
        "three": np.ones((3, 3)),
        "nan": np.full((3, 3), np.nan),
        "vector": np.ones(3),
        "complex": row * 1j,
    }


@pytest.mark.parametrize("name", matrices())
def test_a_wrong_matrix_is_one_sentence(name, tmp_path, capsys):
    np.save(tmp_path / f"{name}.npy", matrices()[name], allow_pickle=True)
    words = ["reproduce", "--chain", str(tmp_path / f"{name}.npy"), "--out", str(tmp_path / "out")]
    assert cli.main(words) == errors.WRONG
    told = capsys.readouterr().err
    assert f"{name}.npy" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is of Linux")
@pytest.mark.parametrize("command", ["reproduce", "sweep", "observe", "bench"])
def test_a_folder_that_cannot_be_made_is_one_sentence(command, capsys):
    assert cli.main([command, "--out", "/proc/rgfast"]) == errors.WRONG
    assert capsys.readouterr().err == "rgfast: /proc/rgfast: No such file or directory\n"
