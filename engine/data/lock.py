"""A lock: who writes the same recordings, or trains in the same folder, is alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import UserError


@contextmanager
def alone(lock: Path, said: str) -> Iterator[None]:
    """Two programs that write the same files would spoil each other's; the second is refused, with what is
    `said`. `lock` is a file, which is made, or a folder that is there.
    """
    try:
        import fcntl
    except ImportError:  # Windows: nothing tells
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
        yield  # the file stays: who waits to open it would lock one that is gone, and a third a new one
    finally:
        os.close(file)
