"""UserError: bad input, told in one sentence; and how programs end, whatever goes wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress

from .console import escape_what_cannot_be_printed


class UserError(Exception):
    """Bad input: one sentence that says what is wrong and what to do; programs print it and exit 2."""


def run_program(name: str, work: Callable[[], int]) -> int:
    """A program's work → its exit code. Bad input and every error of the system (a full or read-only disk,
    nobody who reads the output) is one sentence on stderr and code 2.
    """
    _open_missing()
    escape_what_cannot_be_printed()
    try:
        try:
            code = work()
        except SystemExit as asked:  # a parser has said why
            code = asked.code
        sys.stdout.flush()  # now, as an error at the exit could not be told
        return code
    except UserError as error:
        return refuse(name, _line(error), 2)
    except OSError as error:
        if not _flushed(sys.stdout) or isinstance(error, BrokenPipeError):
            return refuse(name, f"the output could not be written: {reason(error)}.", 2)
        if _folder_is_gone():
            return refuse(name, "the folder that this was started in is gone; cd to one that is there.", 2)
        where = f"{error.filename}: " if error.filename else ""
        return refuse(name, f"{where}{reason(error)}; free some space, or write to another place.", 2)
    except KeyboardInterrupt:
        return refuse(name, "stopped.", 130)


def refuse(name: str, said: str, code: int) -> int:
    """Says in one sentence why there is no result → the exit code."""
    with suppress(OSError):
        print(f"{name}: {said}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        _flushed(stream)
    return code


def reason(error: BaseException) -> str:
    """What an error says, in a few words."""
    return getattr(error, "strerror", None) or _line(error) or type(error).__name__


def _line(error: BaseException) -> str:
    """An error's words in one line. One of a process that reads data comes with a traceback above them."""
    words = str(error).strip()
    if words.startswith("Caught "):
        words = words.splitlines()[-1].partition(": ")[2]
    return " ".join(words.split())


def _folder_is_gone() -> bool:
    try:
        os.getcwd()
    except OSError:
        return True
    return False


def _open_missing() -> None:
    """Outputs that were closed from the start swallow what they are told. Otherwise the next file that is
    opened would get their number, and what libraries print.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            nowhere = open(os.devnull, "w")  # noqa: SIM115
            try:
                os.fstat(number)
            except OSError:
                os.dup2(nowhere.fileno(), number)
            setattr(sys, name, nowhere)


def _flushed(stream) -> bool:
    """Whether a stream could be written. What it still holds is given up: at the exit Python would fail on it
    once more.
    """
    try:
        stream.flush()
    except OSError:
        with suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        return False
    return True
