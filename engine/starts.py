"""Where a generated game starts: shipped clips, recordings and pictures; a few true frames with their keys.

A shipped start is an ordinary recording of a few frames in `starts/<world>/<name>/` beside the checkpoint.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .config import UserError, WorldConfig
from .picture import load_picture
from .policies import make_policy
from .recording import HEADER, Recorder, Recording
from .worlds import make_world
from .worlds.base import ActionSpace

FRAMES = 16  # in a shipped start: more than any shipped model remembers
SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "starts"


@dataclass(frozen=True)
class Start:
    """True frames, uint8 (t, h, w, 3), and the actions that caused them (t, k); the game follows the last."""

    name: str
    frames: np.ndarray
    actions: np.ndarray


def find_starts(world: str, checkpoint: str | Path) -> list[Path]:
    """The shipped starts of a world, sorted: those beside the checkpoint, else those of this clone."""
    for folder in (Path(checkpoint).parent / "starts", SHIPPED):
        found = sorted(path.parent for path in (folder / world).glob(f"*/{HEADER}"))
        if found:
            return found
    return []


def load_start(choice: str, space: ActionSpace, shipped: list[Path], frames: int) -> Start:
    """A shipped start's name, a recording `DIR` or `DIR:FRAME`, or a picture → at most `frames` frames.

    Raises UserError where the choice is none of these, is damaged, or holds keys that `space` lacks.
    """
    named = {path.name: path for path in shipped}
    if choice in named:
        recording = Recording(named[choice])
        return _cut(recording, len(recording) - 1, space, frames, choice)
    directory, last = split_choice(choice)
    if (directory / HEADER).is_file():
        recording = Recording(directory)
        if last is None:
            last = min(frames, recording.episodes()[0][1] if len(recording) else 1) - 1
        return _cut(recording, last, space, frames, choice)
    if directory.is_file():
        picture = load_picture(choice)
        return Start(choice, picture[None], np.zeros((1, len(space)), np.float32))
    known = f"its shipped starts are {', '.join(named)}" if named else "no start is shipped for this world"
    raise UserError(f"start={choice} is no recording and no picture, and {known}.")


def split_choice(choice: str) -> tuple[Path, int | None]:
    """`DIR:FRAME` → (DIR, FRAME); without a frame (choice, None)."""
    parts = re.fullmatch(r"(.+):(\d+)", choice)
    return (Path(parts[1]), int(parts[2])) if parts else (Path(choice), None)


def true_start(world: WorldConfig, seed: int, frames: int) -> Start:
    """Where no start is shipped: the true game's first moments; UserError where it cannot be played."""
    try:
        game = make_world(world)
    except UserError as error:
        raise UserError(f"No start is shipped for {world.name}; give start=RECORDING. ({error})") from None
    try:
        policy = make_policy("scripted", game.action_space, seed)
        seen, held = [game.reset(seed)], [np.zeros(len(game.action_space), np.float32)]
        while len(seen) < frames and not game.done:
            held.append(policy(game.state(), game.action_space))
            seen.append(game.step(held[-1]))
    finally:
        game.close()
    return Start("true game", np.stack(seen), np.stack(held))


def cut_start(recording: Recording, frame: int, directory: str | Path, frames: int = FRAMES) -> Path:
    """Ships a start: a recording's `frames` frames up to number `frame`, stored exactly → `directory`.

    A start that lies there already is replaced.
    """
    fields = WorldConfig.__dataclass_fields__
    world = WorldConfig(**{key: value for key, value in recording.header["config"].items() if key in fields})
    space = ActionSpace(recording.names, tuple(tuple(codes) for codes in world.keys.values()))
    start = _cut(recording, frame, space, frames, str(recording.directory))
    directory = Path(directory)
    if (directory / HEADER).is_file():
        shutil.rmtree(directory)
    header = recording.header
    with Recorder(
        directory, world, header["source"], header["seed"], header["checkpoint"], True, recording.names
    ) as recorder:
        for number, (picture, action) in enumerate(zip(start.frames, start.actions, strict=True)):
            recorder.add(picture, action, reset=number == 0, t_ns=round(number / world.fps * 1e9))
    return directory


def known_actions(recording: Recording, start: int, stop: int, space: ActionSpace) -> np.ndarray:
    """Frames' actions in the key order of `space` (n, k); UserError for a held key that `space` lacks."""
    actions = recording.actions[start:stop]
    known = np.zeros((len(actions), len(space)), np.float32)
    for column, name in enumerate(recording.names):
        if name in space.names:
            known[:, space.names.index(name)] = actions[:, column]
        elif actions[:, column].any():
            there = ", ".join(space.names)
            raise UserError(f"{recording.directory} holds the key {name}, but this game knows only {there}.")
    return known


def _cut(recording: Recording, last: int, space: ActionSpace, frames: int, name: str) -> Start:
    if not 0 <= last < len(recording):
        raise UserError(
            f"{recording.directory} has {len(recording)} frames; there is no frame {last} to start at."
        )
    episode = max(start for start, _ in recording.episodes() if start <= last)
    first = max(episode, last - frames + 1)
    actions = known_actions(recording, first, last + 1, space)
    return Start(name, recording.frames(first, last + 1), actions)


def described(world: WorldConfig, space: ActionSpace) -> WorldConfig:
    """The world's config with the keys that it really has; a Gymnasium world chooses them itself."""
    return replace(world, keys=dict(zip(space.names, map(list, space.bindings), strict=True)))
