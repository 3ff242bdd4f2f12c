"""Watch: figures and features of a long game as it goes by, segment after segment, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .features import Features, frechet
from .measures import motion, sharpness

EVERY = 3  # of the frames, for features: encoding is dear


@dataclass
class Watch:
    """What is kept of a game: a row of figures and the features of each segment of `length` frames, the
    pictures whose numbers are `shown`, and the first `begin` frames. Of the rest no more than a segment.
    """

    features: Features
    length: int
    policy: str = ""
    shown: frozenset[int] = frozenset()
    begin: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    points: list[Tensor] = field(default_factory=list)  # a segment's features (n, d)
    strip: list[np.ndarray] = field(default_factory=list)
    beginning: list[np.ndarray] = field(default_factory=list)
    frames: int = 0
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
            frames = np.stack(self._seen)
            self.points.append(self.features.of(frames[::EVERY]))
            self.rows.append(_figures(frames, self.points[-1], self.features))
            self._seen = []


def _figures(frames: np.ndarray, points: Tensor, features: Features) -> dict[str, float]:
    """Of frames, uint8 (n, h, w, 3), and their features (n', d): sharpness, mean colour and its deviation
    over pixels, Fréchet distance to true frames and straying from them, motion.
    """
    red, green, blue = frames.mean((0, 1, 2))
    return {
        "sharpness": sharpness(frames),
        "red": float(red),
        "green": float(green),
        "blue": float(blue),
        "deviation": float(frames.std((0, 1, 2)).mean()),
        "frechet": frechet(points, features.true),
        "stray": features.stray(points),
        "motion": motion(frames),
    }


def ratio(games: list[Watch], segments: int) -> float:
    """Fréchet distance in the last of the games' first `segments`, in shares of that in the first. The frames
    of all games are pooled: a few seconds of one game show one view, whose distance tells of the place.
    """
    pools = (torch.cat([game.points[at] for game in games]) for at in (0, segments - 1))
    first, last = (frechet(pool, games[0].features.true) for pool in pools)
    return last / max(first, 1e-9)


def curves(games: list[Watch]) -> dict[str, np.ndarray]:
    """Each figure by segment (segments,), its mean over the games that go on so long."""
    count = max(len(game.rows) for game in games)
    alive = [[game.rows[at] for game in games if len(game.rows) > at] for at in range(count)]
    return {name: np.array([np.mean([row[name] for row in rows]) for rows in alive]) for name in alive[0][0]}
