"""Floor: a grid of the free places on a map of walls, and ways between them."""

from __future__ import annotations

from collections import deque

import numpy as np

from .sight import free_distances

CELL = 16.0  # map units between places; more on large maps, so that there are at most SIDE on a side
SIDE = 160
BODY = 18.0  # map units from a free place to the nearest wall, at least: a player's radius is 16


class Floor:
    """The free places of a map. `lines` (m, 4) are its walls: x1, y1, x2, y2 in map units."""

    def __init__(self, lines: np.ndarray) -> None:
        self.lines = lines
        ends = lines.reshape(-1, 2)
        self._low = ends.min(axis=0)
        size = ends.max(axis=0) - self._low
        self.cell = max(CELL, float(size.max()) / SIDE)
        self._shape = tuple(int(side / self.cell) + 1 for side in size)
        grid = np.stack(np.meshgrid(*map(np.arange, self._shape), indexing="ij"), -1).reshape(-1, 2)
        self._places = self._low + (grid + 0.5) * self.cell  # (n, 2)
        self._free = _distances(lines, self._places) >= BODY

    def route(self, begin: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A shortest way from `begin` (2,) to a random place that can be reached, but not one of the nearest
        tenth → places (n, 2); (0, 2) where none can be reached.
        """
        found = self._reach(begin)
        if not found:
            return np.zeros((0, 2))
        reached = list(found)  # in the order of their distance
        place = reached[min(int(rng.uniform(0.1, 1.0) * len(reached)), len(reached) - 1)]
        way = []
        while place is not None:
            way.append(self._places[place])
            place = found[place]
        return np.array(way[::-1])

    def clear(self, begin: np.ndarray, end: np.ndarray) -> bool:
        """Whether a player can walk straight from `begin` (2,) to `end` (2,) without touching a wall."""
        way = end - begin
        length = float(np.hypot(*way))
        if length == 0:
            return True
        side = np.array([-way[1], way[0]]) / length * (BODY - 1)
        origins = np.stack([begin - side, begin, begin + side])
        angle = np.rad2deg(np.arctan2(way[1], way[0]))
        return bool((free_distances(self.lines, origins, np.full(3, angle)) > length).all())

    def _reach(self, begin: np.ndarray) -> dict[int, int | None]:
        """Every place that can be reached, nearest first → the place before it on the way."""
        rows, columns = self._shape
        first = self._nearest(begin)
        if first is None:
            return {}
        found: dict[int, int | None] = {first: None}
        queue = deque([first])
        while queue:
            place = queue.popleft()
            row, column = divmod(place, columns)
            for dr, dc in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                if 0 <= row + dr < rows and 0 <= column + dc < columns:
                    other = place + dr * columns + dc
                    if self._free[other] and other not in found:
                        found[other] = place
                        queue.append(other)
        return found

    def _nearest(self, begin: np.ndarray) -> int | None:
        """The free place nearest to `begin` (2,); None if it is farther than three cells."""
        away = np.where(self._free, np.hypot(*(self._places - begin).T), np.inf)
        nearest = int(away.argmin())
        return nearest if away[nearest] < 3 * self.cell else None


def _distances(lines: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Places (n, 2) → their distance (n,) from the nearest of the walls (m, 4)."""
    nearest = np.full(len(places), np.inf)
    for x1, y1, x2, y2 in lines:
        begin, way = np.array([x1, y1]), np.array([x2 - x1, y2 - y1])
        length = max(float(way @ way), 1e-9)
        share = np.clip((places - begin) @ way / length, 0, 1)
        nearest = np.minimum(nearest, np.hypot(*(places - begin - share[:, None] * way).T))
    return nearest
