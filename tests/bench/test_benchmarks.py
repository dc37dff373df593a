"""What `benchmarks/` makes of the cases of `rgfast bench`, and the comparison of two source trees."""

import json
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch

from rgfast import dispatch
from rgfast.bench.timing import on_one_thread, threads
from rgfast.runtime.environment import facts

ROOT = Path(__file__).resolve().parents[2]

ROOM = """
from types import SimpleNamespace
import torch, rgfast
from rgfast.bench.timing import Absent, Checked, Contest

torch.set_num_threads(2)  # rivals are timed on one thread too, whatever the machine has

def check(x, impl):
    found = rgfast.eigvalsh(x, impl=impl)
    if impl == "reference":
        found = found + 1e-3
    return Checked(f"eigvalsh by {impl}", float((found - torch.linalg.eigvalsh(x)).abs().max()), 1e-12)

def absent(x):
    raise Absent("is not installed")

def contests(device, size):
    def data():
        a = torch.randn(3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return (a + a.mT).to(device)
    ours = lambda x, impl: lambda: rgfast.eigvalsh(x, impl=impl)
    rivals = {"plain": lambda x: lambda: torch.linalg.eigvalsh(x), "missing": absent}
    for name in ("both", size):
        yield Contest(name, data, ours, check, rivals, "eigvalsh", one_thread=True)

ROOM = SimpleNamespace(contests=contests)

def test_small(entry, time_checked):
    time_checked(entry)
"""


@pytest.fixture
def benchmarks(tmp_path):
    """Run pytest on a room whose reference is wrong; returns the process and what it saved."""
    shutil.copy(ROOT / "benchmarks" / "conftest.py", tmp_path)
    (tmp_path / "bench_small.py").write_text(ROOM)

    def run(*options):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            str(ROOT / "pyproject.toml"),
            f"--rootdir={tmp_path}",
        ]
        command += [str(tmp_path), "-p", "no:cacheprovider", "--benchmark-json=out.json", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        written = tmp_path / "out.json"
        return done, json.loads(written.read_text()) if written.exists() else None

    return run


def test_a_wrong_value_has_no_time_and_the_rest_share_a_table(benchmarks):
    done, found = benchmarks("--benchmark-only", "--benchmark-max-time=0.001", "-k", "cpu")
    assert done.returncode == 1
    assert "eigvalsh by reference: error 1.0e-03 is more than 1e-12; nothing is timed" in done.stdout
    assert "missing is not installed" in done.stdout
    named = [name for name in dispatch.implementations("eigvalsh", "cpu") if name != "reference"]
    timed = {"auto", *named, "plain", "plain on one thread"}
    tables = {}
    for each in found["benchmarks"]:
        tables.setdefault(each["group"], []).append(each["name"])
    # The quick and the full cases; the one that is both is timed once.
    assert {group: sorted(names) for group, names in tables.items()} == {
        f"{case} on cpu": sorted(timed) for case in ("both", "quick", "full")
    }
    assert found["machine_info"]["processor"] == facts()["cpu"]


def test_one_thread():
    with threads(2):
        assert on_one_thread(torch.get_num_threads)() == 1
        assert torch.get_num_threads() == 2


@pytest.fixture(scope="module")
def compare():
    spec = util.spec_from_file_location("compare_checkouts", ROOT / "benchmarks" / "compare_checkouts.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_trees_are_compared_by_their_paired_medians(compare):
    old = [
        {"a": 1.0, "b": 2.0, "gone": 1.0},
        {"a": 4.0, "b": 2.0, "gone": 1.0},
        {"a": 1.0, "b": 2.0, "gone": 1.0},
    ]
    new = [
        {"a": 2.0, "b": 1.0, "more": 1.0},
        {"a": 4.0, "b": 1.0, "more": 1.0},
        {"a": 2.0, "b": 1.0, "more": 1.0},
    ]
    lines = compare.table(old, new).splitlines()
    assert lines[2:] == [
        "| a | 1e+03 | 2e+03 | 2.000 | 1.00 to 2.00 |",
        "| b | 2e+03 | 1e+03 | 0.500 | 0.50 to 0.50 |",
        "",
        "geometric mean 1.000 over 2 cases",
        "slower by more than 10%: a",
        "only in OLD, not compared: gone",
        "only in NEW, not compared: more",
    ]


def test_trees_without_a_common_case(compare):
    with pytest.raises(SystemExit, match="no case in common"):
        compare.table([{"a": 1.0}], [{"b": 1.0}])


def test_a_tree_whose_interpreter_imports_another_is_refused(compare, tmp_path):
    (tmp_path / "package").symlink_to(ROOT)
    with pytest.raises(SystemExit, match=rf"imports rgfast from .*, not from {tmp_path}"):
        compare.measured(tmp_path, sys.executable, [])
