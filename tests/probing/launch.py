"""How the tests of several ranks start them: a script of its own, which forks."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tqdm import tqdm

TIMEOUT = 60.0
SHORT = 3.0  # where a rank is to be missed
HERE = Path(__file__).parent
SINGLE = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")}

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")),
    reason="no gloo, or no fork",
)


def printed_by(script, **environment):
    """What a script beside this file prints in its last line, as JSON. It runs on one thread, warnings are
    errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / script)],
        capture_output=True, text=True, timeout=600, check=False, env={**SINGLE, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def make_forkable():
    """What a script does before it forks: threads do not live on in a child."""
    torch.set_num_threads(1)
    # tqdm's own lock is shared with forked processes, and one that is killed while it has it keeps it.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0  # a thread, and forking is safe with one only


def print_cases(*cases):
    """Run what a script consists of (of its arguments the cases named there) in a folder of its own each, and
    print what they give as JSON."""
    out = {}
    for case in cases:
        if len(sys.argv) > 1 and case.__name__ not in sys.argv[1:]:
            continue
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            out[case.__name__] = case(folder)
        print(case.__name__, round(time.monotonic() - start, 2), "s", file=sys.stderr)
    print(json.dumps(out, default=str))
