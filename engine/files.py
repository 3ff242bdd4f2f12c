"""Small files that are whole or not there: written beside, then renamed."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UserError, reason


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file and the folders above it; what was there stays until the new one is whole, and stays
    where that fails. Raises UserError then.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        said = f"{path} could not be written ({reason(error)})"
        raise UserError(f"{said}; free some space or choose another place.") from error
