import shutil
import subprocess

import pytest

from rgfast import cli

SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The script of every shell, as files."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        with pytest.MonkeyPatch.context() as patch, (folder / shell).open("w") as file:
            patch.setattr("sys.stdout", file)
            assert cli.main(["completion", shell]) == 0
    return folder


def completed(scripts, tmp_path, *words):
    """What bash offers for the last of ``words``, in a folder with known files."""
    (tmp_path / "models").mkdir(exist_ok=True)
    (tmp_path / "a text.txt").touch()
    lines = [
        f"source {scripts / 'bash'}",
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))',
        # complete -F runs the function as pressing Tab does.
        "$(complete -p rgfast | sed 's/.*-F \\([^ ]*\\).*/\\1/')",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines), "-", "rgfast", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["swe"], ["sweep"]),
        (["--ver"], ["--version"]),
        (["sweep", "--no"], [""]),
        (["--debug", "swe"], ["sweep"]),
        (["sweep", "--de"], ["--design", "--debug"]),
        (["sweep", "--design", ""], ["xi", "relevance"]),
        (["sweep", "--quick", "--design", "r"], ["relevance"]),
        (["reproduce", "--preset", "f"], ["full"]),
        (["sweep", "--seeds", "1", ""], [""]),
        (["sweep", "--seeds", "1", "2", "--des"], ["--design"]),
        (["sweep", "--out", "m"], ["models"]),
        (["sweep", "--out", "a"], [""]),  # a file is no folder
        (["reproduce", "--config", "a"], ["a text.txt"]),
        (["completion", ""], ["bash", "zsh", "fish", "tcsh", "powershell"]),
        (["reproduce", "--chain", "a"], ["a text.txt"]),
        (["probe", "m"], ["models"]),
        (["report", "a"], ["a text.txt"]),
    ],
)
def test_bash_offers(scripts, tmp_path, words, offered):
    assert completed(scripts, tmp_path, *words) == offered


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_option_is_in_every_script(scripts, shell):
    text = (scripts / shell).read_text()
    for name, parser in cli.build_parser().commands().items():
        assert name in text
        for option in parser.option_names():
            assert option.lstrip("-") in text


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_takes_its_script(scripts, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", scripts / shell], check=True)


def test_what_is_a_file_or_a_folder_is_completed_as_one():
    """The names that values have in the help decide it: a new name is to be thought about."""
    shown = {
        str(action.metavar)
        for parser in cli.build_parser().commands().values()
        for action in parser.options()
        if action.nargs != 0 and not action.choices
    }
    paths = {"A", "B", "DIR", "FILE", "LABEL", "MODEL", "SOURCE"}
    others = {"AXES", "T", "N", "WHAT", "NAME", "NAME=WHAT", "PAIR", "SIZE", "VIEW", "XI", "S"}
    assert shown - paths == others
    assert paths <= shown


def test_fish_offers(scripts):
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    for words, offered in (("sweep --design ", {"xi", "relevance"}), ("compl", {"completion"})):
        text = f"source {scripts / 'fish'}; complete -C 'rgfast {words}'"
        done = subprocess.run(["fish", "-c", text], capture_output=True, text=True, check=True)
        assert {line.split("\t")[0] for line in done.stdout.splitlines()} == offered
