"""Files that come with the engine: beside it in a clone, inside it where a wheel was installed."""

from __future__ import annotations

from pathlib import Path

INSIDE = Path(__file__).resolve().parent


def shipped(path: str | Path) -> Path:
    """configs/… or assets/… → where it lies here; it may not exist."""
    inside = INSIDE / path
    return inside if inside.exists() else INSIDE.parent / path
