"""A lock, so that only one process writes the same recordings or trains in the same folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import UserError


@contextmanager
def alone(lock: Path, said: str) -> Iterator[None]:
    """A context that holds `lock`, a file (made if missing) or an existing folder; UserError with the words
    `said` where another process holds it. Without locks, on Windows and some file systems, it does nothing.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    file = os.open(lock, os.O_RDONLY if lock.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(said) from None
        except OSError:
            pass  # a file system without locks
        yield  # the file stays: if removed, one process could lock the old and another a new one
    finally:
        os.close(file)
