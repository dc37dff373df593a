"""The steps of `make gpu-check` before the benchmark, each with a time limit: building, tests, sanitizers."""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

__all__ = ["SANITIZERS", "build", "environment", "nvcc", "run_tests", "sanitize"]

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("memcheck", "racecheck")
# Kernels whose warps wait for each other by flags in shared memory, which racecheck takes for races.
_FLAGGED = "rgfast_spectrum_chase"
# Every kernel of the package's file on its small problem; a sanitizer would have to compile Triton's anew.
_ANSWERS = """
import torch
import rgfast
from rgfast.runtime import known_answers

device, refused = torch.device({device!r}), {{}}
for answer in known_answers.registered():
    if answer.kernels[0].startswith("rgfast_"):
        why = answer.cannot_run(device) or known_answers.unproven(device, *answer.kernels)
        if why is not None:
            refused[answer.kernels[0]] = str(why)
print("REFUSED:" if refused else "every kernel ANSWERED", *refused.items(), flush=True)
"""


def environment(out: Path) -> dict[str, str]:
    """For processes of the check: they see this checkout, and measured rows of their own, not the user's."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "XDG_CONFIG_HOME": str(out / "config")}


def nvcc() -> str:
    """The version of the CUDA compiler, or that there is none."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]  # as CMake looks
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{place}/bin" for place in places if place)])
    program = shutil.which("nvcc", path=path)
    if program is None:
        return "absent"
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    return next(
        (line.rpartition("release ")[2] for line in told.splitlines() if "release" in line), "unknown"
    )


def build(limit: float, architecture: str) -> str | None:
    """Build the compiled module and kernels for one architecture, and put them where the checkout finds them.

    Returns why there are no new kernels, None if there are. Raises CalledProcessError or TimeoutExpired if
    the module cannot be built, which no kernel runs without.
    """
    folder = ROOT / "build" / "gpu-check"
    until = time.monotonic() + limit
    reason = _configure(folder, architecture, limit)
    jobs = str(os.cpu_count() or 1)
    make = ["cmake", "--build", str(folder), "--parallel", jobs, "--target", "_native"]
    if reason is None:
        try:
            done = _run([*make, "_kernels"], until - time.monotonic())
            if done.returncode:
                reason = f"nvcc failed: {_last_line(done)}"
                print(done.stdout[-4000:], flush=True)
        except subprocess.TimeoutExpired:
            reason = f"nvcc took longer than {limit:.0f} s"
    if reason is not None:
        _must(make, limit)
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    _install(next(path for path in folder.rglob("_native*") if path.name.endswith(suffix)))
    if reason is None:
        _install(folder / "_kernels.fatbin")
    return reason


def _configure(folder: Path, architecture: str, limit: float) -> str | None:
    """Returns why no kernels will be built."""
    words = ["cmake", "-S", str(ROOT), "-B", str(folder), *(["-G", "Ninja"] if shutil.which("ninja") else [])]
    words += ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
    words += ["-DRGFAST_REQUIRE_NATIVE=ON"]
    done = _run([*words, f"-DRGFAST_CUDA_ARCHS={architecture}"], limit)
    if done.returncode == 0:
        told = re.search(r"building without kernels for GPUs: (.*)", done.stdout)
        return told[1] if told else None
    _must([*words, "-DRGFAST_CUDA_ARCHS=none"], limit)
    return f"CMake failed for sm_{architecture}: {_last_line(done)}"


