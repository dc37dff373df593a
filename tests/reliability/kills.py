"""Kills a probe and a sweep at random moments, again and again; each time what they leave is gone on from.

    python tests/reliability/kills.py --kills 1000

A server imports everything once and forks the victims, so that a kill costs what was computed and no imports.
Every run that comes to its end must have the bits of one that nothing happened to; the exit status says so.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

SINGLE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
if __name__ == "__main__" and any(os.environ.get(name) != value for name, value in SINGLE.items()):
    # A process may be forked safely while it has one thread; the libraries read this when they are loaded.
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **SINGLE})

import matplotlib  # noqa: E402 (after the line above, as all that follow)
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("probing", "experiments")]

import resume_under_kill  # noqa: E402
from tiny import tiny_config  # noqa: E402

from rgfast.experiments.sweep import Design, sweep  # noqa: E402

GRID = Design("tiny", ("two-scale:K=2",), (1.0, 7.0), (4,), (0, 1), tiny_config())


def probe_once(folder):
    """The digest of a whole probe, by name: a batch and a checkpoint are a few milliseconds."""
    result = resume_under_kill.run(resume_under_kill.build(), folder / "probe.checkpoint")
    return {"result": resume_under_kill.digest(result)}


def sweep_once(folder):
    """The digest of every file that a sweep of 4 points leaves, by its path."""
    sweep(GRID, out=folder / "sweep", jobs=1, progress=False)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "sweep").rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def forked(work, folder, out):
    """The process that runs ``work(folder)`` and writes the digests that it gives to ``out``."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            out.write_text(json.dumps(work(folder)))
            status = 0
        finally:
            os._exit(status)
    return pid


def ended(pid):
    """Whether a child came to its end by itself; anything else but SIGKILL is an error."""
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        sys.exit(f"kills: a run failed with status {status}")
    return True


def differing(whole, found):
    """The names whose digests are not the same in both."""
    return sorted(name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name))


def kill_again_and_again(work, kills, rng, keep):
    """How many runs ended, what differed in those where anything did, and how many files were left over.

    The folder of a run that differs is moved into ``keep``, beside that of the run left alone.
    """
    ends, wrong = 0, []
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        out, folder = top / "digest", top / "run"
        folder.mkdir()
        work(folder)  # here, so that every child finds all imports done
        shutil.rmtree(folder)
        folder.mkdir()
        start = time.monotonic()
        assert ended(forked(work, folder, out))
        alone, whole, killed, left = time.monotonic() - start, json.loads(out.read_text()), 0, 0
        folder.rename(top / "alone")
        folder.mkdir()
        while True:
            pid = forked(work, folder, out)
            if killed < kills:
                time.sleep(rng.uniform(0.0, 0.6) * alone)
                os.kill(pid, signal.SIGKILL)
            if not ended(pid):
                killed += 1
                continue
            ends += 1
            left += sum(path.name.startswith(".") for path in folder.rglob("*"))
            if names := differing(whole, json.loads(out.read_text())):
                wrong.append(names)
                if keep is not None:
                    shutil.copytree(top / "alone", keep / "alone", dirs_exist_ok=True)
                    shutil.copytree(folder, keep / f"{killed}", dirs_exist_ok=True)
            shutil.rmtree(folder)
            folder.mkdir()
            if killed >= kills:
                return ends, wrong, left


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each kind of run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--what", choices=("probe", "sweep", "both"), default="both")
    parser.add_argument("--keep", type=Path, help="a folder for what runs with other bits leave")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # tqdm's own lock is shared with forked processes, and one that is killed while it has it keeps it.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0  # a thread, and forking is safe with one only
    matplotlib.use("agg")
    rng, wrong = random.Random(options.seed), False
    for name, work in (("probe", probe_once), ("sweep", sweep_once)):
        if options.what in (name, "both"):
            start = time.monotonic()
            ends, differ, left = kill_again_and_again(work, options.kills, rng, options.keep)
            wrong |= bool(differ)
            print(
                f"{name}: {options.kills} kills, {ends} runs came to their end, {len(differ)} with other "
                f"bits; {left} temporary files left; {time.monotonic() - start:.0f} s",
                *(f"  differ: {', '.join(names)}" for names in differ),
                sep="\n",
                flush=True,
            )
    sys.exit(wrong)


if __name__ == "__main__":
    main()
