"""Stop: signals that end a training; and pauses, while a file called `pause` is in its folder."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAUSE = "pause"  # in out=DIR: while a file of this name is there, training waits
GONE = 13  # SIGPIPE's number: the reader of the output has left, which stops a training as a signal does
# Ctrl-C, a request to end (also at shutdown), and the end of the terminal
CAUGHT = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(BaseException):
    """A signal asked the program to stop. The message, if any, says what is saved."""

    def __init__(self, number: int, said: str = ""):
        super().__init__(said)
        self.code = 128 + number  # the exit code that a shell expects


class Stop:
    """Receives signals. Inside `gently` the first one is only noted: `signal` is its number, 0 before, and
    the training loop looks at it after each step. A second one, or any outside of `gently`, raises Stopped at
    once.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.waited = 0.0  # seconds of pauses
        self._gentle = False
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which signals are received here instead of ending the program."""
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
        """A context in which the first signal is only noted."""
        self._gentle = True
        try:
            yield
        finally:
            self._gentle = False

    def _arrive(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # a forked process that reads data
            raise KeyboardInterrupt
        again, self.signal = self.signal, number
        if again or not self._gentle:
            raise Stopped(number)


def paused(folder: Path) -> bool:
    """Whether training in this folder is to wait."""
    return (folder / PAUSE).exists()


def hold(folder: Path, seconds: float = 1.0) -> None:
    """Waits while the folder's pause file is there, looking every `seconds`; prints once that it does."""
    if paused(folder):
        say_paused(folder)
    while paused(folder):
        time.sleep(seconds)


def say_paused(folder: Path) -> None:
    """Prints that training waits, and for what."""
    print(f"Paused; training goes on when {folder / PAUSE} is gone.", file=sys.stderr, flush=True)
