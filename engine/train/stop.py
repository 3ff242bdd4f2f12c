"""Being stopped and being paused: signals, and a file called `pause` in the folder of a training. What is
saved then, says resume.py.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAUSE = "pause"  # in out=DIR: while a file of this name is there, training waits
GONE = 13  # SIGPIPE's number: whoever reads the output has left, which asks to stop as a signal does
# Ctrl-C, the system's end, and that of the terminal
CAUGHT = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(BaseException):
    """The program was told to stop. The message, if there is one, says what is saved."""

    def __init__(self, number: int, said: str = ""):
        super().__init__(said)
        self.code = 128 + number  # the exit code that a shell expects


class Stop:
    """What arrived: `signal` is 0 or the number of one that asks to stop, for which the loop looks at the end
    of a step. Where nobody looks, and at the second one, the signal raises Stopped there and then.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.waited = 0.0  # seconds of pauses
        self._gentle = False
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which signals come here instead of ending the program as they are."""
        before = {number: signal.getsignal(number) for number in CAUGHT}
        before = {number: how for number, how in before.items() if how is not signal.SIG_IGN}  # nohup
        for number in before:
            signal.signal(number, self._arrive)
        try:
            yield
        finally:
            for number, how in before.items():
                signal.signal(number, how)

    @contextmanager
    def gently(self) -> Iterator[None]:
        """A context whose owner looks at `signal` himself."""
        self._gentle = True
        try:
            yield
        finally:
            self._gentle = False

    def _arrive(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # a process of ours that reads data
            raise KeyboardInterrupt
        again, self.signal = self.signal, number
        if again or not self._gentle:
            raise Stopped(number)


def paused(folder: Path) -> bool:
    """Whether training in this folder is to wait."""
    return (folder / PAUSE).exists()


def hold(folder: Path, seconds: float = 1.0) -> None:
    """Waits as long as the folder's pause file is there; says so once."""
    if paused(folder):
        say_paused(folder)
    while paused(folder):
        time.sleep(seconds)


def say_paused(folder: Path) -> None:
    print(f"Paused; training goes on when {folder / PAUSE} is gone.", file=sys.stderr, flush=True)
