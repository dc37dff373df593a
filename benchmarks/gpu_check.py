"""Everything that only a GPU can show, on a machine that has one: `make gpu-check`.

    python benchmarks/gpu_check.py [--out runs/gpu-check] [--minutes 8]

From a bare checkout, with the torch, CMake and compiler that are there and without network: builds the
compiled module, runs the tests marked `gpu` (every op and the probe against fp64 truth on CUDA tensors,
refusals, the same bits run after run, a profiler's trace of forwards), then the benchmark with rivals in
turns. Leaves `gpu_check.json` and `gpu_check.md` in the folder.

Exit codes: 0 all is right; 1 a test failed or a value is wrong; 2 something is missing, which is named before
anything is done; 3 there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What the probe and its tests import; matplotlib and the rest are not needed here.
MODULES = ("torch", "numpy", "scipy", "pandas", "xarray", "h5netcdf", "h5py", "safetensors", "tqdm")
TOOLS_IN_PYTHON = ("pybind11", "pytest")
DONE, FAILED, MISSING, NO_GPU = 0, 1, 2, 3
# Shares of the time: the build and the tests come first, and the benchmark gets what is left.
_BUILD, _TESTS, _SPARE = 150, 240, 20


def missing() -> list[str]:
    """Names of what this Python and this machine lack."""
    found = [name for name in (*MODULES, *TOOLS_IN_PYTHON) if importlib.util.find_spec(name) is None]
    if shutil.which("cmake") is None:
        found.append("cmake")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        found.append("a C++ compiler")
    return found


def why_no_gpu() -> str | None:
    """A sentence if torch finds no GPU, None if it finds one or is not installed itself."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if torch.cuda.is_available():
        return None
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
    return f"gpu-check: there is no GPU here: torch {torch.__version__}, built for {build}, finds none"


def build(limit: float) -> None:
    """Build the compiled module and put it where the checkout's package finds it."""
    folder = ROOT / "build" / "gpu-check"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *generator]
    configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += ["-DRGFAST_REQUIRE_NATIVE=ON"]
    jobs = str(os.cpu_count() or 1)
    for words in (configure, ["cmake", "--build", str(folder), "--target", "_native", "--parallel", jobs]):
        subprocess.run(words, check=True, timeout=limit, stdout=subprocess.DEVNULL)
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    built = next(path for path in folder.rglob("_native*") if path.name.endswith(suffix))
    shutil.copy2(built, ROOT / "rgfast" / built.name)


def run_tests(limit: float, out: Path, words: tuple[str, ...] = ("-m", "gpu")) -> dict[str, Any]:
    """Run the tests marked `gpu`; how many passed, failed and were skipped, and the sentences of those."""
    report = out / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(ROOT / "tests/gpu/pytest.ini"),
        "-p",
        "no:cacheprovider",
    ]
    command += [
        f"--rootdir={ROOT}",
        f"--junitxml={report}",
        "-q",
        *words,
        str(ROOT / "tests/gpu"),
    ]
    try:
        done = subprocess.run(command, cwd=ROOT, env=_environment(), timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"passed": 0, "failed": {"all": f"they took longer than {limit:.0f} s"}, "skipped": {}}
    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    if not report.exists():
        found["failed"]["all"] = f"pytest left with {done.returncode}"
        return found
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{Path(str(case.get('classname')).replace('.', '/')).name}::{case.get('name')}"
        wrong = [each for each in case if each.tag in ("failure", "error")]
        skip = case.find("skipped")
        if wrong:
            found["failed"][name] = str(wrong[0].get("message")).splitlines()[0][:300]
        elif skip is not None:
            found["skipped"][name] = str(skip.get("message"))
        else:
            found["passed"] += 1
    if not found["passed"] and not found["failed"]:
        found["failed"]["all"] = "no test ran"
    return found


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def benchmark(until: float, out: Path, device: str, seconds: float) -> int:
    """Time every case that fits, and write it as it grows; in a process of its own, which may die."""
    from rgfast.bench import suite
    from rgfast.bench.timing import WrongResult, run_contest

    report = suite.Report("make gpu-check", True, [device])
    late: list[str] = []

    def write() -> None:
        document = {**report.to_dict(), "not_run": late}
        (out / "bench.json").write_text(json.dumps(document), encoding="utf-8")

    # The probe first: it is what all of this is for.
    for name in sorted(suite.BENCHMARKS, key=lambda name: name != "probe"):
        with suite.quiet(device):
            for contest in suite.BENCHMARKS[name].contests(device, "quick"):
                if time.time() > until:
                    late.append(f"{name}: {contest.case}")
                    continue
                try:
                    rows = run_contest(name, contest, seconds, device=device, skip=report.skipped.__setitem__)
                except WrongResult as error:
                    report.gate.append(error.check)
                else:
                    report.rows += rows
                    for row in rows:
                        print(suite.row_line(row), flush=True)
                write()
    write()
    return DONE if report.green else FAILED


