"""Drift: long games, looked at every few seconds; what changes from the first seconds to the last?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from ..film import Film
from ..picture import grid, save_picture
from ..policies import make_policy
from ..session import Session
from .branches import ATTEMPTS, State
from .features import Features
from .measures import motion, sharpness
from .plots import draw_drift
from .section import Scope, Section

POLICIES = ("scripted", "random", "idle")
MOVING = POLICIES[:2]  # by whose games motion is judged
EVERY = 3  # of the frames, for Fréchet distances: encoding is dear
SHOWN = 12  # pictures of a game in its strip
FILM = "drift.mp4"
EPISODES = 9000  # seed of the true states that long games begin with


@dataclass
class Watch:
    """Figures of a game as it goes by, one row a segment of `length` frames; keeps no more than a segment."""

    features: Features
    length: int
    rows: list[dict[str, float]] = field(default_factory=list)
    seen: list[np.ndarray] = field(default_factory=list)

    def add(self, frame: np.ndarray) -> None:
        """The next frame, uint8 (h, w, 3)."""
        self.seen.append(frame)
        if len(self.seen) == self.length:
            self.rows.append(segment_figures(np.stack(self.seen), self.features))
            self.seen = []


def segment_figures(frames: np.ndarray, features: Features) -> dict[str, float]:
    """Of frames, uint8 (n, h, w, 3): sharpness, mean colour and its deviation over pixels, Fréchet distance
    to true frames, motion.
    """
    red, green, blue = frames.mean((0, 1, 2))
    return {
        "sharpness": sharpness(frames),
        "red": float(red),
        "green": float(green),
        "blue": float(blue),
        "deviation": float(frames.std((0, 1, 2)).mean()),
        "frechet": features.distance(frames[::EVERY]),
        "stray": features.stray(frames[::EVERY]),
        "motion": motion(frames),
    }


def ratio(games: list[list[dict[str, float]]], segments: int) -> float:
    """Fréchet distance in the last of the games' first `segments`, in shares of that in the first, both as
    means over games, lest one that began with a usual view counts most.
    """
    first, last = (np.mean([rows[at]["frechet"] for rows in games]) for at in (0, segments - 1))
    return float(last / max(first, 1e-9))


@dataclass
class Game:
    """What is kept of a game: where it began, its rows, some pictures, its first minute, its steps' times."""

    state: State
    rows: list[dict[str, float]]
    strip: np.ndarray
    begin: list[np.ndarray]
    step_ms: list[float]


