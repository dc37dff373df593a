"""What tests of several folders share, since it takes a while to make."""

import emulated
import pytest
from tiny import REPRODUCED

import rgfast

# These import Triton, in processes of their own.
collect_ignore_glob = ["gate/*triton*.py", "ops/*/triton_*.py"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A small reproduction, with its folder, which is only to be read."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return rgfast.reproduce(config=REPRODUCED, out=out, jobs=1, progress=False)


@pytest.fixture(scope="session")
def emulating_driver():
    return emulated.build()


@pytest.fixture
def emulated_gpu(emulating_driver, tmp_path, monkeypatch):
    """A GPU that runs the package's kernels on tensors of the CPU; see tests/cuda/emulated.py."""
    return emulated.install(emulating_driver, tmp_path, monkeypatch)
