"""Imports point one way: the contracts in pyproject.toml hold, and a bad import breaks the one it should."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# An editable install finds its own package before PYTHONPATH is asked.
LINT = """
import sys
from importlib.machinery import PathFinder
sys.meta_path.insert(0, PathFinder)
from importlinter.cli import lint_imports
sys.exit(lint_imports(config_filename="pyproject.toml", no_cache=True, no_logo=True))
"""
LAYERS = "A package imports only packages below it"
CIRCLES = "Neither packages nor modules import each other in a circle"
WHOLE = "Only the benchmarks import the package as its users do"
CHAINS = "The probe knows nothing of Markov chains and of training"
SAVED = "Flow and report take only results from the probe"
MODEL = "Flow and report work without a model"
MOMENTS = "The products of moments know nothing of streams and of other ops"


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """What the import linter says of the package in ``root``."""
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"}
    command = [sys.executable, "-c", LINT]
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def broken(output: str) -> set[str]:
    return {line.partition(" BROKEN")[0] for line in output.splitlines() if " BROKEN" in line}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package's Python files and the contracts, to be spoiled."""
    shutil.copytree(
        ROOT / "rgfast", tmp_path / "rgfast", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_contract_is_kept() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (LAYERS, CIRCLES, WHOLE, CHAINS, SAVED, MODEL, MOMENTS):
        assert f"{name} KEPT" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contracts"),
    [
        ("ops/cka/checks", "from rgfast.stack import ResidualStack", {LAYERS, CIRCLES}),
        ("probing/result", "from rgfast.report.accessor import plot_rank", {LAYERS, CIRCLES}),
        ("probing/frame", "from rgfast.chains import MarkovChain", {CHAINS, MODEL}),
        ("probing/checkpoint", "def late():\n    from rgfast.training import train", {CHAINS}),
        ("report/extract", "def late():\n    from rgfast.probing.plan import Plan", {SAVED}),
        ("flow/curves", "from rgfast.probing.watch import Probe", {SAVED, MODEL}),
        ("flow/curves", "from rgfast.flow.verdicts import judge", {CIRCLES}),
        ("flow/curves", "import rgfast", {WHOLE}),
        ("ops/moments/api", "from rgfast.streaming import Pairs", {MOMENTS}),
        ("unplaced/__init__", "", {LAYERS}),
    ],
)
def test_a_bad_import_breaks_its_contracts(copy: Path, module: str, line: str, contracts: set[str]) -> None:
    path = copy / "rgfast" / f"{module}.py"
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    done = lint(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert contracts <= broken(done.stdout), done.stdout
