"""Map: the lines of a true world's walls, and which of its views a wall fills."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from ..config import WorldConfig

RAYS = (-40.0, -20.0, 0.0, 20.0, 40.0)  # degrees from the middle of a view of 90
NEAR = 100.0  # map units: where every ray ends nearer than this, a wall fills the view


def map_lines(config: WorldConfig) -> np.ndarray | None:
    """Lines (n, 4) of a ViZDoom map that nobody walks through, x1 y1 x2 y2; None of other worlds."""
    if config.kind != "doom":
        return None
    import vizdoom

    game = vizdoom.DoomGame()
    game.load_config(str(Path(vizdoom.scenarios_path) / f"{config.scenario}.cfg"))
    if config.map:
        game.set_doom_map(config.map)
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_sectors_info_enabled(True)
    with tempfile.TemporaryDirectory(prefix="rollplay-map-") as folder:
        game.set_doom_config_path(str(Path(folder) / "vizdoom.ini"))
        try:
            game.init()
            game.new_episode()
            lines = [line for sector in game.get_state().sectors for line in sector.lines if line.is_blocking]
        finally:
            game.close()
    return np.array([[line.x1, line.y1, line.x2, line.y2] for line in lines], np.float64).reshape(-1, 4)


def distances(lines: np.ndarray, x: float, y: float, angles: np.ndarray) -> np.ndarray:
    """From a place, how far rays at `angles` (n,), degrees, go until they meet a line; inf where none is."""
    way = np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], -1)[:, None]  # (n, 1, 2)
    start, along = lines[:, :2] - (x, y), lines[:, 2:] - lines[:, :2]  # (m, 2)
    cross = way[..., 0] * along[:, 1] - way[..., 1] * along[:, 0]  # (n, m)
    safe = np.where(np.abs(cross) < 1e-9, np.nan, cross)
    far = (start[:, 0] * along[:, 1] - start[:, 1] * along[:, 0]) / safe
    part = (start[:, 0] * way[..., 1] - start[:, 1] * way[..., 0]) / safe
    met = (far >= 0) & (part >= -1e-6) & (part <= 1 + 1e-6)
    return np.where(met, far, np.inf).min(1, initial=np.inf)


def faces_wall(lines: np.ndarray | None, told: dict[str, float]) -> bool | None:
    """Whether a wall fills the view from a true state; None where there is no map or no place."""
    if lines is None or not {"x", "y", "angle"} <= told.keys():
        return None
    return bool((distances(lines, told["x"], told["y"], told["angle"] + np.array(RAYS)) < NEAR).all())


def wall_views(lines: np.ndarray | None, told: list[dict[str, float]]) -> np.ndarray | None:
    """`faces_wall` of many states → bool (n,), or None where that is not known of all."""
    each = [faces_wall(lines, one) for one in told]
    return None if not each or None in each else np.array(each, bool)
