"""Files that are whole or not there: small ones, and those that are begun."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from .errors import UserError, reason


def write_whole(path: Path, content: str | bytes) -> None:
    """`replace_whole`, which also makes the folders above. Raises UserError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, content)
    except OSError as error:
        said = f"{path} could not be written ({reason(error)})"
        raise UserError(f"{said}; free some space or choose another place.") from error


def replace_whole(path: Path, content: str | bytes) -> None:
    """Writes a file beside, then renames it: what was there stays until the new one is whole, and stays where
    that fails. Raises OSError then.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise


class NewFiles:
    """Makes the folder for files that are to be written, and the first of them, empty: of two programs that
    want the same files one alone gets them. Raises FileExistsError where one of them is there, and other
    OSErrors where there can be no such folder or file.
    """

    def __init__(self, *files: Path) -> None:
        for file in files:
            if os.path.lexists(file):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(file))
        folder = files[0].parent
        self._files: tuple[Path, ...] = ()  # none is ours yet
        self._folders = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files[0].open("xb").close()
        except OSError:
            self.remove()
            raise
        self._files = files

    def remove(self) -> None:
        """Takes back the files, and the folders that were made for them and hold nothing else."""
        for path in self._files:
            with suppress(OSError):
                path.unlink()
        for path in self._folders:  # the innermost comes first
            with suppress(OSError):
                path.rmdir()
