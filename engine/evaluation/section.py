"""Section: figures and text of one part of the evaluation. Scope: what is evaluated, and against what."""

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

STATELESS = "_stateless"  # suffix of figures of the network without its state
STARTS = 16  # how many episodes are tried for a start, and how many frames into them


@dataclass(frozen=True)
class Size:
    """How much is measured; the defaults are the full evaluation."""

    routes: int = 96  # most short routes
    returns: int = 8  # most routes of each length that lead back
    return_seconds: tuple[int, ...] = (5, 10, 20)
    reference: int = 3072  # true frames with which generated ones are compared
    minutes: tuple[int, ...] = (1, 2)  # lengths of the games that measure drift, ascending
    long_minutes: tuple[int, ...] = (10,)  # lengths of a few longer games
    minute: float = 60.0  # seconds
    segment: float = 5.0  # seconds for which a long game has one row of figures
    starts: int = 2  # games of each policy in a round
    rounds: int = 3  # most rounds until both halves of the games agree
    long_starts: int = 1  # longer games of each policy
    steps: int = 300  # steps that are timed
    states: int = 96  # for counterfactuals
    flips: int = 16  # key changes, for latency
    settings: bool = True  # latency: also without correction
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
    """What is evaluated, what it is compared with, and where pictures are written."""

    player: Player
    stateless: Player | None  # the network without its state; None if it has none anyway
    truth: Truth | None  # None without a simulator
    missing: str  # why there is no simulator
    clips: Clips | None  # recordings, if there is no simulator
    reference: Reference
    probe: WallProbe | None  # None without a map, by which true views are labelled
    lines: np.ndarray  # (n, 4), the map's walls; (0, 4) without a map
    routes: list[Route]
    folder: Path
    seed: int
    size: Size
    most: int  # most frames of a game
    learnt: str = ""  # a sentence if the network may have been trained on what it is measured on

    @property
    def history(self) -> int:
        """True frames that a game starts from."""
        return self.player.known_frames

    def frames(self, seconds: float) -> int:
        return max(1, round(seconds * self.player.world.fps))

    def start(self) -> tuple[np.ndarray, np.ndarray, list[dict[str, float] | None]]:
        """A start of a game: true frames (t, h, w, 3), the keys that caused them (t, k), and their states
        (t).
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
        """Adds a picture in the report's folder."""
        self.lines += [f"![{caption}]({name})", "", f"*{caption}*", ""]

    def table(self, header: list[str], rows: list[list]) -> None:
        """Adds a table; cells are text or figures."""
        cells = [[c if isinstance(c, str) else f"{c:.3g}" for c in row] for row in rows]
        align = ["---", *["---:" for _ in header[1:]]]
        self.lines += [f"| {' | '.join(map(str, row))} |" for row in (header, align, *cells)] + [""]

    def round(self, digits: int = 2) -> None:
        self.figures = {name: round(float(value), digits) for name, value in self.figures.items()}


def skipped(title: str, scope: Scope) -> Section:
    """The section in place of a part that needs the true world, if there is none."""
    section = Section(title)
    section.say(f"Left out, because the true world is not to be had: {scope.missing}")
    return section
