"""Clips: held-out recordings as a source of true frames and the actions that caused them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..config import UserError
from ..data.recording import Recording
from ..data.starts import known_actions
from ..rollout.player import Player
from ..worlds.base import ActionSpace

RUN, EVERY = 32, 4  # a sample takes every fourth of so many consecutive frames


class Clips:
    """Held-out recordings as a source of true clips: frames, and the actions that caused them."""

    def __init__(self, recordings: list[Recording], player: Player):
        self.recordings = recordings
        keys = player.world.keys
        self.space = ActionSpace(tuple(keys), tuple(map(tuple, keys.values())))
        for recording in recordings:
            if not set(recording.names) <= set(player.world.keys):
                raise UserError(
                    f"{recording.directory} has other keys than {player.checkpoint.path} was trained on."
                )

    def places(self, length: int) -> list[tuple[int, int]]:
        """All (recording, first frame) of clips of `length` frames within one episode."""
        runs = ((i, a, b) for i, r in enumerate(self.recordings) for a, b in r.episodes())
        return [(i, start) for i, a, b in runs for start in range(a, b - length + 1)]

    def choose(
        self, places: list[tuple[int, int]], count: int, length: int, seed: int
    ) -> tuple[np.ndarray, Tensor, list[list[dict | None]]]:
        """`count` random places → frames uint8 (b, length, h, w, 3), actions (b, length, k), and recorded
        states, lists (b)(length).
        """
        if not places:
            raise UserError(
                f"No held-out episode has the {length} frames needed; collect more (stage=collect)."
            )
        picked = np.random.default_rng(seed).permutation(len(places))[:count]
        chosen = [places[i] for i in sorted(picked)]
        frames = np.stack([self.recordings[i].frames(start, start + length) for i, start in chosen])
        actions = np.stack(
            [known_actions(self.recordings[i], start, start + length, self.space) for i, start in chosen]
        )
        told = [self.recordings[i].states[start : start + length] for i, start in chosen]
        return frames, torch.from_numpy(actions), told

    def sample(self, count: int, seed: int) -> np.ndarray:
        """About `count` true frames, uint8 (n, h, w, 3), from short runs, since each run costs a search in
        the video.
        """
        places = self.places(RUN) or self.places(1)
        length = RUN if self.places(RUN) else 1
        frames, _, _ = self.choose(places, -(-count * EVERY // length), length, seed)
        return frames[:, ::EVERY].reshape(-1, *frames.shape[2:])[:count]
