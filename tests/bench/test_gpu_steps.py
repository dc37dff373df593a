"""The steps of `make gpu-check`: building, tests in processes of their own, sanitizers."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu_steps as steps
import pytest
import torch

from rgfast.runtime import known_answers
from rgfast.runtime.known_answers import KnownAnswer

ROOT = Path(__file__).resolve().parents[2]


def test_tests_are_counted_with_their_sentences(tmp_path):
    found = steps.run_tests(300, tmp_path, ("-k", "cka_and_drift and shape0"), "test_gpu_ops.py")
    assert found["failed"] == {}
    assert found["passed"] == 2 if not torch.cuda.is_available() else 4
    if not torch.cuda.is_available():
        assert {*found["skipped"].values()} == {"there is no GPU that torch finds"}
        nothing = steps.run_tests(300, tmp_path, files="test_gpu_ops.py")
        assert nothing["failed"] == {"all": "no test ran"}


def test_what_tests_import_is_found_by_the_checks_own_configuration(tmp_path):
    found = steps.run_tests(300, tmp_path, ("-m", "gpu", "--collect-only"), "test_gpu_triton.py")
    assert found["failed"] == {"all": "no test ran"}  # and none could not be collected


def checkout(monkeypatch, folder, **files):
    (folder / "tests/gpu").mkdir(parents=True)
    (folder / "tests/gpu/pytest.ini").write_text((ROOT / "tests/gpu/pytest.ini").read_text())
    for name, text in files.items():
        (folder / f"tests/gpu/test_{name}.py").write_text(text)
    monkeypatch.setattr(steps, "ROOT", folder)


def test_a_failing_test_is_named_and_a_file_that_dies_takes_no_other_with_it(tmp_path, monkeypatch):
    checkout(
        monkeypatch, tmp_path / "checkout",
        a_dies="import os\n\ndef test_it():\n    os._exit(7)\n",
        b_fails="def test_wrong():\n    assert 1 == 2, 'one is not two'\n",
        c_passes="def test_right():\n    pass\n",
    )  # fmt: skip
    found = steps.run_tests(100, tmp_path, ())
    assert list(found["failed"]) == ["test_a_dies", "test_b_fails::test_wrong"]
    assert found["failed"]["test_a_dies"] == "pytest left with 7"
    assert "one is not two" in found["failed"]["test_b_fails::test_wrong"]
    assert found["passed"] == 1


HANGS = """
import pytest
import time

@pytest.mark.parametrize("what", ["passes", "fails", "hangs"])
def test_it(what):
    assert what != "fails"
    if what == "hangs":
        time.sleep(300)
