"""Plays games in the generated world, many side by side, from true starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..device import autocast
from ..rollout.player import Player

BATCH = 32  # games played at once


@dataclass(frozen=True)
class Games:
    """Games to be played side by side, each from its own true frames."""

    frames: np.ndarray  # the true frames they start from, uint8 (b, t, h, w, 3)
    actions: Tensor  # (b, t + t', k): those that caused these frames, then those to play
    seeds: Tensor  # (b,) int64, of the noise
    # (b)(t): true states of the start's frames, None where unknown
    told: list[list[dict[str, float] | None]] | None = None

    def __len__(self) -> int:
        return len(self.frames)

    def part(self, some: slice) -> Games:
        told = None if self.told is None else self.told[some]
        return Games(self.frames[some], self.actions[some], self.seeds[some], told)


def roll(player: Player, games: Games, name: str = "roll", correction: float | None = None) -> np.ndarray:
    """Plays all games to their ends → the generated frames, uint8 (b, t', h, w, 3); see Rollout for
    `correction`.
    """
    total = len(games) * (games.actions.shape[1] - games.frames.shape[1])
    made = []
    with tqdm(total=total, desc=name, unit="frame", disable=None) as progress:
        for at in range(0, len(games), BATCH):
            seen = []
            for pictures in play(player, games.part(slice(at, at + BATCH)), correction):
                seen.append(pictures)
                progress.update(len(pictures))
            made.append(np.stack(seen, 1))
    return np.concatenate(made)


def play(player: Player, games: Games, correction: float | None = None) -> Iterator[np.ndarray]:
    """Plays games → yields the next frame of all, uint8 (b, h, w, 3). Each game is the same as if played
    alone.
    """
    rollout = player.make_rollout(len(games), correction=correction)
    latents = _encoded(player, games.frames)
    actions, start = games.actions.to(player.device), games.frames.shape[1]
    states = None
    if player.states is not None:
        told = games.told or [None] * len(games)
        states = torch.cat([player.laid_states(one, start) for one in told])
        states = player.known_states(latents, actions[:, :start], states)
    with torch.inference_mode(), autocast(player.device, player.dtype, cache=False):
        rollout.reset(latents, actions[:, :start], games.seeds.to(player.device), states)
    for action in actions[:, start:].unbind(1):
        # entered for each frame: they must not stay in force while this generator waits
        with torch.inference_mode(), autocast(player.device, player.dtype, cache=False):
            latents = rollout.step(action)
        yield player.decode(latents)


def _encoded(player: Player, frames: np.ndarray) -> Tensor:
    """Frames (b, t, h, w, 3) → latents (b, t, c, y, x); consecutive games with the same frames are encoded
    once.
    """
    each: list[Tensor] = []
    for number, clip in enumerate(frames):
        same = number and np.array_equal(clip, frames[number - 1])
        each.append(each[-1] if same else player.encode(clip))
    return torch.cat(each)


def rebuilt(player: Player, frames: np.ndarray) -> np.ndarray:
    """True frames, uint8 (n, h, w, 3), encoded and decoded: the best that a network with this autoencoder can
    show.
    """
    parts = [frames[at : at + BATCH] for at in range(0, len(frames), BATCH)]
    return np.concatenate([player.decode(player.encode(part)[0]) for part in parts])
