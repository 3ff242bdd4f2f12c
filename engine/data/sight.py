"""What is seen on a map of walls: free distances by ray casting, and views that a wall fills."""

from __future__ import annotations

import numpy as np

VIEW = np.array([40.0, 20.0, 0.0, -20.0, -40.0])  # rays, in degrees; a Doom camera sees 45 to each side
NEAR = 100.0  # map units: if all rays are shorter, a wall fills the view


def free_distances(lines: np.ndarray, origins: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Distance (n,) from `origins` (n, 2) along `angles` (n,), degrees, to the next wall; inf without one.

    `lines`: walls (m, 4): x1, y1, x2, y2 in map units.
    """
    if not len(lines):
        return np.full(len(angles), np.inf)
    gaze = np.deg2rad(angles)[:, None]
    dx, dy = np.cos(gaze), np.sin(gaze)  # (n, 1)
    px, py = lines[:, 0] - origins[:, :1], lines[:, 1] - origins[:, 1:]  # (n, m)
    sx, sy = lines[:, 2] - lines[:, 0], lines[:, 3] - lines[:, 1]  # (m,)
    with np.errstate(divide="ignore", invalid="ignore"):
        across = dx * sy - dy * sx
        along = (px * sy - py * sx) / across  # units to the wall
        place = (px * dy - py * dx) / across  # where on the wall, 0 to 1
        hit = (along >= 0) & (place >= 0) & (place <= 1)
    return np.where(hit, along, np.inf).min(axis=1)


def filled_views(lines: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Whether a wall fills the view at `places` (n, 3): x, y, angle in degrees → bool (n,)."""
    origins = np.repeat(places[:, :2], len(VIEW), axis=0)
    angles = (places[:, 2:] + VIEW).ravel()
    return (free_distances(lines, origins, angles).reshape(len(places), -1) < NEAR).all(axis=1)


def wall_views(states: list[dict | None], lines: np.ndarray) -> np.ndarray | None:
    """Whether a wall fills the view from each state, bool (n,); None if any state lacks x, y or angle, or
    there are no walls. `lines`: walls (m, 4).
    """
    places = [_place(state) for state in states]
    if not places or None in places or not len(lines):
        return None
    return filled_views(lines, np.array(places))


def wall_share(states: list[dict | None], lines: np.ndarray) -> float | None:
    """Of the states with x, y and angle, the share whose view a wall fills; None without such states or
    walls.
    """
    views = wall_views([state for state in states if _place(state)], lines)
    return None if views is None else float(views.mean())


def _place(state: dict | None) -> tuple[float, float, float] | None:
    known = state and {"x", "y", "angle"} <= state.keys()
    return (state["x"], state["y"], state["angle"]) if known else None
