"""Section: what one part of the evaluation has to say, and Scope: what it has to say it about."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..session import Player
from .branches import Truth
from .clips import Clips
from .features import Features


@dataclass(frozen=True)
class Size:
    """How much is tried: the defaults are the full evaluation."""

    held: int = 36_000  # frames that are recorded where no recording is given
    clips: int = 64  # held-out clips over which fidelity is averaged
    reference: int = 2048  # true frames that Fréchet distances are taken to
    turns: int = 100
    places: int = 3  # from which the minutes of endurance start; 0 leaves them out
    minutes: tuple[int, ...] = (1, 2, 10)  # of the long games, ascending
    minute: float = 60.0  # seconds
    segment: float = 5.0  # seconds over which a long game's figures are taken
    starts: int = 3  # long games a policy, up to the second-longest of the minutes
    long_starts: int = 2  # of these, games that go on to the longest
    steps: int = 300  # over which their time is taken
    states: int = 24  # for counterfactuals
    flips: int = 16  # keys that change, for latency
    walks: int = 3  # places for each kind of behaviour
    idle: float = 60.0  # seconds of standing still


QUICK = Size(
    held=12_000,
    clips=8,
    reference=768,
    turns=30,
    places=0,
    minutes=(1,),
    starts=1,
    steps=120,
    states=6,
    flips=6,
    walks=1,
    idle=20.0,
)


@dataclass
class Scope:
    """What is evaluated, what it is held against, and where pictures go."""

    player: Player
    clips: Clips
    features: Features
    truth: Truth | None  # None where the simulator is not to be had
    missing: str  # why
    folder: Path
    seed: int
    size: Size
    most: int  # frames of a game at most

    @property
    def history(self) -> int:
        """True frames that a game starts from."""
        return self.player.denoiser.config.sink + self.player.denoiser.config.recent

    def frames(self, seconds: float) -> int:
        return max(1, round(seconds * self.player.world.fps))


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