"""


def test_tests_that_hang_are_stopped_and_those_before_count(tmp_path, monkeypatch):
    checkout(monkeypatch, tmp_path / "checkout", hangs=HANGS)
    found = steps.run_tests(15, tmp_path, ("-p", "no:randomly"))
    assert found == {
        "passed": 1,
        "failed": {
            "test_hangs": "it was stopped after 15 s",
            "test_hangs::test_it[fails]": "see what was printed",
        },
        "skipped": {},
    }


@pytest.fixture
def building(tmp_path, monkeypatch):
    """CMake in its place: it makes what is asked for unless `wrong` says otherwise."""
    asked, wrong = [], {}

    def run(words, limit):
        asked.append(words)
        done = subprocess.CompletedProcess(words, 0, wrong.get("configuring", ""))
        if "--build" in words:
            folder = tmp_path / "build" / "gpu-check"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"_native{steps.importlib.machinery.EXTENSION_SUFFIXES[0]}").write_text("built")
            if "_kernels" in words and "nvcc" in wrong:
                done = subprocess.CompletedProcess(words, 1, f"1 of 2\n{wrong['nvcc']}\nstopped\n")
            elif "_kernels" in words:
                (folder / "_kernels.fatbin").write_text("compiled")
        elif wrong.get("architecture") and "-DRGFAST_CUDA_ARCHS=90" in words:
            done = subprocess.CompletedProcess(words, 1, f"CMake Error: {wrong['architecture']}\n")
        return done

    (tmp_path / "rgfast").mkdir()
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    monkeypatch.setattr(steps, "_run", run)
    return SimpleNamespace(
        asked=asked, wrong=wrong, built=lambda: sorted(p.name for p in (tmp_path / "rgfast").iterdir())
    )


def test_it_builds_the_module_and_kernels_by_what_is_there(building, tmp_path):
    suffix = steps.importlib.machinery.EXTENSION_SUFFIXES[0]
    assert steps.build(10, "90") is None
    assert [words[:2] for words in building.asked] == [["cmake", "-S"], ["cmake", "--build"]]
    assert f"-DPython_EXECUTABLE={sys.executable}" in building.asked[0]
    assert "-DRGFAST_CUDA_ARCHS=90" in building.asked[0]
    assert building.built() == ["_kernels.fatbin", f"_native{suffix}"]
    assert (tmp_path / "rgfast" / f"_native{suffix}").read_text() == "built"


@pytest.mark.parametrize(
    ("what", "said", "why"),
    [
        (
            "configuring",
            "-- rgfast: building without kernels for GPUs: there is no nvcc\n",
            "there is no nvcc",
        ),
        ("nvcc", "moments.cu(3): error: expected a ;", "nvcc failed: moments.cu(3): error: expected a ;"),
        ("architecture", "none of sm_90", "CMake failed for sm_90: CMake Error: none of sm_90"),
    ],
)
def test_without_kernels_the_module_is_built_and_the_reason_is_kept(building, what, said, why):
    building.wrong[what] = said
    assert steps.build(10, "90") == why
    assert [name.partition(".")[0] for name in building.built()] == ["_native"]


COMPUTE_SANITIZER = """#!/bin/sh
if [ "$1" = --help ]; then echo "  {option} arg  --report-api-errors arg"; exit 0; fi
echo "$@" > {asked}
{rest}
"""


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    """Puts a script in the place of `compute-sanitizer`, and says what it was asked for."""

    def make(rest, option="--kernel-name"):
        path = tmp_path / "bin" / "compute-sanitizer"
        path.parent.mkdir(exist_ok=True)
        path.write_text(COMPUTE_SANITIZER.format(asked=tmp_path / "asked", rest=rest, option=option))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
        return lambda: (tmp_path / "asked").read_text()

    return make


CLEAN = "========= ERROR SUMMARY: 0 errors"
RACES = "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)"
REFUSED = "REFUSED: ('rgfast_fill', 'it is wrong')"
NO_DEVICE = "========= Error: Device not supported"


@pytest.mark.parametrize(
    ("says", "errors", "told"),
    [
        (["every kernel ANSWERED", CLEAN], 0, "SUMMARY: 0 errors; every kernel ANSWERED"),
        (["every kernel ANSWERED", RACES], 3, f"{RACES[20:]}; every kernel ANSWERED"),
        ([REFUSED, CLEAN], None, f"SUMMARY: 0 errors; {REFUSED}"),
        ([REFUSED, RACES], 3, f"{RACES[20:]}; {REFUSED}"),
        ([NO_DEVICE], None, f"it did not run: {NO_DEVICE}"),
    ],
)
def test_what_a_sanitizer_sees_is_counted(sanitizer, tmp_path, says, errors, told):
    asked = sanitizer("\n".join(f'echo "{line}"' for line in says))
    assert steps.sanitize(60, tmp_path, "memcheck") == {"errors": errors, "told": told}
    assert asked().startswith("--tool memcheck --kernel-name kns=rgfast --report-api-errors no ")
    assert (tmp_path / "memcheck.log").read_text().splitlines() == says


def test_races_by_flags_that_racecheck_does_not_follow_are_left_out(sanitizer, tmp_path):
    race = "========= Error: Race reported between Write access at {0}+0x1a0 and Read access at {0}+0x90"
    flags = [race.format("rgfast_spectrum_chase_f64"), race.format("rgfast_spectrum_chase_far_f64")]
    lines = [*flags, race.format("rgfast_cka_sums"), RACES, "every kernel ANSWERED"]
    sanitizer("\n".join(f'echo "{line}"' for line in lines))
    found = steps.sanitize(60, tmp_path, "racecheck")
    assert found["errors"] == 1
    assert found["told"].endswith(
        "; 2 of rgfast_spectrum_chase, whose flags it does not follow, are left out"
    )
    assert steps.sanitize(60, tmp_path, "memcheck")["errors"] == 3


@pytest.mark.parametrize(
    ("option", "words"), [("--kernel-regex", "--kernel-regex kns=rgfast "), ("--other", "")]
)
def test_an_older_sanitizer_gets_the_option_that_it_has(sanitizer, tmp_path, option, words):
    asked = sanitizer(f'echo "every kernel ANSWERED"\necho "{CLEAN}"', option)
    assert steps.sanitize(60, tmp_path, "memcheck")["errors"] == 0
    assert asked().startswith(f"--tool memcheck {words}--report-api-errors no ")


def test_nvcc_is_looked_for_where_cmake_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.61'\n")
    nvcc.chmod(0o755)
    assert steps.nvcc() == "12.8, V12.8.61"


def test_a_sanitizer_that_takes_too_long_is_stopped_with_what_it_started(sanitizer, tmp_path):
    sanitizer(f"sleep 300 & echo $! > {tmp_path / 'child'}\nwait")
    assert steps.sanitize(2, tmp_path, "racecheck") == {"errors": None, "told": "it was stopped after 2 s"}
    child = int((tmp_path / "child").read_text())
    for _ in range(200):  # its parent is gone, and it is for init to take note of it
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the child still runs")


def test_without_a_sanitizer_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(steps.shutil, "which", lambda name, path=None: None)
    assert steps.sanitize(5, tmp_path, "memcheck") == {
        "errors": None, "told": "compute-sanitizer is not installed",
    }  # fmt: skip


def test_what_a_sanitizer_runs_is_every_kernel(capsys, emulated_gpu, monkeypatch):
    answers = [each for each in known_answers.registered() if each.room == "fill"]
    other = KnownAnswer(("residual_mlp_plain",), lambda device: pytest.fail("it ran"), (0.0,))
    monkeypatch.setattr(known_answers, "registered", lambda: [*answers, other])
    code = steps._ANSWERS.format(device=str(emulated_gpu.device))
    exec(code, {})
    assert len(emulated_gpu.log("cuLaunchKernelEx")) == 1
    monkeypatch.setattr(known_answers, "unproven", lambda device, *kernels: "it is wrong")
    exec(code, {})
    assert capsys.readouterr().out.splitlines() == ["every kernel ANSWERED", REFUSED]
