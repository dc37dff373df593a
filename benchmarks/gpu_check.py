"""Everything that only a GPU can show, on a machine that has one: `make gpu-check`.

    python benchmarks/gpu_check.py [--out runs/gpu-check] [--minutes 8] [--keep-kernels]

From a bare checkout, with the torch, CMake, compilers and nvcc that are there and without network: builds the
compiled module and the kernels for this GPU, runs the tests marked `gpu` (every kernel on its small problem,
in CUDA graphs and on side streams, every op and the probe against fp64 truth on CUDA tensors, refusals, the
same bits run after run, a profiler's trace of forwards), every kernel under `compute-sanitizer` where that is
installed, then the benchmark: kernels against the other implementations, which makes measured rows, and
everything against its rivals, in turns. Leaves `gpu_check.json`, `gpu_check.md` and, with rows for the tables
of rooms, `measured.json` in the folder. The user's own table of measured rows is neither read nor written.

`--keep-kernels` takes `rgfast/_kernels.fatbin` as it is, for one that was compiled elsewhere.

Exit codes: 0 all is right; 1 a build or test failed, a value is wrong or a sanitizer saw something;
2 something is missing, which is named before anything is done; 3 there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_steps import SANITIZERS, build, environment, nvcc, run_tests, sanitize

ROOT = Path(__file__).resolve().parent.parent
# What the probe and its tests import; matplotlib, h5netcdf and the rest are not needed here.
MODULES = ("torch", "numpy", "scipy", "pandas", "xarray", "safetensors", "tqdm")
TOOLS_IN_PYTHON = ("pybind11", "pytest")
DONE, FAILED, MISSING, NO_GPU = 0, 1, 2, 3
# Seconds at most; the benchmark gets what is left.
_BUILD, _TESTS, _SANITIZER, _SPARE = 210, 210, 60, 20
_SECONDS = 0.3  # for each case
_LEFT = ("measured.json", "gpu_check.json", "gpu_check.md", "timing.json")


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


def architecture() -> str:
    """Of the GPU that is checked, as nvcc calls it: 90."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def timed(until: float, out: Path, device: str, seconds: float) -> int:
    """The benchmark, in this process: what it leaves with."""
    from gpu_timing import Log, benchmark

    return benchmark(Log(out / "timing.json"), until, device, seconds)


