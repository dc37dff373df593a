"""The source distribution, and an environment it is installed into where there is no compiler."""

import os
import subprocess
import sys
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
from build_tools import ROOT, execute, tool


@dataclass(frozen=True)
class Bare:
    """An environment that has this one's dependencies, and a PATH on which CMake and Ninja stand alone."""

    home: Path
    path: Path

    @property
    def bin(self) -> Path:
        return self.home / ("Scripts" if os.name == "nt" else "bin")

    @property
    def site(self) -> Path:
        return next(self.home.rglob("site-packages"))

    def run(self, program: str, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        nowhere = str(self.path / "no-compiler")
        return execute(
            self.bin / program,
            *words,
            cwd=self.path,
            PATH=str(self.path),
            CXX=nowhere,
            CC=nowhere,
            **environment,
        )

    def install(self, source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """``pip install source``, with what stands in ``environment`` set; nothing is fetched."""
        return self.run(
            "python", "-m", "pip", "install", "--verbose", "--no-index", "--no-build-isolation", "--no-deps",
            "--ignore-installed", "--disable-pip-version-check", source, **environment,
        )  # fmt: skip


def empty(home: Path) -> Bare:
    """An environment in ``home`` without rgfast."""
    venv.create(home / "env", symlinks=os.name != "nt")
    path = home / "path"
    path.mkdir()
    for name in ("cmake", "ninja"):
        (path / name).symlink_to(tool(name))
    made = Bare(home / "env", path)
    # Folders of a .pth file come last and their own .pth files are not read: an editable rgfast is not seen.
    folders = [each for each in sys.path if Path(each).name in ("site-packages", "dist-packages")]
    (made.site / "dependencies.pth").write_text("\n".join(folders) + "\n", encoding="utf-8")
    return made


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Bare:
    return empty(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make wheel`` leaves, made by the tools of this environment."""
    out = tmp_path_factory.mktemp("wheel")
    tools = [f"BIN={Path(sys.executable).parent}", f"WHEELS={out}"]
    done = execute(
        "make", "--directory", ROOT, "--assume-old=.venv/.dev", "wheel", *tools, RGFAST_CUDA_ARCHS="90"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="session")
def with_wheel(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Bare:
    """An environment that the wheel is installed into, where there is no compiler."""
    made = empty(tmp_path_factory.mktemp("with_wheel"))
    done = made.install(wheel)
    assert done.returncode == 0, done.stdout + done.stderr
    return made


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    out = tmp_path_factory.mktemp("sdist")
    done = execute(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        if hasattr(tarfile, "data_filter"):
            packed.extractall(out, filter="data")
        else:
            packed.extractall(out)
    return out / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="session")
def installed(bare: Bare, sdist: Path) -> tuple[Bare, str]:
    """The environment with rgfast in it, and what the installation said."""
    done = bare.install(sdist)
    assert done.returncode == 0, done.stdout + done.stderr
    return bare, done.stdout + done.stderr
