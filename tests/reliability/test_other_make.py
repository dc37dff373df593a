"""The preloaded library: what it makes of the processor, and that real violations stay what they are."""

import subprocess
import sys

import pytest
from other_make import build, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory):
    library = build(tmp_path_factory.mktemp("other_make"))

    def run(code):
        environment = {"LD_PRELOAD": str(library), "MKL_VERBOSE": "1"}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    return run


def test_the_library_of_products_takes_another_path(preloaded):
    code = "import torch; a = torch.ones(8, 8, dtype=torch.float64); a @ a; print(torch.get_num_threads())"
    done = preloaded(code)
    assert done.returncode == 0, done.stderr
    if "MKL_VERBOSE" in done.stdout:
        assert "AVX-512" not in done.stdout
        assert "Intel(R) Architecture processors" in done.stdout


def test_a_real_violation_still_ends_the_process(preloaded):
    assert preloaded("import ctypes; ctypes.string_at(0)").returncode == -11