def drift(scope: Scope) -> tuple[Section, dict[str, Game]]:
    """One game a policy, whose beginnings are the shorter games → the section, and the generated games."""
    size, fps = scope.size, scope.player.world.fps
    length = max(2 * EVERY, scope.frames(size.segment))
    total = min(max(1, scope.most // length), _segments(scope, size.minutes[-1])) * length
    session = Session(scope.player)
    games, true = {}, {}
    for number, name in enumerate(POLICIES):
        state = _start(scope, number)
        policy = make_policy(name, session.action_space, scope.seed + number)
        actions = [policy({}, session.action_space) for _ in range(total)]
        session.reset(scope.seed + number, state.frames, state.actions)
        with tqdm(actions, desc=f"drift {name}", unit="frame", disable=None) as bar:
            games[name] = _play(scope, state, (session.step(a) for a in bar), total, length, session)
        if scope.truth is not None and len(state.script):
            with tqdm(actions, desc=f"drift {name}: true", unit="frame", disable=None) as bar:
                true[name] = _play(scope, state, scope.truth.play(state, iter(bar)), total, length)
    section = Section("Drift")
    _figures(section, scope, games, true, length)
    _tell(section, scope, games, true, total / fps)
    curves = {name: _columns(game.rows) for name, game in games.items()}
    curves |= {f"{name} true": _columns(game.rows) for name, game in true.items()}
    draw_drift(scope.folder / "drift.png", curves, length / fps)
    section.show("drift.png", "Figures of each segment; dashed: the true world under the same keys")
    save_picture(scope.folder / "drift_strip.png", grid([game.strip for game in games.values()]))
    section.show("drift_strip.png", f"{', '.join(POLICIES)}, from the first frame to the last")
    _film(scope, games[POLICIES[0]], true.get(POLICIES[0]))
    beside = "the true world on the left, generated on the right" if true else "generated"
    section.say(f"[The first minute under the script as a film]({FILM}): {beside}.")
    return section, games


def _start(scope: Scope, number: int) -> State:
    """Where the game of a policy begins: a true state, or, without a script, a held-out clip."""
    if scope.truth is not None:
        states = itertools.islice(scope.truth.states(EPISODES + scope.seed + number), ATTEMPTS)
        found = next((state for state in states if state is not None), None)
        if found is not None:
            return found
    length = scope.history
    frames, actions = scope.clips.choose(scope.clips.places(length), len(POLICIES), length, scope.seed)
    place = number % len(frames)
    return State(0, np.zeros((0, actions.shape[2]), np.float32), frames[place], actions[place].numpy())


def _play(
    scope: Scope,
    state: State,
    frames: Iterator[np.ndarray],
    total: int,
    length: int,
    session: Session | None = None,
) -> Game:
    watch, game = Watch(scope.features, length), Game(state, [], np.empty(0), [], [])
    strip, minute = [], scope.frames(60)
    shown = set(np.linspace(0, total - 1, SHOWN).astype(int).tolist())
    for number, frame in enumerate(frames):
        watch.add(frame)
        if number in shown:
            strip.append(frame)
        if number < minute:
            game.begin.append(frame)
        if session is not None:
            game.step_ms.append(session.step_ms[-1])
    game.rows, game.strip = watch.rows, np.stack(strip)
    return game


def _columns(rows: list[dict[str, float]]) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _segments(scope: Scope, minutes: int) -> int:
    return max(1, round(minutes * scope.size.minute / scope.size.segment))


def _lengths(scope: Scope, rows: list) -> dict[str, int]:
    """Names of the games that were played to their end → segments."""
    each = {f"{m}min": _segments(scope, m) for m in scope.size.minutes}
    return {name: count for name, count in each.items() if 1 < count <= len(rows)}


def _figures(
    section: Section, scope: Scope, games: dict[str, Game], true: dict[str, Game], length: int
) -> None:
    for name, count in _lengths(scope, games[POLICIES[0]].rows).items():
        for policy, game in games.items():
            section.figures[f"drift_{name}_{policy}"] = ratio([game.rows], count)
        for key, some in ((f"drift_{name}", games), (f"drift_{name}_true", true)):
            if some:
                section.figures[key] = ratio([game.rows for game in some.values()], count)
                last = [game.rows[count - 1]["stray"] for game in some.values()]
                section.figures[key.replace("drift", "stray")] = float(np.mean(last))
    section.figures["motion_ratio"] = motion_ratio(scope, games, true, length)
    section.round(3)


def motion_ratio(scope: Scope, games: dict[str, Game], true: dict[str, Game], length: int) -> float:
    """Motion in the games' last minute, in shares of the true world's under the same policies, all its
    minutes; or, where there is none, of held-out recordings.
    """
    last = max(1, scope.frames(scope.size.minute) // length)
    made = np.mean([row["motion"] for name in MOVING for row in games[name].rows[-last:]])
    if true:
        moving = np.mean([row["motion"] for name in MOVING for row in true[name].rows])
    else:
        clips, _ = scope.clips.choose(scope.clips.places(2), 64, 2, scope.seed)
        moving = np.mean([motion(clip) for clip in clips])
    return float(made / max(moving, 1e-9))


def _tell(
    section: Section, scope: Scope, games: dict[str, Game], true: dict[str, Game], seconds: float
) -> None:
    f = section.figures
    section.say(
        f"One game of {seconds:.0f} s a policy, whose beginnings are the shorter games. Drift is the "
        f"Fréchet distance to true frames in the last {scope.size.segment:g} s, in shares of that in the "
        "first, "
        "both as means over policies. A game's views change, which this distance minds, so the true world's "
        "own ratio is beside it, and straying: how far the features of the last segment's frames are from "
        "the nearest true ones (median). What is frozen does not drift: motion in the last minute of "
        f"scripted and random play is {f['motion_ratio']:.0%} of the true."
    )
    lengths = [name for name in (f"{m}min" for m in scope.size.minutes) if f"drift_{name}" in f]
    rows = []
    for name in lengths:
        each = [f[f"drift_{name}_{policy}"] for policy in POLICIES]
        stray = [f.get(f"stray_{name}{whose}", "–") for whose in ("", "_true")]
        rows.append([name, f[f"drift_{name}"], *each, f.get(f"drift_{name}_true", "–"), *stray])
    section.table(["game", "drift", *POLICIES, "true world", "straying", "straying, true"], rows)
    names = list(games[POLICIES[0]].rows[0])
    rows = []
    for policy, game in [*games.items(), *((f"{name}, true", game) for name, game in true.items())]:
        for when, row in (("first", game.rows[0]), ("last", game.rows[-1])):
            rows.append([f"{policy}, {when}", *(row[name] for name in names)])
    section.table(["game, segment", *names], rows)


def _film(scope: Scope, made: Game, true: Game | None) -> None:
    """The first minute, generated, and where there is a true world it on the left."""
    beside = [made.begin] if true is None else [true.begin, made.begin]
    height, width = made.begin[0].shape[:2]
    film = Film(scope.folder / FILM, height, width * len(beside), scope.player.world.fps)
    for pictures in zip(*beside, strict=True):
        film.add(np.concatenate(pictures, 1))
    film.close()
