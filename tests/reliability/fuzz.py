"""Random shapes, strides, dtypes, defaults, masks and values through every public op, against brute force.

    python tests/reliability/fuzz.py --cases 10000 --seed 1 --sanitized build/sanitize

With ``--sanitized`` the compiled module is that of a CMake build folder under ASan and UBSan (target
``_native``). A case either gives what the error contract allows, or raises the error that is documented for
it; anything else is printed with the command that repeats it, and the exit status is 1.
"""

import argparse
import collections
import contextlib
import importlib.util
import os
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))


def sanitized(folder):
    """Start again with the runtime library of ASan loaded first; its path is the compiler's to know."""
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        return
    cache = (Path(folder) / "CMakeCache.txt").read_text(encoding="utf-8")
    compiler = next(
        line.split("=", 1)[1] for line in cache.splitlines() if line.startswith("CMAKE_CXX_COMPILER:")
    )
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        sys.exit(f"fuzz: {compiler} has no libasan.so; build with GCC")
    options = {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **options})


def load_module(folder):
    """Make the module in a build folder the package's own."""
    import rgfast

    (path,) = Path(folder).glob("_native.*.so")
    spec = importlib.util.spec_from_file_location("rgfast._native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["rgfast._native"] = rgfast._native = module


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sanitized", metavar="FOLDER", help="build folder with the module under ASan and UBSan"
    )
    parser.add_argument(
        "--probe", action="store_true", help="masks, batches and axes of a probe instead of the ops"
    )
    options = parser.parse_args()
    if options.sanitized:
        sanitized(options.sanitized)
        load_module(options.sanitized)
    import ops
    import ops_probe
    from draws import Draw

    from rgfast.runtime import native

    warnings.simplefilter("error")
    # Memory that an op leaves unwritten shows: torch.empty gives NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.filterwarnings("ignore", message=".*deterministic")
    isas = native.available_isas()
    checks = ops_probe.CHECKS if options.probe else ops.CHECKS
    done, worst, failed = collections.Counter(), collections.defaultdict(float), 0
    start = time.monotonic()
    for case in range(options.first, options.first + options.cases):
        draw = Draw(options.seed, case)
        name, check = draw.choose(checks)
        torch.set_num_threads(draw.choose((1, 2)))
        dtype, device = draw.defaults()
        isa = native.use_isa(draw.choose(isas)) if isas else contextlib.nullcontext()
        try:
            with isa, torch.device(device):
                torch.set_default_dtype(dtype)
                outcome, excess = check(draw)
        except Exception:
            failed += 1
            family = "--probe " if options.probe else ""
            print(f"FAILED {name}: {family}--seed {options.seed} --first {case} --cases 1", flush=True)
            traceback.print_exc()
            continue
        finally:
            torch.set_default_dtype(torch.float32)
        done[name, outcome] += 1
        worst[name] = max(worst[name], excess)
    seconds = time.monotonic() - start
    print(f"{'op':<22}{'right':>8}{'refused':>9}{'NaN':>6}  largest error / allowed")
    for name in sorted({name for name, _ in done}):
        right, refused, none = (done[name, what] for what in ("right", "refused", "undefined"))
        print(f"{name:<22}{right:>8}{refused:>9}{none:>6}  {worst[name]:.2g}")
    how = "ASan and UBSan" if options.sanitized else "no sanitizer"
    where = ", ".join(isas) or "no compiled module"
    print(
        f"{options.cases} cases, {failed} failed, {seconds:.0f} s, {how}, {where}; "
        f"numpy {np.__version__}, torch {torch.__version__}"
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