def table(document: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    machine, tested, timed = document["machine"], document["tests"], document["bench"]
    kernels = machine["native"]["active"] or machine["native"]["absent"]
    lines = [
        f"# gpu-check: {', '.join(machine['gpus']) or 'no GPU'}",
        "",
        f"torch {machine['versions']['torch']}, Triton {machine['versions']['triton']}, "
        f"nvcc {document['nvcc']}, {machine['cpu']}, compiled kernels {kernels}, "
        f"{document['seconds']:.0f} s in all.",
        "",
        f"Tests: {tested['passed']} passed, {len(tested['failed'])} failed, "
        f"{len(tested['skipped'])} skipped.",
        "",
    ]
    lines += [f"- FAILED {name}: {why}" for name, why in tested["failed"].items()]
    lines += [f"- skipped {name}: {why}" for name, why in tested["skipped"].items()]
    lines += [
        f"- WRONG {check['name']}: error {check['error']}" for check in timed["gate"] if not check["good"]
    ]
    lines += ["", "| benchmark | case | impl | against | times faster | quartiles | ours, ms | theirs, ms |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in timed["rows"]:
        lines.append(
            f"| {row['benchmark']} | {row['case']} | {row['impl']} | {row['against']} "
            f"| {row['times_faster']:.2f} | {row['low']:.2f} to {row['high']:.2f} "
            f"| {1e3 * row['seconds']:.3g} | {1e3 * row['rival_seconds']:.3g} |"
        )
    lines += ["", *(f"- skipped: {name} {why}" for name, why in timed["skipped"].items())]
    lines += [f"- not run, out of time: {name}" for name in timed["not_run"]]
    return "\n".join(lines) + "\n"


def nvcc() -> str:
    """The version of the CUDA compiler, or that there is none."""
    if shutil.which("nvcc") is None:
        return "absent"
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    return next(
        (line.rpartition("release ")[2] for line in told.splitlines() if "release" in line), "unknown"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all of it (default: 8)")
    parser.add_argument("--benchmark-until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.benchmark_until:
        return benchmark(args.benchmark_until, args.out, "cuda", 0.3)
    begun = time.time()
    reason = why_no_gpu()
    if reason is not None:
        print(reason, file=sys.stderr)
        return NO_GPU
    lacking = missing()
    if lacking:
        print(f"gpu-check: {sys.executable} lacks {', '.join(lacking)}", file=sys.stderr)
        return MISSING
    until = begun + 60 * args.minutes - _SPARE
    args.out.mkdir(parents=True, exist_ok=True)
    for old in ("bench.json", "tests.xml", "gpu_check.json", "gpu_check.md"):
        (args.out / old).unlink(missing_ok=True)
    build(_BUILD)
    tested = run_tests(min(_TESTS, until - time.time()), args.out)
    command = [sys.executable, __file__, "--out", str(args.out), "--benchmark-until", str(until - 10)]
    try:
        done = subprocess.run(
            command, env=_environment(), timeout=max(1.0, until - time.time()), check=False
        ).returncode
    except subprocess.TimeoutExpired:
        done = FAILED
    sys.path.insert(0, str(ROOT))
    from rgfast.runtime.environment import facts

    empty: dict[str, Any] = {"gate": [], "rows": [], "skipped": {}, "not_run": ["everything"], "green": False}
    timed = args.out / "bench.json"
    document = {
        "format": "rgfast.gpu-check/1",
        "machine": facts(),
        "nvcc": nvcc(),
        "seconds": time.time() - begun,
        "tests": tested,
        "bench": json.loads(timed.read_text(encoding="utf-8")) if timed.exists() else empty,
        "benchmark_exit": done,
    }
    (args.out / "gpu_check.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    (args.out / "gpu_check.md").write_text(table(document), encoding="utf-8")
    print(table(document), flush=True)
    return FAILED if tested["failed"] or done else DONE


if __name__ == "__main__":
    sys.exit(main())
