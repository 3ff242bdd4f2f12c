"""SegmentStats: figures of a long game as it goes by, segment after segment, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .features import Reference, features
from .measures import difference, motion, sharpness
from .probe import WallProbe

EVERY = 3  # of the frames, for features


@dataclass
class SegmentStats:
    """What is kept of a game: a row of figures for each segment of `length` frames, the pictures whose
    numbers are `shown`, and the first `begin` frames. Of the rest no more than a segment.
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
        """The next frame, uint8 (h, w, 3)."""
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
        """Of a segment, uint8 (n, h, w, 3): sharpness, mean colour and its deviation over pixels, distance to
        the nearest true frames, motion, how far the view has come from that after the first segment (grey
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
    """Of a figure over games and some of their segments."""
    return float(np.mean([row[name] for game in games for row in game.rows[some]]))


def growth(games: list[SegmentStats], segments: int, span: int) -> float:
    """Distance to the nearest true frames in the last `span` of the games' first `segments`, in shares of
    that in the first `span`; all games pooled.
    """
    last = mean(games, "nearest", slice(segments - span, segments))
    return last / max(mean(games, "nearest", slice(span)), 1e-9)


def disagreement(games: list[SegmentStats], segments: int, span: int) -> float:
    """By how much the growths of both halves of the games differ, in shares of their mean; inf of one."""
    if len(games) < 2:
        return float("inf")
    halves = [growth(games[number::2], segments, span) for number in (0, 1)]
    return abs(halves[0] - halves[1]) / max(np.mean(halves), 1e-9)


def curves(games: list[SegmentStats]) -> dict[str, np.ndarray]:
    """Each figure by segment (segments,), its mean over the games that go on so long."""
    count = max(len(game.rows) for game in games)
    alive = [[game.rows[at] for game in games if len(game.rows) > at] for at in range(count)]
    return {name: np.array([np.mean([row[name] for row in rows]) for rows in alive]) for name in alive[0][0]}
