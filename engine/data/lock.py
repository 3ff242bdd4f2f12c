"""A folder's lock: who writes the same recordings is alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import UserError


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Two collections that write the same recordings would spoil each other's; the second is refused."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing tells
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
        yield  # the file stays: who waits to open it would lock one that is gone, and a third a new one
