"""Endurance: minutes of play from several places, with sharpness and motion at both ends."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from ..picture import grid, save_picture
from ..policies import make_policy
from ..session import Session
from .measures import motion, sharpness
from .section import Scope, Section

POLICIES = ("idle", "random", "spin")


def endurance(scope: Scope) -> Section:
    """A minute each of standing still, random keys and turning, from several places: strips, and sharpness
    (share of the true frames' mean) and motion (grey levels) in the first and the last five seconds; and, as
    what stands still might be stuck, motion in a second of turning after the minute idle.
    """
    clips, size, length = scope.clips, scope.size, scope.history
    frames, part = min(scope.most, scope.frames(size.minute)), max(2, scope.frames(size.segment))
    starts, actions = clips.choose(clips.places(length), size.places, length, scope.seed)
    true = sharpness(clips.sample(256, scope.seed))
    session = Session(scope.player)
    parts: dict[str, list[float]] = {}
    rows = []
    with tqdm(
        total=len(POLICIES) * len(starts) * frames, desc="endurance", unit="frame", disable=None
    ) as progress:
        for name in POLICIES:
            for place in range(len(starts)):
                policy = make_policy(name, session.action_space, scope.seed + place)
                session.reset(scope.seed + place, starts[place], actions[place].numpy())
                movie = _play(session, policy, frames, progress)
                for when, piece in (("first", movie[:part]), ("last", movie[-part:])):
                    parts.setdefault(f"{name}_sharpness_{when}", []).append(sharpness(piece) / true)
                    parts.setdefault(f"{name}_motion_{when}", []).append(motion(piece))
                rows.append(movie[:: max(1, frames // 12)][:13])
                if name == "idle":
                    turn = make_policy("spin", session.action_space, scope.seed + place)
                    woken = _play(session, turn, scope.frames(1))
                    parts.setdefault("idle_motion_woken", []).append(motion(woken))
    section = Section("Endurance", {what: float(np.mean(values)) for what, values in parts.items()})
    section.round()
    _tell(section, frames / scope.player.world.fps, len(starts))
    save_picture(scope.folder / "endurance.png", grid(rows))
    section.show("endurance.png", "From the first frame to the last: idle, random keys, turning")
    return section


def _play(session: Session, policy, frames: int, progress: tqdm | None = None) -> np.ndarray:
    seen = []
    for _ in range(frames):
        seen.append(session.step(policy({}, session.action_space)))
        if progress is not None:
            progress.update()
    return np.stack(seen)


def _tell(section: Section, seconds: float, places: int) -> None:
    f = section.figures
    section.say(
        f"{seconds:.0f} s from {places} places; sharpness in shares of the true frames' mean, motion in grey "
        f"levels a frame. After standing still, a second of turning moves by {f['idle_motion_woken']:.3g}."
    )
    columns = [f"{what}_{when}" for what in ("sharpness", "motion") for when in ("first", "last")]
    section.table(
        ["policy", *(name.replace("_", ", ") + " 5 s" for name in columns)],
        [[name, *(f[f"{name}_{column}"] for column in columns)] for name in POLICIES],
    )
