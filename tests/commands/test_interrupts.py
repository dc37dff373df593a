"""Ctrl-C and SIGTERM in real processes: one sentence, an exit code, and no process left."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from rgfast import cli, interrupts
from rgfast.commands import errors

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of Unix")


@contextmanager
def started(*words, code=None):
    """The command in a group of its own, as a terminal has it, heeding Ctrl-C whatever started the tests."""

    def heed():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    command = [sys.executable, *(("-m", "rgfast") if code is None else ("-c", code)), *map(str, words)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def waited_for(happened, process):
    until = time.monotonic() + 120
    while not happened() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert process.poll() is None, process.stderr.read()


def loaded(process, name):
    """Whether the process has a library of this name in memory."""
    try:
        return name in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
    except OSError:
        return False


def workers(process):
    """Those of its processes that compute points, by the signals that they do not take now."""
    found = {}
    for pid in others(process):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        except OSError:
            continue
        if b"popen_loky" in words:
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            found[pid] = int(fields["SigBlk"], 16) | int(fields["SigIgn"], 16)
    return found


def others(process):
    """The other processes of its group that have not ended."""
    found = []
    for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
        try:
            told = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
            state, _, group = told.rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == process.pid != pid and state != "Z":
            found.append(pid)
    return found


def test_during_the_import(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("/proc is of Linux")
    with started("info") as process:
        waited_for(lambda: loaded(process, "libtorch"), process)
        os.killpg(process.pid, signal.SIGINT)
        out, told = process.communicate(timeout=60)
    assert (process.returncode, out, told) == (errors.INTERRUPTED, "", "rgfast: interrupted\n")


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "terminated"),
    ],
)
def test_a_study_of_several_processes(number, code, word, tmp_path):
    """Workers print nothing and end with the command, which says where it goes on."""
    if not sys.platform.startswith("linux"):
        pytest.skip("/proc is of Linux")
    out = tmp_path / "out"
    with started("sweep", "--quick", "--jobs", 2, "--out", out) as process:
        waited_for(lambda: len(workers(process)) == 2, process)
        assert all(blocked >> (signal.SIGINT - 1) & 1 for blocked in workers(process).values())
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        printed, told = process.communicate(timeout=60)
        assert (process.returncode, printed) == (code, "")
        assert (
            told == f"rgfast: {word}; what is finished is in {out}, and the same command goes on from there\n"
        )
        until = time.monotonic() + 60
        while others(process) and time.monotonic() < until:
            time.sleep(0.1)
        assert others(process) == []
    assert [path.name for path in (out / "points").iterdir() if path.name.startswith(".")] == []


STOPPED_EARLY = """
import threading, time
import joblib
from joblib.externals.loky.backend import queues, resource_tracker
from rgfast.experiments.points import in_parallel

def feed(*args, feed=queues.Queue._feed):
    feed(*args)
    time.sleep(0.5)  # so that this thread has the last reference to the queue

def unregister(*args, unregister=resource_tracker.unregister):
    if threading.current_thread().daemon:
        print("unlinked by a daemon thread")
        time.sleep(0.5)
    unregister(*args)

queues.Queue._feed = feed
resource_tracker.unregister = unregister
results = in_parallel(2, [joblib.delayed(time.sleep)(0.01 * 3**point) for point in range(10)])
next(results)
results.close()
"""


def test_the_thread_that_feeds_workers_ends_first():
    """Stopped within its cleaning up, it would leave semaphores that a tracker says are leaked."""
    with started(code=STOPPED_EARLY) as process:
        out, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (0, "")
    assert "unlinked by a daemon thread" in out


SLOW = """
import sys, time
from rgfast import cli
from rgfast.runtime import environment
def describe():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(1.0)
        print("cleaned", flush=True)
environment.describe = describe
sys.argv[1:] = ["info"]
sys.exit(cli.main())
"""


def test_ctrl_c_pressed_again_does_not_disturb_the_cleaning_up():
    with started(code=SLOW) as process:
        assert process.stdout.readline() == "ready\n"
        for _ in range(4):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        out, told = process.communicate(timeout=60)
    assert (process.returncode, out, told) == (errors.INTERRUPTED, "cleaned\n", "rgfast: interrupted\n")


def test_a_second_request_to_end_ends_at_once():
    with started(code=SLOW) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (-signal.SIGTERM, "")


def test_what_was_ignored_stays_ignored():
    code = "import signal\nfor n in (signal.SIGINT, signal.SIGHUP):\n    signal.signal(n, signal.SIG_IGN)"
    with started(code=code + SLOW.replace("60", "1.5")) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGHUP)
        out, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (errors.DONE, "")
    assert out.startswith("cleaned")


def test_a_program_that_calls_main_keeps_its_handlers(monkeypatch, capsys):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    monkeypatch.setattr("rgfast.runtime.environment.describe", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["info"]) == 143
    assert capsys.readouterr().err == "rgfast: terminated\n"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


def test_only_the_command_itself_is_taken_for_it(monkeypatch):
    for words, whether in (
        (["python", "-m", "rgfast", "info"], True),
        (["python", "-X", "dev", "-u", "/usr/bin/rgfast", "info"], True),
        (["python", "-m", "pytest", "rgfast"], False),
        (["python", "rgfast.py"], False),
        (["python", "-c", "import rgfast", "rgfast"], False),
        (["python", "-m", "joblib.externals.loky.backend.popen_loky_posix", "rgfast"], False),
        (["python"], False),
    ):
        monkeypatch.setattr(sys, "orig_argv", words)
        assert interrupts.is_command() is whether, words


def test_what_is_started_behind_the_shield_never_heeds_ctrl_c():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('alive')"
    before = signal.getsignal(signal.SIGINT)
    with interrupts.shielded():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "alive\n"
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_behind_the_shield(number, monkeypatch, capsys):
    passed = []

    def describe():
        with interrupts.shielded():
            os.kill(os.getpid(), number)
            time.sleep(0.1)
            passed.append("the shield")
        passed.append("the end")

    monkeypatch.setattr("rgfast.runtime.environment.describe", describe)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(["info"]) == 128 + number
    finally:
        signal.signal(signal.SIGINT, before)
    assert passed == ["the shield"]


def test_a_json_of_a_study_is_not_begun_when_it_is_interrupted(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rgfast.experiments.points.read_point", stop)
    monkeypatch.setattr("rgfast.experiments.points.in_parallel", lambda *_: iter(()))
    words = ["sweep", "--quick", "--json", "--out", str(tmp_path / "out")]
    assert cli.main(words) == errors.INTERRUPTED
    told = capsys.readouterr()
    assert told.out == ""
    assert json.loads((tmp_path / "out" / "design.json").read_text())["name"]
