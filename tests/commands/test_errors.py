import errno

import numpy as np
import pytest

from rgfast import cli, validation
from rgfast.commands import errors
from rgfast.commands.errors import sentence
from rgfast.dispatch import ImplUnavailable
from rgfast.files import write_text


def raised(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def in_our_module(text):
    """Run ``text`` as if it stood in a module of the package."""
    return raised(lambda: exec(text, {"__name__": "rgfast.probing.run"}))


@pytest.mark.parametrize("words", ["raise ValueError('n')", "raise TypeError('n')", "raise OSError('n')"])
def test_a_check_of_ours_is_a_sentence(words):
    assert sentence(in_our_module(words)) == "n"


def test_a_check_inside_with_and_try_is_a_sentence():
    nested = """
from contextlib import nullcontext
with nullcontext():
    try:
        raise ValueError('n')
    finally:
        pass
"""
    assert sentence(in_our_module(nested)) == "n"
    chained = "try:\n    int('x')\nexcept ValueError as error:\n    raise ValueError('n') from error"
    assert sentence(in_our_module(chained)) == "n"
    again = "try:\n    raise ValueError('n')\nexcept ValueError:\n    raise"
    assert sentence(in_our_module(again)) == "n"


@pytest.mark.parametrize(
    "words",
    ["int('x')", "[].remove(1)", "len(3)", "import math\nmath.sqrt(-1)", "{}['x']", "raise KeyError('x')"],
)
def test_a_defect_of_ours_is_none(words):
    assert sentence(in_our_module(words)) is None


def test_what_a_library_raises_is_none():
    assert sentence(raised(lambda: np.zeros(2) + np.zeros(3))) is None
    assert (
        sentence(raised(lambda: exec("import json\njson.loads('{')", {"__name__": "rgfast.files"}))) is None
    )


def test_real_checks_and_the_systems_errors_are_sentences(tmp_path):
    error = raised(lambda: validation.check_positive_int(0, "jobs"))
    assert sentence(error) == "jobs must be at least 1, got 0"
    missing = raised(lambda: (tmp_path / "absent").read_text())
    assert sentence(missing) == f"{tmp_path / 'absent'}: No such file or directory"
    lost = raised(lambda: write_text(tmp_path / "absent" / "a.txt", "a"))
    assert str(tmp_path / "absent" / "a.txt") in sentence(lost)
    assert "there is no folder" in sentence(lost)
    assert sentence(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert sentence(ImplUnavailable("no module")) == "no module"
    assert sentence(FloatingPointError("diverged")) == "diverged"


@pytest.fixture
def failing(monkeypatch):
    """Make ``rgfast info`` fail in a way of one's own."""

    def arrange(error):
        def fail():
            raise error

        monkeypatch.setattr("rgfast.runtime.environment.describe", fail)

    return arrange


def test_a_defect_has_its_own_code_and_names_debug(failing, capsys):
    failing(ValueError("operands could not be\n  broadcast"))
    assert cli.main(["info"]) == errors.UNEXPECTED
    told = capsys.readouterr()
    expected = "unexpected ValueError: operands could not be broadcast (--debug shows where it comes from)"
    assert (told.out, told.err) == ("", f"rgfast: {expected}\n")
    failing(KeyError("view"))
    assert cli.main(["info"]) == errors.UNEXPECTED
    assert "unexpected KeyError: 'view'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--debug", "info"], ["info", "--debug"]])
def test_debug_shows_the_traceback_before_and_after_the_command(failing, capsys, words):
    failing(RuntimeError("deep inside"))
    assert cli.main(words) == errors.UNEXPECTED
    told = capsys.readouterr().err
    assert told.startswith("Traceback (most recent call last)")
    assert "in fail" in told


def test_debug_keeps_the_code_of_wrong_input(tmp_path, capsys):
    assert cli.main(["reproduce", "--xi", "0", "--out", str(tmp_path / "x"), "--debug"]) == errors.WRONG
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("Traceback")
    assert told[-1] == "rgfast: xi must be finite and > 0, got 0"


def test_an_interrupt_is_130(failing, capsys):
    failing(KeyboardInterrupt())
    assert cli.main(["info"]) == errors.INTERRUPTED
    assert capsys.readouterr().err == "rgfast: interrupted\n"
