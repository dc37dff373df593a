"""`make gpu-check` where there is no GPU: what it says, and its parts on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import gpu_check as script
import gpu_timing as timing
import pytest
import torch

from rgfast.bench import suite

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"gpu-check: there is no GPU here: torch {torch.__version__}")
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named_before_anything_is_done(monkeypatch, tmp_path, capsys):
    lacking = {"xarray", "pybind11"}
    find = script.importlib.util.find_spec
    monkeypatch.setattr(
        script.importlib.util, "find_spec", lambda name: None if name in lacking else find(name)
    )
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(script.subprocess, "run", lambda *args, **options: pytest.fail("something ran"))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "out")])
    assert script.main() == 2
    told = capsys.readouterr().err
    assert told == (f"gpu-check: {sys.executable} lacks xarray, pybind11, cmake, a C++ compiler\n")
    assert not (tmp_path / "out").exists()


def test_it_needs_no_more_than_it_names():
    """A process in which every other package is missing imports all that the checks import."""
    code = f"""
import sys
banned = {{"matplotlib", "joblib", "shtab", "h5netcdf", "h5py", "transformers", "sklearn"}}
banned |= {{"pytest_benchmark", "hypothesis"}}
assert not banned & {{*{script.MODULES!r}}}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in banned:
            raise ModuleNotFoundError(f"no {{name}}", name=name)
sys.meta_path.insert(0, Missing())
import torch, rgfast
assert "torch._dynamo" not in sys.modules  # it takes seconds, and more packages than are named
from rgfast.bench import suite
from rgfast.bench.probe import Case, check_last
assert check_last(Case.make("default", 3, 2, 8, 16, "cpu")).good
print("all right")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "all right", done.stderr


def test_one_json_and_one_table(kernel, tmp_path, monkeypatch, capsys):
    """The whole way with the GPU, the build, the tests and the sanitizers taken away."""
    monkeypatch.setattr(script, "why_no_gpu", lambda: None)
    monkeypatch.setattr(script, "missing", list)
    monkeypatch.setattr(script, "architecture", lambda: "90")
    monkeypatch.setattr(script, "build", lambda limit, architecture: "nvcc failed: it is too old")
    tested = {"passed": 3, "failed": {"a::b": "it is wrong"}, "skipped": {"c::d": "no reason"}}
    monkeypatch.setattr(script, "run_tests", lambda limit, out: tested)
    seen = {"memcheck": {"errors": 0, "told": "all is well"}, "racecheck": {"errors": 2, "told": "2 hazards"}}
    monkeypatch.setattr(script, "sanitize", lambda limit, out, tool: seen[tool])
    monkeypatch.setattr(script, "nvcc", lambda: "12.8")

    def run(command, **options):
        assert command[-2] == "--benchmark-until"
        assert options["env"]["XDG_CONFIG_HOME"] == str(tmp_path / "config")
        return subprocess.CompletedProcess(command, script.timed(2e9, tmp_path, "cpu", 0.001))

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path)])
    assert script.main() == 1
    document = json.loads((tmp_path / "gpu_check.json").read_text())
    assert document["format"] == "rgfast.gpu-check/2"
    assert document["tests"] == tested
    assert document["sanitizers"] == seen
    assert document["machine"]["versions"]["torch"] == torch.__version__
    rows = json.loads((tmp_path / "measured.json").read_text())["rows"]
    assert rows == document["bench"]["kernels"]
    table = (tmp_path / "gpu_check.md").read_text()
    assert table in capsys.readouterr().out
    for part in (
        "No kernels were compiled: nvcc failed: it is too old.",
        "3 passed, 1 failed, 1 skipped",
        "FAILED a::b: it is wrong",
        "- memcheck: all is well",
        "- FAILED racecheck: 2 hazards",
        "| toy | ones | cuda | library |",
        "| cka | ones |",
    ):
        assert part in table


GREEN = {"passed": 1, "failed": {}, "skipped": {}}


@pytest.mark.parametrize(
    ("kernels", "nvcc", "errors", "code"),
    [
        (None, "13.0", 0, 0),
        (None, "13.0", None, 0),
        (None, "13.0", 1, 1),
        ("there is no nvcc", "absent", 0, 0),
        ("nvcc failed: so", "13.0", 0, 1),
    ],
)
def test_what_the_exit_code_depends_on(tmp_path, monkeypatch, kernels, nvcc, errors, code):
    monkeypatch.setattr(script, "architecture", lambda: "90")
    monkeypatch.setattr(script, "build", lambda limit, architecture: kernels)
    monkeypatch.setattr(script, "run_tests", lambda limit, out: GREEN)
    monkeypatch.setattr(script, "sanitize", lambda limit, out, tool: {"errors": errors, "told": "so"})
    monkeypatch.setattr(script, "nvcc", lambda: nvcc)
    bench = {"gate": [], "failed": {}, "kernels": [], "rows": [], "skipped": {}, "not_run": [], "green": True}
    monkeypatch.setattr(script, "time_all", lambda until, out: bench)
    assert script.check(tmp_path, 8, keep_kernels=False) == code
    monkeypatch.setattr(script, "time_all", lambda until, out: bench | {"green": False})
    assert script.check(tmp_path, 8, keep_kernels=False) == 1


@pytest.mark.parametrize(
    ("codes", "runs", "failed"),
    [
        ([4, 4, 0], 3, {}),
        ([-11, 0], 2, {"case 0": "the process died"}),
        ([4, 1, 1], 2, {"the benchmark": "it left with 1"}),
        ([1], 1, {"the benchmark": "it left with 1"}),
    ],
)
def test_the_benchmark_is_taken_up_again_as_long_as_it_gets_further(
    tmp_path, monkeypatch, codes, runs, failed
):
    told = []

    def run(command, **options):
        code = codes[len(told)]
        log = timing.Log(tmp_path / "timing.json")
        if code != 1 and log.begin(f"case {len(told)}") and code >= 0:
            log.end()
        told.append(code)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(script.subprocess, "run", run)
    bench = script.time_all(2e9, tmp_path)
    assert (len(told), bench["failed"], bench["green"]) == (runs, failed, not failed)


def test_a_benchmark_that_is_out_of_time_has_not_failed(tmp_path, monkeypatch):
    def run(command, **options):
        timing.Log(tmp_path / "timing.json").begin("a long one")
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(script.subprocess, "run", run)
    bench = script.time_all(2e9, tmp_path)
    assert (bench["failed"], bench["not_run"], bench["green"]) == ({}, ["a long one"], True)


@pytest.mark.parametrize("name", suite.BENCHMARKS)
def test_every_case_for_a_gpu_can_be_made(name, monkeypatch):
    """Cases of a GPU, whose names say what is timed there; none of their data are made."""
    cases = [contest.case for contest in suite.BENCHMARKS[name].contests("cuda", "quick")]
    assert cases
    assert len({*cases}) == len(cases)
    if name == "probe":
        assert cases[-1] == "default, L=48 T=4 d=1024 n=4096"
    if name == "spectrum":
        assert "eigvalsh float64, 13 of d=768" in cases
