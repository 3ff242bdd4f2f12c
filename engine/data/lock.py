"""A lock, so that only one process writes the same recordings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import UserError


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """A context that holds the lock file; UserError where another process holds it. Without locks, on Windows
    and some file systems, it does nothing.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = f"Another collection is writing the same recordings into {lock.parent}"
            raise UserError(f"{said}; wait for it, or choose another seed or data=.") from None
        except OSError:
            pass  # a file system without locks
        yield  # the file stays: if removed, one process could lock the old and another a new one
