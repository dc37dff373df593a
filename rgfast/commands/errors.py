"""Exit codes, and which errors are the user's to mend."""

from __future__ import annotations

import dis

from rgfast.dispatch import ImplUnavailable

__all__ = ["DONE", "EXIT_CODES", "FAILED", "INTERRUPTED", "READER_GONE", "UNEXPECTED", "WRONG", "sentence"]

DONE, FAILED, WRONG, UNEXPECTED, INTERRUPTED, READER_GONE = 0, 1, 2, 70, 130, 141
EXIT_CODES = """exit codes:
  0    done
  1    a correctness gate failed; nothing was timed
  2    wrong input, or a file that cannot be read or written: one sentence on
       stderr says which
  70   unexpected: a defect, or something wrong with the machine or with the
       model that was probed; --debug shows the traceback
  130  interrupted (143: terminated); what was finished is kept"""

_RAISE = dis.opmap["RAISE_VARARGS"]


def sentence(error: Exception) -> str | None:
    """What to tell the user about an error in the input; None for an error that nobody foresaw.

    Checks of the input all over the package raise ValueError and TypeError, and so do defects, in our code as
    in the libraries below. A check is a ``raise`` statement in a module of ours, which the traceback's last
    entry shows.
    """
    if isinstance(error, OSError) and error.errno is not None:
        named = "" if error.filename is None else f"{error.filename}: "
        return f"{named}{error.strerror}"
    # A diverged training comes from a worker process, without its traceback.
    if isinstance(error, (FloatingPointError, ImplUnavailable)):
        return str(error)
    if isinstance(error, (ValueError, TypeError, OSError)) and _raised_here(error):
        return str(error)
    return None


def _raised_here(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return package == "rgfast" and trace.tb_frame.f_code.co_code[trace.tb_lasti] == _RAISE
