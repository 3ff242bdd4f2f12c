"""Where a generated game starts: shipped clips, recordings and pictures; a few true frames with their keys.

Shipped starts lie inside the checkpoint, encoded already.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import UserError, WorldConfig
from ..worlds import make_world
from ..worlds.base import ActionSpace
from .picture import load_picture
from .policies import make_policy
from .recording import HEADER, Recording

STEPS = (
    16  # of a shipped latent, kept in 8 bits, in one of its units: finer than the noise it is trained with
)


@dataclass(frozen=True)
class Start:
    """True frames, uint8 (t, h, w, 3), the actions that caused them (t, k), and what the world told of itself
    at each, None where that is not known; the game follows the last.
    """

    name: str
    frames: np.ndarray | None  # None where they are encoded already
    actions: np.ndarray
    states: list[dict[str, float] | None] | None = None
    latents: Any = None  # then these (t, c, y, x)


def packed_starts(extras: dict[str, Any], state_names: Sequence[str]) -> dict[str, Start]:
    """The starts that a checkpoint holds as tensors (packing.py), by name. Raises UserError for one that is
    damaged.
    """
    names = sorted({key.split(".")[1] for key in extras if key.startswith("starts.")})
    starts = {}
    for name in names:
        part = {key: extras.get(f"starts.{name}.{key}") for key in ("latents", "actions", "states")}
        sizes = [() if tensor is None else tuple(tensor.shape) for tensor in part.values()]
        if list(map(len, sizes)) != [4, 2, 2] or {size[0] for size in sizes} != {sizes[0][0] or 1}:
            raise UserError(f"The start {name!r} inside the checkpoint is damaged; pack it again.")
        if sizes[2][1] != len(state_names):
            raise UserError(f"The start {name!r} tells another state than its network knows; pack it again.")
        states = [dict(zip(state_names, row, strict=True)) for row in part["states"].tolist()]
        latents, actions = part["latents"].float() / STEPS, part["actions"].float().numpy()
        starts[name] = Start(name, None, actions, states or None, latents)
    return starts


def load_start(
    choice: str, space: ActionSpace, shipped: dict[str, Start], frames: int, world: str = ""
) -> Start:
    """A shipped start's name, a recording `DIR` or `DIR:FRAME`, or a picture → at most `frames` frames. What
    a recording of another world than `world` tells of its state is not taken: it is of another map.

    Raises UserError where the choice is none of these, is damaged, or holds keys that `space` lacks.
    """
    if choice in shipped:
        return shipped[choice]
    directory, last = split_choice(choice)
    if (directory / HEADER).is_file():
        recording = Recording(directory)
        if last is None:
            last = min(frames, recording.episodes()[0][1] if len(recording) else 1) - 1
        start = cut_start(recording, last, space, frames, choice)
        return start if recording.header["world"] in ("", world) else replace(start, states=None)
    if directory.is_file():
        picture = load_picture(choice)
        return Start(choice, picture[None], np.zeros((1, len(space)), np.float32))
    known = (
        f"its shipped starts are {', '.join(shipped)}" if shipped else "no start is shipped for this world"
    )
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
        states = [game.state()]
        while len(seen) < frames and not game.done:
            held.append(policy(game.state(), game.action_space))
            seen.append(game.step(held[-1]))
            states.append(game.state())
    finally:
        game.close()
    return Start("true game", np.stack(seen), np.stack(held), states)


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


def cut_start(recording: Recording, last: int, space: ActionSpace, frames: int, name: str) -> Start:
    """At most `frames` frames of a recording up to number `last`, all of one episode."""
    if not 0 <= last < len(recording):
        raise UserError(
            f"{recording.directory} has {len(recording)} frames; there is no frame {last} to start at."
        )
    episode = max(start for start, _ in recording.episodes() if start <= last)
    first = max(episode, last - frames + 1)
    actions = known_actions(recording, first, last + 1, space)
    return Start(name, recording.frames(first, last + 1), actions, recording.states[first : last + 1])


def described(world: WorldConfig, space: ActionSpace) -> WorldConfig:
    """The world's config with the keys that it really has; a Gymnasium world chooses them itself."""
    return replace(world, keys=dict(zip(space.names, map(list, space.bindings), strict=True)))
