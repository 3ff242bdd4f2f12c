"""Files that are begun: new ones alone, and nothing of them stays where that fails."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path


class NewFiles:
    """Makes the folder for files that are to be written. Raises FileExistsError where one of them is there,
    and other OSErrors where there can be no such folder.
    """

    def __init__(self, *files: Path) -> None:
        for file in files:
            if os.path.lexists(file):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(file))
        folder = files[0].parent
        self._files = files
        self._folders = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            self.remove()
            raise

    def remove(self) -> None:
        """Takes back the files, and the folders that were made for them and hold nothing else."""
        for path in self._files:
            with suppress(OSError):
                path.unlink()
        for path in self._folders:  # the innermost comes first
            with suppress(OSError):
                path.rmdir()
