"""What is shipped, and what comes of it on a machine without a compiler."""

import shutil
from email import message_from_string
from pathlib import Path

import pytest

import rgfast
from rgfast.runtime import native

ROOT = Path(__file__).resolve().parents[2]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def package_files() -> set[str]:
    """All that belongs to the package in this tree: code, types, script and style of pages, README files."""
    kept = {".py", ".pyi", ".typed", ".js", ".css", ".md"}
    return {f"rgfast/{name}" for name in files(ROOT / "rgfast") if Path(name).suffix in kept} | {
        "rgfast/py.typed"
    }


def test_the_source_distribution_has_what_a_build_needs_and_nothing_else(sdist):
    not_built = ("tests/", "driver/tests/", "cuda/tests/", "cuda/shim/")
    native_sources = {f"csrc/{name}" for name in files(ROOT / "csrc") if not name.startswith(not_built)}
    assert "csrc/bind/module.cpp" in native_sources
    # An installation from it, in whichever test came first, builds in a folder of its own.
    assert {name for name in files(sdist) if not name.startswith("build/")} == (
        package_files()
        | native_sources
        | {
            "CMakeLists.txt",
            "pyproject.toml",
            "PKG-INFO",
            "README.md",
            "LICENSE",
            "CHANGELOG.md",
            "CONTRIBUTING.md",
        }
    )


def test_an_installation_without_a_compiler_says_so_and_is_the_package(installed):
    bare, said = installed
    assert "there is no C++ compiler" in said
    assert "built WITHOUT the compiled module" in said
    (info,) = bare.site.glob("rgfast-*.dist-info")
    assert "Tag: py3-none-any" in (info / "WHEEL").read_text(encoding="utf-8").splitlines()
    shipped = {name for name in files(bare.site) if name.startswith("rgfast/") and "__pycache__" not in name}
    assert shipped == package_files()
    metadata = message_from_string((info / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Version"] == rgfast.__version__
    assert "MIT" in (info / "licenses" / "LICENSE").read_text(encoding="utf-8")
    assert (info / "entry_points.txt").read_text(encoding="utf-8").split() == [
        "[console_scripts]", "rgfast", "=", "rgfast.cli:main",
    ]  # fmt: skip


@pytest.mark.parametrize("what", ["NATIVE", "CUDA"])
def test_what_is_compiled_can_be_demanded(bare, sdist, what):
    done = bare.install(sdist, **{f"RGFAST_REQUIRE_{what}": "1"})
    assert done.returncode != 0
    assert "there is no C++ compiler" in done.stdout + done.stderr


USE = """
import warnings
from pathlib import Path

import torch
import rgfast

assert Path(rgfast.__file__).is_relative_to({site!r}), rgfast.__file__
x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
with warnings.catch_warnings(record=True) as told, rgfast.record() as log:
    warnings.simplefilter("always")
    value = float(rgfast.effective_rank(x))
warned = sum(each.category is rgfast.FallbackWarning for each in told)
print(*{{each.impl for each in log}}, warned, value)
"""


def test_what_is_installed_runs_and_gains_the_compiled_module_when_it_is_put_there(installed):
    bare, _ = installed
    told = bare.run("rgfast", "info").stdout
    assert "absent, so every op runs its reference in PyTorch: " in told
    assert "No module named 'rgfast._native'" in told
    use = USE.format(site=str(bare.site))
    plain = bare.run("python", "-c", use)
    assert plain.returncode == 0, plain.stderr
    *impl, warned, value = plain.stdout.split()
    assert (impl, warned) == (["reference"], "1")

    module = Path(native.load().__file__)
    there = bare.site / "rgfast" / module.name
    shutil.copy(module, there)
    try:
        fast = bare.run("python", "-c", use)
    finally:
        there.unlink()
    assert fast.returncode == 0, fast.stderr
    *impl, warned, same = fast.stdout.split()
    assert (impl, warned) == (["native"], "0")
    assert abs(float(same) / float(value) - 1) < 1e-10
