"""The wheel of `make wheel`: its tag, and that it runs compiled kernels where there is no compiler."""

import json
import sys
from shutil import which

import pytest
from elftools.elf.elffile import ELFFile

from rgfast.runtime import native

WITHOUT = "the package was built without kernels for GPUs, for which it takes nvcc"

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
    assert not shipped & {".cpp", ".hpp", ".o", ".a", ".cu", ".cuh"}


def test_the_wheel_holds_kernels_for_gpus_if_there_is_a_compiler_for_them(with_wheel):
    told = with_wheel.run("rgfast", "info", "--json")
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)["cuda"]
    if found["compiled"] is None:
        assert which("nvcc") is None
        assert found["absent"] == WITHOUT
        return
    assert found["compiled"] == "sm_90 and PTX of sm_90"
    assert found["nvcc"].partition(".")[0] in ("12", "13")
    # Opened by name when it is wanted: a name that there is no library of is refused with a sentence.
    nowhere = with_wheel.run("rgfast", "info", "--json", RGFAST_CUDA_DRIVER="libno-such-driver.so")
    assert "there is no CUDA driver" in json.loads(nowhere.stdout)["cuda"]["absent"]


def test_the_wheel_without_kernels_for_gpus_says_so_and_is_the_same_otherwise(with_wheel, tmp_path):
    """What a build makes that finds no nvcc."""
    kernels = with_wheel.site / "rgfast" / "_kernels.fatbin"
    if kernels.exists():
        kernels.rename(tmp_path / kernels.name)
    try:
        told, done = with_wheel.run("rgfast", "info"), with_wheel.run("python", "-c", USE)
    finally:
        if (tmp_path / kernels.name).exists():
            (tmp_path / kernels.name).rename(kernels)
    assert f"cuda       {WITHOUT}" in told.stdout.splitlines()
    assert "native" in json.loads(done.stdout)[2], done.stderr


def needed(path):
    """Libraries that an ELF file asks the loader for."""
    with open(path, "rb") as file:  # noqa: PTH123 - what the reader takes
        section = ELFFile(file).get_section_by_name(".dynamic")
        return {tag.needed for tag in section.iter_tags() if tag.entry.d_tag == "DT_NEEDED"}


@pytest.mark.parametrize("where", ["here", "wheel"])
def test_the_module_links_no_library_of_cuda_or_torch(request, where):
    """A runtime of CUDA that comes along evicts the one that torch has."""
    if where == "here":
        module = native.load().__file__
    else:
        (module,) = (request.getfixturevalue("with_wheel").site / "rgfast").glob("_native*.so")
    system = ("libc.", "libm.", "libstdc++.", "libgcc_s.", "libpthread.", "libdl.", "ld-linux", "librt.")
    assert [name for name in needed(module) if not name.startswith(system)] == []
