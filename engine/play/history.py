"""History: the last minutes of play, so that they can run backwards and be played otherwise."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

MINUTES = 2.1  # a little more than two, as frames leave in groups
BUDGET = 190_000_000  # bytes of pictures and snapshots


@dataclass
class Life:
    """One game from its reset on: what leads to each of its frames."""

    seed: int
    start: str
    held: list[list] = field(default_factory=list)  # names of keys and for how many frames they were held

    def add(self, names: list[str]) -> None:
        """A frame more under these keys."""
        if self.held and self.held[-1][0] == names:
            self.held[-1][1] += 1
        else:
            self.held.append([names, 1])

    def until(self, age: int) -> Life:
        """The same game `age` frames after its reset."""
        cut, left = [], age
        for names, frames in self.held:
            if left > 0:
                cut.append([names, min(frames, left)])
            left -= frames
        return Life(self.seed, self.start, cut)


@dataclass
class Moment:
    """A frame that was shown, uint8 (h, w, 3), the keys (k,) that caused it, its game, and its age in it."""

    frame: np.ndarray
    action: np.ndarray
    life: Life
    age: int
    snapshot: Mapping[str, Any] | None = None  # Session.snapshot, for some moments
    recorded: tuple[str, int] | None = None  # recording's name and frame number, where it was recorded


class History:
    """`add` takes every frame as it is shown and the oldest ones leave; every so many have a snapshot of the
    game, from which the frames behind it are played again. `back` is how far one has gone back.
    """

    def __init__(self, fps: float, frame_bytes: int, snapshot_bytes: int) -> None:
        """Sizes in bytes; they decide how many frames lie between two snapshots: as few as fit."""
        wanted = int(MINUTES * 60 * fps)
        pictures = min(BUDGET // 2, wanted * frame_bytes)
        self.frames = min(wanted, pictures // frame_bytes)
        spacing = max(8, -(-self.frames * snapshot_bytes // (BUDGET - pictures)))
        self.spacing = max(1, min(spacing, self.frames))
        self.snapshots = self.frames // self.spacing + 2  # at most; a game has one at its reset, too
        self.moments: deque[Moment] = deque()
        self.back = 0

    def wants_snapshot(self, age: int) -> bool:
        """Whether the frame of this age should come with one."""
        return age % self.spacing == 0

    def add(self, moment: Moment) -> None:
        """The newest moment. Those that no snapshot leads to any more leave with the oldest one."""
        self.moments.append(moment)
        count = sum(one.snapshot is not None for one in self.moments) if moment.snapshot is not None else 0
        if len(self.moments) > self.frames + self.spacing or count > self.snapshots:
            self.moments.popleft()
            while len(self.moments) > self.frames or self.moments[0].snapshot is None:
                self.moments.popleft()

    def rewind(self) -> Moment | None:
        """The moment before the one that is shown; None where nothing older is known."""
        if self.back + 1 >= len(self.moments):
            return None
        self.back += 1
        return self.moments[-1 - self.back]

    def branch(self) -> list[Moment]:
        """Forgets what came after the moment that is shown → a moment with a snapshot and those that lead
        from it to this one, oldest first.
        """
        for _ in range(self.back):
            self.moments.pop()
        self.back = 0
        since = next(i for i, moment in enumerate(reversed(self.moments)) if moment.snapshot is not None)
        return list(islice(self.moments, len(self.moments) - 1 - since, None))
