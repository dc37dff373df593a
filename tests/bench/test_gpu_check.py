"""`make gpu-check` where there is no GPU: what it says, and its parts on the CPU."""

import json
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch

from rgfast.bench import suite
from rgfast.bench.timing import Checked, Contest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


@pytest.fixture
def script(monkeypatch):
    spec = util.spec_from_file_location("gpu_check", SCRIPT)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_what_is_missing_is_named_before_anything_is_done(script, monkeypatch, tmp_path, capsys):
    lacking = {"h5netcdf", "pybind11"}
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
    assert told == (f"gpu-check: {sys.executable} lacks h5netcdf, pybind11, cmake, a C++ compiler\n")
    assert not (tmp_path / "out").exists()


def test_it_needs_no_more_than_it_names(script):
    """A process in which every other package is missing imports all that the checks import."""
    code = f"""
import sys
banned = {{"matplotlib", "joblib", "shtab", "transformers", "sklearn", "pytest_benchmark", "hypothesis"}}
assert not banned & {{*{script.MODULES!r}}}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in banned:
            raise ModuleNotFoundError(f"no {{name}}", name=name)
sys.meta_path.insert(0, Missing())
import torch, rgfast
from rgfast.bench import suite
from rgfast.bench.probe import Case, check_last
assert check_last(Case.make("default", 3, 2, 8, 16, "cpu")).good
print("all right")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "all right", done.stderr


def test_tests_are_counted_with_their_sentences(script, tmp_path):
    found = script.run_tests(300, tmp_path, ("-k", "cka_and_drift and shape0"))
    assert found["failed"] == {}
    assert found["passed"] == 2 if not torch.cuda.is_available() else 4
    if not torch.cuda.is_available():
        assert {*found["skipped"].values()} == {"there is no GPU that torch finds"}
        nothing = script.run_tests(300, tmp_path, ("-m", "gpu", "-k", "cka_and_drift"))
        assert nothing["failed"] == {"all": "no test ran"}


def test_a_failing_test_is_named(script, tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    (root / "tests/gpu").mkdir(parents=True)
    (root / "tests/gpu/pytest.ini").write_text((ROOT / "tests/gpu/pytest.ini").read_text())
    (root / "tests/gpu/test_it.py").write_text("def test_wrong():\n    assert 1 == 2, 'one is not two'\n")
    monkeypatch.setattr(script, "ROOT", root)
    found = script.run_tests(100, tmp_path, ())
    assert list(found["failed"]) == ["test_it::test_wrong"]
    assert "one is not two" in found["failed"]["test_it::test_wrong"]


@pytest.fixture
def small(monkeypatch):
    def contests(device, size):
        right = Checked("right", 0.0, 1.0)
        for name in ("first", "second"):
            yield Contest(
                name, lambda: 1, lambda x, impl: int, lambda x, impl: right, {"rival": lambda x: int}
            )
        wrong = Checked("it is off", 2.0, 1.0)
        yield Contest("bad", lambda: 1, lambda x, impl: int, lambda x, impl: wrong, {"rival": lambda x: int})

    for name, module in suite.BENCHMARKS.items():
        monkeypatch.setattr(module, "contests", contests if name == "spectrum" else lambda *_: iter(()))


def test_the_benchmark_writes_as_it_goes_and_tells_wrong_values(script, small, tmp_path):
    assert script.benchmark(2e9, tmp_path, "cpu", 0.001) == 1
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [row["case"] for row in found["rows"]] == ["first", "second"]
    assert [check["name"] for check in found["gate"]] == ["it is off"]
    assert found["not_run"] == []


def test_what_does_not_fit_the_time_is_said(script, small, tmp_path):
    assert script.benchmark(0.0, tmp_path, "cpu", 0.001) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["not_run"] == ["spectrum: first", "spectrum: second", "spectrum: bad"]
    assert found["rows"] == []


def test_one_json_and_one_table(script, small, tmp_path, monkeypatch, capsys):
    """The whole way with the GPU, the build and the tests taken away."""
    monkeypatch.setattr(script, "why_no_gpu", lambda: None)
    monkeypatch.setattr(script, "missing", list)
    monkeypatch.setattr(script, "build", lambda limit: None)
    tested = {"passed": 3, "failed": {"a::b": "it is wrong"}, "skipped": {"c::d": "no reason"}}
    monkeypatch.setattr(script, "run_tests", lambda limit, out: tested)

    def run(command, **options):
        assert command[-2] == "--benchmark-until"
        return subprocess.CompletedProcess(command, script.benchmark(2e9, tmp_path, "cpu", 0.001))

    monkeypatch.setattr(script, "nvcc", lambda: "12.8")
    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path)])
    assert script.main() == 1
    document = json.loads((tmp_path / "gpu_check.json").read_text())
    assert document["format"] == "rgfast.gpu-check/1"
    assert document["tests"] == tested
    assert document["machine"]["versions"]["torch"] == torch.__version__
    table = (tmp_path / "gpu_check.md").read_text()
    assert table in capsys.readouterr().out
    for part in (
        "3 passed, 1 failed, 1 skipped",
        "FAILED a::b: it is wrong",
        "WRONG it is off",
        "| spectrum | first |",
    ):
        assert part in table


def test_it_builds_the_compiled_module_by_what_is_there(script, tmp_path, monkeypatch):
    told = []

    def run(words, **options):
        told.append(words)
        assert options["check"]
        if "--build" in words:
            folder = Path(words[2])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"_native{script.importlib.machinery.EXTENSION_SUFFIXES[0]}").write_text("built")

    (tmp_path / "rgfast").mkdir()
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script.subprocess, "run", run)
    script.build(10)
    assert [words[:2] for words in told] == [["cmake", "-S"], ["cmake", "--build"]]
    assert f"-DPython_EXECUTABLE={sys.executable}" in told[0]
    (built,) = (tmp_path / "rgfast").iterdir()
    assert built.read_text() == "built"


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
