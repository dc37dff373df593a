"""Functions lent to packages below: found at first use, and every name has its function."""

import subprocess
import sys

import pytest

import rgfast  # noqa: F401 (registers the functions)
from rgfast import wiring


def test_every_lent_name_is_a_function():
    assert wiring._LENT
    for name in wiring._LENT:
        assert callable(wiring.lent(name)), name


def test_an_unknown_name_is_refused():
    with pytest.raises(LookupError, match=r"name must be one of as_html, .*, got 'nothing'"):
        wiring.lent("nothing")


def test_a_result_needs_no_drawing_until_it_is_drawn():
    code = (
        "import sys, torch, rgfast\n"
        "stack = rgfast.ResidualStack(4, 2, mixing='none')\n"
        "result = rgfast.probe(stack, torch.randn(64, 3, 4), progress=False)\n"
        "result.order_parameter(), repr(result), result.to_dataframe()\n"
        "above = ('matplotlib', 'rgfast.report', 'rgfast.flow')\n"
        "loaded = [name for name in sys.modules if name.startswith(above)]\n"
        "assert not loaded, loaded\n"
        "result.plot_rank()\n"
        "assert 'rgfast.report.accessor' in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
