"""Section: what one part of the evaluation has to say, and Scope: what it has to say it about."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..rollout.player import Player
from .clips import Clips
from .features import Reference
from .probe import WallProbe
from .route import Route
from .truth import Truth

STATELESS = "_stateless"  # at the end of figures of the same network without its state
STARTS = 16  # episodes that are tried for a start, and frames into them


@dataclass(frozen=True)
class Size:
    """How much is tried: the defaults are the full evaluation."""

    routes: int = 96  # short routes that are played at most
    returns: int = 8  # routes back to their start that are played of each length at most
    return_seconds: tuple[int, ...] = (5, 10, 20)
    reference: int = 3072  # true frames to which the nearest is sought
    minutes: tuple[int, ...] = (1, 2)  # of the games in which drift is seen, ascending
    long_minutes: tuple[int, ...] = (10,)  # of a few that go on
    minute: float = 60.0  # seconds
    segment: float = 5.0  # seconds over which a long game's figures are taken
    starts: int = 2  # games a policy and round
    rounds: int = 3  # of them at most, until the halves agree
    long_starts: int = 1  # of the long ones a policy
    steps: int = 300  # over which their time is taken
    states: int = 96  # for counterfactuals
    flips: int = 16  # keys that change, for latency
    settings: bool = True  # latency: at all settings, not only the network's own
    walks: int = 3  # places for each kind of behaviour
    idle: float = 60.0  # seconds of standing still


QUICK = Size(
    routes=16,
    returns=2,
    return_seconds=(5,),
    reference=768,
    minutes=(1,),
    long_minutes=(),
    starts=1,
    rounds=1,
    long_starts=1,
    steps=120,
    states=6,
    flips=4,
    settings=False,
    walks=1,
    idle=10.0,
)


@dataclass
class Scope:
    """What is evaluated, what it is held against, and where pictures go."""

    player: Player
    stateless: Player | None  # the same network without its state; None where it has none anyway
    truth: Truth | None  # None where the simulator is not to be had
    missing: str  # why
    clips: Clips | None  # recordings, where there is no simulator
    reference: Reference
    probe: WallProbe | None  # None where no map tells which true views a wall fills
    lines: np.ndarray  # of the map (n, 4), none where there is no map
    routes: list[Route]
    folder: Path
    seed: int
    size: Size
    most: int  # frames of a game at most
    learnt: str = ""  # a sentence where the network may have learnt what it is measured on

    @property
    def history(self) -> int:
        """True frames that a game starts from."""
        return self.player.known_frames

    def frames(self, seconds: float) -> int:
        return max(1, round(seconds * self.player.world.fps))

    def start(self) -> tuple[np.ndarray, np.ndarray, list[dict[str, float] | None]]:
        """True frames (t, h, w, 3) to begin a game with, the keys that caused them (t, k), and the states at
        these (t).
        """
        if self.truth is not None:
            for number in range(STARTS):
                if state := self.truth.state(self.seed + number, self.history + STARTS):
                    return state.frames, state.actions, state.told
        places = self.clips.places(self.history)
        frames, actions, told = self.clips.choose(places, 1, self.history, self.seed)
        return frames[0], actions[0].numpy(), told[0]


@dataclass
class Section:
    """A part of the report: its figures, which go into the JSON, and its text, with tables and pictures."""

    title: str
    figures: dict[str, float] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def say(self, *sentences: str) -> None:
        self.lines += [*sentences, ""]

    def show(self, name: str, caption: str) -> None:
        """A picture in the report's folder."""
        self.lines += [f"![{caption}]({name})", "", f"*{caption}*", ""]

    def table(self, header: list[str], rows: list[list]) -> None:
        """Cells are text or figures."""
        cells = [[c if isinstance(c, str) else f"{c:.3g}" for c in row] for row in rows]
        align = ["---", *["---:" for _ in header[1:]]]
        self.lines += [f"| {' | '.join(map(str, row))} |" for row in (header, align, *cells)] + [""]

    def round(self, digits: int = 2) -> None:
        self.figures = {name: round(float(value), digits) for name, value in self.figures.items()}


def skipped(title: str, scope: Scope) -> Section:
    """A part that needs the true world, where there is none."""
    section = Section(title)
    section.say(f"Left out, because the true world is not to be had: {scope.missing}")
    return section
