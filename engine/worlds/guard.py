"""Guard: child processes end with this one, however it ends."""

from __future__ import annotations

import subprocess
from pathlib import Path


def children() -> set[int]:
    """This process's children; none where the system does not tell."""
    found: set[int] = set()
    for file in Path("/proc/self/task").glob("*/children"):
        try:
            found |= set(map(int, file.read_text().split()))
        except OSError:  # that thread has ended
            continue
    return found


class Guard:
    """Kills processes once this one is gone, killed or crashed; a simulator without its player minds no
    signal to end and plays on for ever. What waits for that is a shell, which reads from a pipe that nobody
    writes to.
    """

    def __init__(self, processes: set[int]):
        command = ["sh", "-c", 'read -r _; kill -9 "$@"', "guard", *map(str, processes)]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._waiting = None
        if processes:  # in a session of its own, so that Ctrl-C does not end the guard first
            self._waiting = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, **silent)

    def close(self) -> None:
        """Ends the processes now, where they still run."""
        if self._waiting is not None:
            self._waiting.stdin.close()
            self._waiting.wait()
