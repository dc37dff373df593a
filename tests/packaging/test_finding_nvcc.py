"""What a build says of kernels for GPUs: found, left out with a reason, or demanded in vain."""

import shutil
import stat
import sys

import pytest
from build_tools import ROOT, execute, tool

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the compilers here are shell scripts")

PROJECT = """
cmake_minimum_required(VERSION 3.20)
project(only_kernels LANGUAGES NONE)
option(RGFAST_REQUIRE_CUDA "" OFF)
set(CMAKE_CXX_COMPILER c++)
include(csrc/cuda/fatbin.cmake)
"""
NVCC = """#!/bin/sh
case "$*" in
  --list-gpu-arch) printf '%s\\n' {known} ;;
  *) {compiles} ;;
esac
"""
DEMANDED = "rgfast: the kernels for GPUs cannot be built: "
LEFT_OUT = "rgfast: building without kernels for GPUs: "


@pytest.fixture
def configure(tmp_path):
    """CMake over the part of the build that is about kernels: its code, and what it said in one line."""
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    shutil.copy(ROOT / "csrc" / "cuda" / "fatbin.cmake", tmp_path / "csrc" / "cuda")

    def run(*words, **environment):
        path = str(tool("cmake").parent)
        make = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
        done = execute(
            tool("cmake"), "-S", tmp_path, "-B", tmp_path / "build", "-G", "Ninja", make, *words,
            PATH=path, **environment,
        )  # fmt: skip
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    return run


@pytest.fixture
def nvcc(tmp_path):
    """Writes a script that stands for a compiler of kernels, and gives the option that names it."""

    def make(known=("compute_80", "compute_90"), compiles="exit 0"):
        path = tmp_path / "nvcc"
        path.write_text(NVCC.format(known=" ".join(known), compiles=compiles))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return f"-DRGFAST_NVCC={path}"

    return make


def nowhere(tmp_path):
    """Options by which CMake finds no program, wherever nvcc may lie on this machine."""
    (tmp_path / "empty").mkdir()
    return f"-DCMAKE_FIND_ROOT_PATH={tmp_path / 'empty'}", "-DCMAKE_FIND_ROOT_PATH_MODE_PROGRAM=ONLY"


def test_without_nvcc_a_build_goes_on_and_says_so_or_is_an_error(configure, tmp_path):
    options = nowhere(tmp_path)
    code, said = configure(*options)
    assert code == 0
    assert f"{LEFT_OUT}there is no nvcc" in said
    for code, said in (
        configure(*options, RGFAST_REQUIRE_CUDA="1"),
        configure(*options, "-DRGFAST_REQUIRE_CUDA=ON"),
    ):
        assert code != 0
        assert f"{DEMANDED}there is no nvcc" in said


def test_an_nvcc_that_does_not_work_is_as_good_as_none(configure, nvcc):
    broken = nvcc(compiles="echo no host compiler fits >&2; exit 1")
    code, said = configure(broken)
    assert (code, f"{LEFT_OUT}{broken.partition('=')[2]} cannot compile: no host compiler fits" in said) == (
        0,
        True,
    )
    code, said = configure(broken, RGFAST_REQUIRE_CUDA="1")
    assert code != 0
    assert "cannot compile: no host compiler fits" in said
    code, said = configure("-DRGFAST_NVCC=/no/nvcc")
    assert (code, f"{LEFT_OUT}/no/nvcc does not run" in said) == (0, True)


def test_none_of_the_architectures_is_no_kernel(configure, nvcc):
    code, said = configure(nvcc(), RGFAST_CUDA_ARCHS="none")
    assert (code, f"{LEFT_OUT}RGFAST_CUDA_ARCHS is 'none'" in said) == (0, True)
    code, said = configure(nvcc(), RGFAST_CUDA_ARCHS="none", RGFAST_REQUIRE_CUDA="1")
    assert code != 0
    assert f"{DEMANDED}RGFAST_CUDA_ARCHS is 'none'" in said


def test_architectures_are_those_that_are_asked_for_or_the_usual_ones_that_nvcc_knows(configure, nvcc):
    code, said = configure(nvcc())
    assert code == 0
    assert "no kernels for sm_100, which" in said
    assert "for 80;90, PTX of 80" in said
    _, said = configure(nvcc(), RGFAST_CUDA_ARCHS="90, 80")
    assert "for 80;90, PTX of 80" in said
    code, said = configure(nvcc(), RGFAST_CUDA_ARCHS="90,75")
    assert code != 0
    assert "RGFAST_CUDA_ARCHS must name some of 80, 90, which" in said
    assert "or be 'none', got '75'" in said


def test_the_paper_is_repeated_without_kernels_for_gpus():
    def steps(target: str) -> str:
        return execute("make", "--dry-run", "--directory", ROOT, "--assume-new=pyproject.toml", target).stdout

    (installs,) = [line for line in steps("reproduce").splitlines() if "--editable" in line]
    assert installs.startswith("RGFAST_CUDA_ARCHS=none ")
    assert "RGFAST_CUDA_ARCHS=${RGFAST_CUDA_ARCHS:-90} " in steps("lint")
