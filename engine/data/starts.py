"""Start: a few true frames with keys and states, from which a generated game starts. They come from the
checkpoint (encoded already), from a recording, a picture, or the true game.
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

# of a shipped latent, kept in 8 bits, in one of its units: finer than the noise it is trained with
STEPS = 16


@dataclass(frozen=True)
class Start:
    """True frames, uint8 (t, h, w, 3), the actions that caused them (t, k) and their states, None where
    unknown. The game goes on after the last frame.
    """

    name: str
    frames: np.ndarray | None  # None if there are latents instead
    actions: np.ndarray
    states: list[dict[str, float] | None] | None = None
    latents: Any = None  # (t, c, y, x)


def packed_starts(extras: dict[str, Any], model: ModelConfig, world: WorldConfig) -> dict[str, Start]:
    """The starts among a checkpoint's tensors (packing.py), by name, without those whose latents, keys or
    state do not fit its networks. Raises UserError for a damaged one.
    """
    state_names = model.state.names
    fitting = (*model.autoencoder.latent_shape(world), len(world.keys), len(state_names))
    names = sorted({key.split(".")[1] for key in extras if key.startswith("starts.")})
    starts = {}
    for name in names:
        part = {key: extras.get(f"starts.{name}.{key}") for key in ("latents", "actions", "states")}
        sizes = [() if tensor is None else tuple(tensor.shape) for tensor in part.values()]
        if list(map(len, sizes)) != [4, 2, 2] or {size[0] for size in sizes} != {sizes[0][0] or 1}:
            raise UserError(f"The start {name!r} inside the checkpoint is damaged; pack it again.")
        if (*sizes[0][1:], sizes[1][1], sizes[2][1]) != fitting:
            continue
        states = [dict(zip(state_names, row, strict=True)) for row in part["states"].tolist()]
        latents, actions = part["latents"].float() / STEPS, part["actions"].float().numpy()
        starts[name] = Start(name, None, actions, states or None, latents)
    return starts


def load_start(
    choice: str, space: ActionSpace, shipped: dict[str, Start], frames: int, world: WorldConfig
) -> Start:
    """The start that `choice` names: a shipped one, a recording (`DIR` or `DIR:FRAME`), or a picture; of a
    recording at most `frames` frames. A picture of another size is cropped and scaled, and that is printed.

    Raises UserError where the choice is none of these, is damaged, has keys that `space` lacks, or is of a
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
    """`DIR:FRAME` → (DIR, FRAME); (choice, None) without a frame, or if a file of the whole name exists."""
    parts = None if os.path.exists(choice) else re.fullmatch(r"(.+):(\d+)", choice)
    return (Path(parts[1]), int(parts[2])) if parts else (Path(choice), None)


def true_start(world: WorldConfig, seed: int, frames: int) -> Start:
    """The first `frames` frames of the true game, played by a policy; UserError where it cannot be played."""
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
    """Actions (n, k) of the frames start … stop - 1, in the key order of `space`; UserError for a held key
    that `space` lacks.
    """
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
    """A start from a recording: at most `frames` frames up to index `last`, all of one episode. If it is of
    another game than `world`, its states are left out, since they are of another map, and that is printed.
    Raises UserError for a frame that is not there, and as load_start does.
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
