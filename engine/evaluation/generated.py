"""The generated world: true histories go on inside the network, many side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..autoencoder import to_bytes
from ..denoiser import Denoiser
from ..device import autocast
from ..session import Player

BATCH = 32  # games that are played at once


def roll(
    player: Player, frames: np.ndarray, actions: Tensor, seed: int | Tensor, name: str = "roll"
) -> np.ndarray:
    """Plays `actions` (b, t, k) from the first true frames (b, t, h, w, 3) → the generated rest, uint8. With
    one `seed` game i gets seed + i; counterfactuals that are to have the same noise give seeds (b,).
    """
    seeds = seed if isinstance(seed, Tensor) else torch.arange(len(frames)) + seed
    start = player.denoiser.config.sink + player.denoiser.config.recent
    total = len(frames) * (actions.shape[1] - start)
    made = []
    with tqdm(total=total, desc=name, unit="frame", disable=None) as progress:
        for at in range(0, len(frames), BATCH):
            part = slice(at, at + BATCH)
            seen = []
            for pictures in play(player, frames[part, :start], actions[part], seeds[part]):
                seen.append(pictures)
                progress.update(len(pictures))
            made.append(np.stack(seen, 1))
    return np.concatenate(made)


def play(player: Player, frames: np.ndarray, actions: Tensor, seeds: Tensor) -> Iterator[np.ndarray]:
    """Plays games with seeds (b,) on from their first true frames (b, t, h, w, 3) under actions (b, t', k),
    whose first t caused these → the next frame of each at a time, uint8 (b, h, w, 3). A game comes out as if
    it were played alone.
    """
    rollout = player.make_rollout(len(frames))
    latents = torch.cat([player.encode(clip) for clip in frames])
    actions, start = actions.to(player.device), frames.shape[1]
    with torch.inference_mode(), autocast(player.device, player.dtype, cache=False):
        rollout.reset(latents, actions[:, :start], seeds.to(player.device))
    for action in actions[:, start:].unbind(1):
        # entered anew for each frame: neither may hold for whoever takes it
        with torch.inference_mode(), autocast(player.device, player.dtype, cache=False):
            rollout.step(action)
            pictures = to_bytes(rollout.picture).permute(0, 2, 3, 1).cpu().numpy()
        yield pictures


@torch.inference_mode()
def moved(player: Player, frames: np.ndarray, actions: Tensor) -> np.ndarray:
    """First guesses at what follows true frames (b, t, h, w, 3) under the actions (b, t + 1, k), uint8: the
    last frame moved, and nothing drawn.
    """
    denoiser = player.denoiser
    latents = torch.cat([player.encode(clip[-2:]) for clip in frames])
    actions = actions.to(player.device)[:, -denoiser.config.momentum - 1 :]
    with autocast(player.device, player.dtype):
        guess = denoiser.motion(latents, actions[:, :-1], actions[:, -1:]).mean[:, 0]
    return player.decode(guess)


@contextmanager
def played_with(denoiser: Denoiser, commit_position: int, correction: float) -> Iterator[None]:
    """Rollouts made inside bind actions at another commit position and correct otherwise than the checkpoint
    says.
    """
    own = denoiser.config
    denoiser.config = replace(own, commit_position=commit_position, correction=correction)
    try:
        yield
    finally:
        denoiser.config = own