def _run(words: list[str], limit: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command; ``stdout`` is all that it said.

    Raises TimeoutExpired, with what was said so far as its output; whatever the command had started is
    stopped as well.
    """
    code = None
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        # A pipe would be kept open by what a stopped command leaves behind.
        with subprocess.Popen(
            words, stdout=said, stderr=subprocess.STDOUT, start_new_session=True, **options
        ) as process:
            try:
                code = process.wait(max(1.0, limit))
            except subprocess.TimeoutExpired:
                pass
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        said.seek(0)
        text = said.read()
    if code is None:
        raise subprocess.TimeoutExpired(words, limit, text)
    return subprocess.CompletedProcess(words, code, text)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stdout.strip().splitlines()
    wrong = [line for line in lines if "error" in line.lower()]
    return (wrong or lines or [f"exit code {done.returncode}"])[-1].strip()


def _must(words: list[str], limit: float) -> None:
    """Run a command that everything depends on; what it said is printed if it fails."""
    done = _run(words, limit)
    if done.returncode:
        print(done.stdout[-4000:], flush=True)
        done.check_returncode()


def _install(path: Path) -> None:
    """Put a file into the package by renaming it: a process that has the old one mapped keeps it."""
    place = ROOT / "rgfast" / path.name
    new = place.with_name(f".{path.name}.new")
    shutil.copy2(path, new)
    new.replace(place)


def run_tests(
    limit: float, out: Path, words: tuple[str, ...] = ("-m", "gpu"), files: str = "test_*.py"
) -> dict[str, Any]:
    """Run the tests marked `gpu`; how many passed, failed and were skipped, and the sentences of those.

    A process for each file, since a kernel that goes wrong takes all later ones of its process with it.
    """
    until = time.monotonic() + limit
    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    for path in sorted((ROOT / "tests" / "gpu").glob(files)):
        report = out / f"tests-{path.stem}.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "tests" / "gpu" / "pytest.ini")]
        command += ["-p", "no:cacheprovider", f"--rootdir={ROOT}", f"--junitxml={report}", "-v", *words]
        left = max(1.0, until - time.monotonic())
        try:
            done = _run([*command, str(path)], left, cwd=ROOT, env=environment(out))
        except subprocess.TimeoutExpired as stopped:
            found["failed"][path.stem] = f"it was stopped after {left:.0f} s"
            found["passed"] += stopped.output.count(" PASSED ")
            wrong = re.findall(r"::(\S+) (?:FAILED|ERROR) ", stopped.output)
            found["failed"].update((f"{path.stem}::{name}", "see what was printed") for name in wrong)
            print(stopped.output, flush=True)
            continue
        print(done.stdout, flush=True)
        if report.exists():
            _count(report, found)
        elif done.returncode != 5:  # of pytest's codes: nothing to run
            found["failed"][path.stem] = f"pytest left with {done.returncode}"
    if not found["passed"] and not found["failed"]:
        found["failed"]["all"] = "no test ran"
    return found


def _count(report: Path, found: dict[str, Any]) -> None:
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{Path(str(case.get('classname')).replace('.', '/')).name}::{case.get('name')}"
        wrong = [each for each in case if each.tag in ("failure", "error")]
        skip = case.find("skipped")
        if wrong:
            found["failed"][name] = (str(wrong[0].get("message")).splitlines() or [""])[0][:300]
        elif skip is not None:
            found["skipped"][name] = str(skip.get("message"))
        else:
            found["passed"] += 1


def sanitize(limit: float, out: Path, tool: str) -> dict[str, Any]:
    """Run every kernel's small problem under a tool of `compute-sanitizer`.

    Returns ``errors``, how many it saw (None if it did not run), and ``told``, a sentence; the whole log is
    in the folder.
    """
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer",
        path=os.pathsep.join(["/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"]),
    )
    if program is None:
        return {"errors": None, "told": "compute-sanitizer is not installed"}
    knows = subprocess.run([program, "--help"], capture_output=True, text=True, check=False).stdout
    words = [program, "--tool", tool]
    # Of torch's own kernels there are many more. The option's name changed, and neither is in every version.
    option = next((name for name in ("--kernel-name", "--kernel-regex") if name in knows), None)
    words += [option, "kns=rgfast"] if option else []
    words += ["--report-api-errors", "no"] if tool == "memcheck" and "--report-api-errors" in knows else []
    # From torch's cache tensors would lie side by side, and what is written behind one would be in another.
    env = {**environment(out), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = _run(
            [*words, sys.executable, "-c", _ANSWERS.format(device="cuda:0")], limit, cwd=ROOT, env=env
        )
    except subprocess.TimeoutExpired:
        return {"errors": None, "told": f"it was stopped after {limit:.0f} s"}
    (out / f"{tool}.log").write_text(done.stdout, encoding="utf-8")
    summary = re.search(r"SUMMARY: (\d+) .*", done.stdout)
    answered = re.search(r"(REFUSED|every kernel ANSWERED).*", done.stdout)
    if summary is None or answered is None:
        return {"errors": None, "told": f"it did not run: {_last_line(done)}"}
    told = f"{summary[0]}; {answered[0].strip()}"
    races = re.findall(rf"Error: Race reported .*{_FLAGGED}", done.stdout)
    flagged = len(races) if tool == "racecheck" else 0
    if flagged:
        told = f"{told}; {flagged} of {_FLAGGED}, whose flags it does not follow, are left out"
    # Of kernels that were refused nothing is known, and tests say why.
    errors = max(0, int(summary[1]) - flagged) or (None if answered[1] == "REFUSED" else 0)
    return {"errors": errors, "told": told}
