"""True games: `make_world` opens one; simulators are imported only when theirs is asked for."""

from __future__ import annotations

from ..config import UserError, WorldConfig
from .base import ActionSpace, World

__all__ = ["ActionSpace", "World", "make_world"]


def make_world(config: WorldConfig) -> World:
    """Opens the world that `config` describes. Raises UserError when it, or its simulator, is not there."""
    if config.kind == "doom":
        from .doom import DoomWorld

        return DoomWorld(config)
    if config.kind == "gym":
        from .gym import GymWorld

        return GymWorld(config)
    raise UserError(f"world.kind must be doom or gym, not {config.kind!r}.")