def time_all(until: float, out: Path) -> dict[str, Any]:
    """The benchmark, in one process after the other as long as kernels take them down."""
    from gpu_timing import Log

    command = [sys.executable, __file__, "--out", str(out), "--benchmark-until", str(until - 10)]
    path, code, stopped = out / "timing.json", FAILED, False
    while code != DONE and not stopped:
        begun = len(Log(path).state["begun"])
        left = max(1.0, until - time.time())
        try:
            code = subprocess.run(command, env=environment(out), timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            stopped = True
        if len(Log(path, stopped=stopped).state["begun"]) == begun:  # nor would it get further the next time
            break
    log = Log(path)
    if code != DONE and not stopped:
        log.state["failed"]["the benchmark"] = f"it left with {code}"
    return {**log.state, "green": log.green}


def table(document: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    return "\n".join([*_head(document), *_tables(document["bench"])]) + "\n"


def _head(document: dict[str, Any]) -> Iterator[str]:
    machine, tested = document["machine"], document["tests"]
    yield from (f"# gpu-check: {', '.join(machine['gpus']) or 'no GPU'}", "")
    yield (
        f"torch {machine['versions']['torch']}, Triton {machine['versions']['triton']}, "
        f"nvcc {document['nvcc']}, {machine['cpu']}, compiled kernels "
        f"{machine['native']['active'] or machine['native']['absent']}, kernels for GPUs "
        f"{machine['cuda']['compiled'] or machine['cuda']['absent']}, {document['seconds']:.0f} s in all."
    )
    if document["kernels"] is not None:
        yield from ("", f"No kernels were compiled: {document['kernels']}.")
    yield from ("", f"Tests: {tested['passed']} passed, {len(tested['failed'])} failed, "
                f"{len(tested['skipped'])} skipped.", "")  # fmt: skip
    yield from (f"- FAILED {name}: {why}" for name, why in tested["failed"].items())
    yield from (f"- skipped {name}: {why}" for name, why in tested["skipped"].items())
    for tool, found in document["sanitizers"].items():
        yield f"- {'FAILED ' if found['errors'] else ''}{tool}: {found['told']}"


def _tables(bench: dict[str, Any]) -> Iterator[str]:
    yield from (
        f"- WRONG {check['name']}: error {check['error']}" for check in bench["gate"] if not check["good"]
    )
    yield from (f"- FAILED {case}: {why}" for case, why in bench["failed"].items())
    for kind, first in (("kernels", "op"), ("rows", "benchmark")):
        yield from (
            "",
            f"| {first} | case | impl | against | times faster | quartiles | ours, ms | theirs, ms |",
        )
        yield "|---|---|---|---|---|---|---|---|"
        for row in bench[kind]:
            yield (
                f"| {row[first]} | {row['case']} | {row['impl']} | {row['against']} "
                f"| {row['times_faster']:.2f} | {row['low']:.2f} to {row['high']:.2f} "
                f"| {1e3 * row['seconds']:.3g} | {1e3 * row['rival_seconds']:.3g} |"
            )
    yield ""
    yield from (f"- skipped: {name} {why}".rstrip() for name, why in bench["skipped"].items())
    yield from (f"- not run, out of time: {name}" for name in bench["not_run"])


def check(out: Path, minutes: float, *, keep_kernels: bool) -> int:
    """All steps, and the documents."""
    begun = time.time()
    until = begun + 60 * minutes - _SPARE
    sys.path.insert(0, str(ROOT))
    try:
        reason = build(_BUILD, "none" if keep_kernels else architecture())
    except subprocess.SubprocessError as error:
        print(f"gpu-check: the compiled module cannot be built: {error}", file=sys.stderr)
        return FAILED
    tested = run_tests(min(_TESTS, until - time.time()), out)
    sanitizers = {tool: sanitize(min(_SANITIZER, until - time.time()), out, tool) for tool in SANITIZERS}
    bench = time_all(until, out)
    from rgfast.runtime.environment import facts

    document = {
        "format": "rgfast.gpu-check/2",
        "machine": facts(),
        "nvcc": nvcc(),
        "seconds": time.time() - begun,
        "kernels": reason,
        "tests": tested,
        "sanitizers": sanitizers,
        "bench": bench,
    }
    (out / "gpu_check.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    (out / "gpu_check.md").write_text(table(document), encoding="utf-8")
    rows = out / "config" / "rgfast" / "measured.json"
    if rows.exists():
        shutil.copy(rows, out / "measured.json")
    print(table(document), flush=True)
    not_built = reason is not None and not keep_kernels and nvcc() != "absent"
    seen = any(found["errors"] for found in sanitizers.values())
    return FAILED if tested["failed"] or not bench["green"] or not_built or seen else DONE


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all of it (default: 8)")
    parser.add_argument(
        "--keep-kernels", action="store_true", help="take the kernels that are there, compile none"
    )
    parser.add_argument("--benchmark-until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = args.out.resolve()
    if args.benchmark_until:
        return timed(args.benchmark_until, out, "cuda", _SECONDS)
    reason = why_no_gpu()
    if reason is not None:
        print(reason, file=sys.stderr)
        return NO_GPU
    lacking = missing()
    if lacking:
        print(f"gpu-check: {sys.executable} lacks {', '.join(lacking)}", file=sys.stderr)
        return MISSING
    out.mkdir(parents=True, exist_ok=True)
    for old in _LEFT:
        (out / old).unlink(missing_ok=True)
    shutil.rmtree(out / "config", ignore_errors=True)
    return check(out, args.minutes, keep_kernels=args.keep_kernels)


if __name__ == "__main__":
    sys.exit(main())
