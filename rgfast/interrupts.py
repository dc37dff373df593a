"""What Ctrl-C and a request to end do to the ``rgfast`` command: one sentence, whenever they come.

This module is imported before torch, whose import takes seconds, so it needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

__all__ = ["Terminated", "heeded", "is_command", "leave_quietly_while_importing", "shielded"]

_INTERRUPTED = 130


class Terminated(KeyboardInterrupt):
    """A request to end (SIGTERM, SIGHUP): what handles Ctrl-C handles it alike. ``code`` is the exit code."""

    code = 128 + signal.SIGTERM


def is_command() -> bool:
    """Whether this process is the ``rgfast`` command, rather than a program that imports the package."""
    words = iter(sys.orig_argv[1:])
    for word in words:
        if word == "-m":
            return next(words, "") == "rgfast"
        if word in ("-X", "-W"):
            next(words, None)
        elif not word.startswith("-"):
            return Path(word).name in ("rgfast", "rgfast.exe")
        elif word == "-c":
            break
    return False


def leave_quietly_while_importing() -> None:
    """Make Ctrl-C end the process with one sentence until :func:`heeded` takes over."""
    if _heeds(signal.SIGINT):
        signal.signal(signal.SIGINT, _leave)


@contextlib.contextmanager
def heeded(*, to_the_end: bool) -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt and a request to end raises :class:`Terminated`, once each.

    Cleaning up is not interrupted: Ctrl-C pressed again is ignored, with ``to_the_end`` also after the block,
    until the process has ended. What the process was started to ignore stays ignored.
    """
    before: dict[signal.Signals, Any] = {}

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(number, signal.SIG_DFL)
        stop = Terminated()
        stop.code = 128 + number
        raise stop

    handlers = {"SIGINT": interrupt}
    # A launcher ends its ranks by SIGTERM while they wait for each other, and Python would not get to run.
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        handlers |= {"SIGTERM": terminate, "SIGHUP": terminate}
    for name, handler in handlers.items():
        number = getattr(signal, name, None)
        if number is not None and _heeds(number):
            before[number] = signal.signal(number, handler)
    try:
        yield
    except KeyboardInterrupt:
        if to_the_end:
            before = {n: signal.SIG_IGN if n == signal.SIGINT else signal.SIG_DFL for n in before}
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.default_int_handler if handler is _leave else handler)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Inside, signals to stop wait, and what is started never sees Ctrl-C: who started it has to end it.

    Does nothing in other threads than the main one, and where signals have no masks.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    waiting: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    # Other threads may get a signal that is blocked here, and Python would have this one raise in the middle.
    before = {n: signal.getsignal(n) for n in numbers if callable(signal.getsignal(n))}
    for number in before:
        signal.signal(number, lambda number, _: waiting.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])


def _heeds(number: int) -> bool:
    """Whether this thread may set handlers, and the signal's is the default or one of this module."""
    ours = (signal.SIG_DFL, signal.default_int_handler, _leave)
    return threading.current_thread() is threading.main_thread() and signal.getsignal(number) in ours


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    # Raising here would pass through C extensions that are half imported, not all of which bear it.
    os.write(2, b"rgfast: interrupted\n")
    os._exit(_INTERRUPTED)
