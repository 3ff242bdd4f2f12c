"""Where a generated game starts: shipped clips, recordings and pictures; a few true frames with their keys.

Shipped starts lie inside the checkpoint, encoded already.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ModelConfig, UserError, WorldConfig
from ..worlds import make_world
from ..worlds.base import ActionSpace
from ..worlds.frames import fit
from .about_world import check_keys_mean_the_same
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


def packed_starts(extras: dict[str, Any], model: ModelConfig, world: WorldConfig) -> dict[str, Start]:
    """The starts that a checkpoint holds as tensors (packing.py), by name, but for those of other networks:
    of latents, keys or a state of other sizes. Raises UserError for one that is damaged.
    """
    told = model.state.names
    fitting = (*model.autoencoder.latent_shape(world), len(world.keys), len(told))
    names = sorted({key.split(".")[1] for key in extras if key.startswith("starts.")})
    starts = {}
    for name in names:
        part = {key: extras.get(f"starts.{name}.{key}") for key in ("latents", "actions", "states")}
        sizes = [() if tensor is None else tuple(tensor.shape) for tensor in part.values()]
        if list(map(len, sizes)) != [4, 2, 2] or {size[0] for size in sizes} != {sizes[0][0] or 1}:
            raise UserError(f"The start {name!r} inside the checkpoint is damaged; pack it again.")
        if (*sizes[0][1:], sizes[1][1], sizes[2][1]) != fitting:
            continue
        states = [dict(zip(told, row, strict=True)) for row in part["states"].tolist()]
        latents, actions = part["latents"].float() / STEPS, part["actions"].float().numpy()
        starts[name] = Start(name, None, actions, states or None, latents)
    return starts


def load_start(
    choice: str, space: ActionSpace, shipped: dict[str, Start], frames: int, world: WorldConfig
) -> Start:
    """A shipped start's name, a recording `DIR` or `DIR:FRAME`, or a picture → at most `frames` frames. Of a
    picture of another size its middle is taken, which is told.

    Raises UserError where the choice is none of these, is damaged, holds keys that `space` lacks, or is of a
    game whose keys do something else than those of `world`.
    """
    if choice in shipped:
        return shipped[choice]
    directory, last = split_choice(choice)
    if os.path.isfile(directory / HEADER):
        recording = Recording(directory)
        if last is None:
            last = min(frames, recording.episodes()[0][1] if len(recording) else 1) - 1
        return cut_start(recording, last, space, frames, choice, world)
    if os.path.isfile(choice):
        picture = load_picture(choice)
        frame = fit(picture, world.height, world.width, whole=False)
        if picture.shape != frame.shape:
            size = f"{picture.shape[1]}x{picture.shape[0]}"
            said = f"{choice} is of {size}; its middle is fitted to {world.width}x{world.height}."
            print(said, file=sys.stderr)
        return Start(choice, frame[None], np.zeros((1, len(space)), np.float32))
    known = (
        f"its shipped starts are {', '.join(shipped)}" if shipped else "no start is shipped for this world"
    )
    raise UserError(f"start={choice} is no recording and no picture, and {known}.")


def split_choice(choice: str) -> tuple[Path, int | None]:
    """`DIR:FRAME` → (DIR, FRAME); without a frame, or where all of it is a name, (choice, None)."""
    parts = None if os.path.exists(choice) else re.fullmatch(r"(.+):(\d+)", choice)
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


def cut_start(
    recording: Recording,
    last: int,
    space: ActionSpace,
    frames: int,
    name: str,
    world: WorldConfig | None = None,
) -> Start:
    """At most `frames` frames of a recording up to number `last`, all of one episode. What one of another
    game than `world` tells of its state is not taken, and that is said: it is of another map.
    """
    where = recording.directory
    foreign = check_keys_mean_the_same(recording.header, world, str(where)) if world else ""
    if foreign:
        print(f"{where} is of {foreign}: its pictures and keys are taken, its state is not.", file=sys.stderr)
    if not 0 <= last < len(recording):
        raise UserError(f"{where} has {len(recording)} frames; there is no frame {last} to start at.")
    episode = max(start for start, _ in recording.episodes() if start <= last)
    first = max(episode, last - frames + 1)
    actions = known_actions(recording, first, last + 1, space)
    states = None if foreign else recording.states[first : last + 1]
    return Start(name, recording.frames(first, last + 1), actions, states)
