"""SegmentStats: figures of a long game, segment by segment, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .features import Reference, features
from .measures import difference, motion, sharpness
from .probe import WallProbe

EVERY = 3  # of the frames, for features


@dataclass
class SegmentStats:
    """Keeps a row of figures for each segment of `length` frames, the frames with the indices `shown`, the
    first `begin` frames, and at most one segment of all others.
    """

    reference: Reference
    length: int
    policy: str = ""
    shown: frozenset[int] = frozenset()
    begin: int = 0
    probe: WallProbe | None = None
    rows: list[dict[str, float]] = field(default_factory=list)
    strip: list[np.ndarray] = field(default_factory=list)
    beginning: list[np.ndarray] = field(default_factory=list)
    frames: int = 0
    settled: np.ndarray | None = None  # the first segment's last frame
    _seen: list[np.ndarray] = field(default_factory=list)

    def add(self, frame: np.ndarray) -> None:
        """Takes the next frame, uint8 (h, w, 3)."""
        if self.frames in self.shown:
            self.strip.append(frame)
        if self.frames < self.begin:
            self.beginning.append(frame)
        self.frames += 1
        self._seen.append(frame)
        if len(self._seen) == self.length:
            self.settled = frame if self.settled is None else self.settled
            self.rows.append(self._figures(np.stack(self._seen)))
            self._seen = []

    def _figures(self, frames: np.ndarray) -> dict[str, float]:
        """Figures of a segment, uint8 (n, h, w, 3): sharpness, mean colour and its deviation over pixels,
        distance to the nearest true frames, motion, difference from the first segment's last frame (grey
        levels of the coarse picture), and the share of views that a wall fills.
        """
        points = features(frames[::EVERY])
        red, green, blue = frames.mean((0, 1, 2))
        row = {
            "sharpness": sharpness(frames),
            "red": float(red),
            "green": float(green),
            "blue": float(blue),
            "deviation": float(frames.std((0, 1, 2)).mean()),
            "nearest": self.reference.nearest_distance(points),
            "motion": motion(frames),
            "away": float(difference(frames[-1], self.settled)),
        }
        return row if self.probe is None else row | {"wall": float(self.probe.of(points).mean())}


def mean(games: list[SegmentStats], name: str, some: slice) -> float:
    """The mean of a figure over games and some of their segments."""
    return float(np.mean([row[name] for game in games for row in game.rows[some]]))


def growth(games: list[SegmentStats], segments: int, span: int) -> float:
    """Growth of the distance to the nearest true frames: in the last `span` of the games' first `segments`,
    as a multiple of that in the first `span`, all games together.
    """
    last = mean(games, "nearest", slice(segments - span, segments))
    return last / max(mean(games, "nearest", slice(span)), 1e-9)


def disagreement(games: list[SegmentStats], segments: int, span: int) -> float:
    """Difference between the growths of both halves of the games, as a share of their mean; inf for one
    game.
    """
    if len(games) < 2:
        return float("inf")
    halves = [growth(games[number::2], segments, span) for number in (0, 1)]
    return abs(halves[0] - halves[1]) / max(np.mean(halves), 1e-9)


def curves(games: list[SegmentStats]) -> dict[str, np.ndarray]:
    """For each figure, its mean by segment (segments,) over the games that are long enough."""
    count = max(len(game.rows) for game in games)
    alive = [[game.rows[at] for game in games if len(game.rows) > at] for at in range(count)]
    return {name: np.array([np.mean([row[name] for row in rows]) for rows in alive]) for name in alive[0][0]}
