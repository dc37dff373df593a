"""Run by test_probe_checkpoint: a probe in a forked child is killed again and again, and goes on each time.

Killed at fixed spots (inside a batch, at every step of writing a checkpoint, while reading one) and at random
moments. Prints a digest of a run that was never stopped, those of all runs that were, how many kills of each
sort there were, and how many temporary files lie about at the end.
"""

import hashlib
import io
import os
import pathlib
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import rgfast
from rgfast.probing import checkpoint

BATCHES = 32
AT_RANDOM = 16


def data():
    g = torch.Generator().manual_seed(3)
    for _ in range(BATCHES):
        tokens = torch.randint(0, 8, (7, 8), generator=g)
        yield {"tokens": tokens, "mask": torch.rand(7, 8, generator=g) < 0.3}


def build():
    torch.manual_seed(1)
    return rgfast.MaskedTokenModel(states=8, length=8, width=12, depth=2, w2_scale=0.5)


def run(model, path):
    return rgfast.probe(
        model, data(), mask="mask", groups=2, checkpoint=path, checkpoint_every=1, progress=False
    )


def digest(result):
    values = result.dataset.drop_attrs()
    total = hashlib.sha256()
    for name in sorted(values.data_vars):
        total.update(name.encode() + values[name].values.tobytes())
    for name, array in sorted(result.moments.items()):
        total.update(name.encode() + array.tobytes())
    return total.hexdigest()


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def dying(call, countdown, before):
    """``call``, but the process ends at the given call of it, just before or just after."""
    left = [countdown]

    def wrapped(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0 and before:
            die()
        value = call(*args, **kwargs)
        if left[0] == 0:
            die()
        return value

    return wrapped


def half(write, countdown):
    """``write``, but at the given call only half of the bytes get into the file."""
    left = [countdown]

    def wrapped(file, **arrays):
        left[0] -= 1
        if left[0]:
            return write(file, **arrays)
        buffer = io.BytesIO()
        write(buffer, **arrays)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        die()

    return wrapped


def arm(spot, model, countdown):
    """Make this process kill itself at a spot, the countdown-th time that it gets there."""
    if spot == "in a batch":
        block = model.stack.blocks[1]
        block.register_forward_hook(dying(lambda *args: None, countdown, before=True))
    elif spot == "temporary file made":
        np.savez = dying(np.savez, countdown, before=True)
    elif spot == "half written":
        np.savez = half(np.savez, countdown)
    elif spot == "not yet on disk":
        os.fsync = dying(os.fsync, countdown, before=True)
    elif spot == "before the rename":
        pathlib.Path.replace = dying(pathlib.Path.replace, countdown, before=True)
    elif spot == "after the rename":
        pathlib.Path.replace = dying(pathlib.Path.replace, countdown, before=False)
    elif spot == "stale file removed":
        checkpoint.clear_stale = dying(checkpoint.clear_stale, 1, before=False)
    else:
        checkpoint.read = dying(checkpoint.read, 1, before=False)


SPOTS = (
    "in a batch",
    "temporary file made",
    "half written",
    "not yet on disk",
    "before the rename",
    "after the rename",
    "stale file removed",
    "checkpoint read",
)


def in_child(path, out, spot=None, countdown=1):
    """Fork a child that probes; this process has computed on one thread only, so forking is safe."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            model = build()
            if spot is not None:
                arm(spot, model, countdown)
            out.write_text(digest(run(model, path)))
            status = 0
        finally:
            os._exit(status)
    return pid


def killed(pid):
    """Whether a child was killed; anything else but success ends the test."""
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert status == 0, status
    return False


def main(folder, seed):
    rng = random.Random(seed)
    path, out = folder / "probe.checkpoint", folder / "digest"
    torch.set_num_threads(1)
    # tqdm's own lock is shared with forked processes, and one that is killed while it has it keeps it.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0  # a thread, and forking is safe with one only
    whole = digest(run(build(), None))  # here, so that every child finds all imports done
    start = time.monotonic()
    assert not killed(in_child(path, out))
    alone = time.monotonic() - start
    found = [out.read_text()]
    path.unlink()

    at_spots = 0
    for spot in [spot for spot in SPOTS for _ in range(2)]:
        assert killed(in_child(path, out, spot, rng.randint(1, 3))), spot
        at_spots += 1
    assert not killed(in_child(path, out))
    found.append(out.read_text())
    path.unlink()

    at_random = 0
    while at_random < AT_RANDOM:
        pid = in_child(path, out)
        time.sleep(rng.uniform(0.0, 0.3) * alone)
        os.kill(pid, signal.SIGKILL)
        if killed(pid):
            at_random += 1
        else:  # it had ended: from the start again
            found.append(out.read_text())
            path.unlink()
    assert not killed(in_child(path, out))
    found.append(out.read_text())
    left = [name for name in folder.iterdir() if name.name.startswith(".probe")]
    print(whole, ",".join(found), at_spots, at_random, len(left))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
