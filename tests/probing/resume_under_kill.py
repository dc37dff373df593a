"""Run by test_checkpoint: a probe in a forked child is killed again and again, and goes on each time.

Prints a digest of a run that was never stopped and of the one that was, and how often it was killed.
"""

import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import rgfast

KILLS = 14


def data():
    g = torch.Generator().manual_seed(3)
    for _ in range(150):
        tokens = torch.randint(0, 8, (5, 12), generator=g)
        yield {"tokens": tokens, "mask": torch.rand(5, 12, generator=g) < 0.3}


def run(checkpoint):
    torch.manual_seed(1)
    model = rgfast.MaskedTokenModel(states=8, length=12, width=16, depth=4, w2_scale=0.5)
    return rgfast.probe(
        model, data(), mask="mask", groups=2, checkpoint=checkpoint, checkpoint_every=1, progress=False
    )


def digest(result):
    values = result.dataset.drop_attrs()
    total = hashlib.sha256()
    for name in sorted(values.data_vars):
        total.update(name.encode() + values[name].values.tobytes())
    return total.hexdigest()


def in_child(checkpoint, out):
    """Fork a child that probes; torch has done no parallel work in this process, so forking is safe."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            Path(out).write_text(digest(run(checkpoint)))
            status = 0
        finally:
            os._exit(status)
    return pid


def main(folder):
    rng = random.Random(int(sys.argv[2]))
    out = folder / "digest"
    start = time.monotonic()
    assert os.waitpid(in_child(None, out), 0)[1] == 0
    whole, alone = out.read_text(), time.monotonic() - start
    out.unlink()
    kills = 0
    checkpoint = folder / "probe.checkpoint"
    while kills < KILLS:
        pid = in_child(checkpoint, out)
        time.sleep(rng.uniform(0.02, 0.15) * max(alone, 1.0))
        if os.waitpid(pid, os.WNOHANG)[0]:
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
    assert os.waitpid(in_child(checkpoint, out), 0)[1] == 0
    left = [path.name for path in folder.iterdir() if path.name.startswith(".probe")]
    print(whole, out.read_text(), kills, len(left))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
