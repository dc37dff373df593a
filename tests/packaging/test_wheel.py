"""The wheel of `make wheel`: its tag, and that it runs compiled kernels where there is no compiler."""

import json
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux")

USE = """
import json
import torch
import rgfast
from rgfast.runtime import native

x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
with rgfast.record() as log:
    value = float(rgfast.effective_rank(x))
print(json.dumps([rgfast.__file__, native.active_isa(), [each.impl for each in log], value]))
"""


def test_the_wheel_is_named_after_the_oldest_linux_it_runs_on(wheel):
    package, _, python, _, platform = wheel.stem.split("-")
    assert (package, python) == ("rgfast", f"cp{sys.version_info.major}{sys.version_info.minor}")
    assert platform.startswith("manylinux_2_")


def test_the_wheel_runs_compiled_kernels_without_a_compiler(with_wheel):
    assert "native     active" in with_wheel.run("rgfast", "info").stdout
    done = with_wheel.run("python", "-c", USE)
    assert done.returncode == 0, done.stderr
    place, isa, impls, value = json.loads(done.stdout)
    assert place.startswith(str(with_wheel.site))
    assert isa
    assert "native" in impls
    assert 15 < value < 16


def test_the_wheel_holds_the_compiled_module_and_no_sources(with_wheel):
    shipped = {path.suffix for path in (with_wheel.site / "rgfast").rglob("*") if path.is_file()}
    assert ".so" in shipped
    assert not shipped & {".cpp", ".hpp", ".o", ".a"}
