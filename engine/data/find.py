"""Finds recordings below a folder."""

from __future__ import annotations

import os
from pathlib import Path

from ..config import UserError
from .schema import HEADER


def find_recordings(data_dir: str | Path) -> list[Path]:
    """All recordings below `data_dir`, sorted, without unfinished ones (.tmp); UserError if there is none."""
    found = walk_recordings(data_dir)
    if not found:
        how = f"collect some with: python train.py stage=collect data={Path(data_dir)}"
        raise UserError(f"There is no recording in {Path(data_dir)}; {how}")
    return found


def walk_recordings(data_dir: str | Path) -> list[Path]:
    """As `find_recordings`; empty if there is none. Links are followed; a recording with two names counts
    once.
    """
    found: dict[str, Path] = {}
    seen = set()  # a link may lead back to a folder above it
    for folder, inside, files in os.walk(data_dir, followlinks=True):
        inside[:] = sorted(name for name in inside if not name.endswith(".tmp"))
        if (place := os.path.realpath(folder)) in seen:
            inside.clear()
        elif HEADER in files:
            found[place] = Path(folder)
        seen.add(place)
    return sorted(found.values())
