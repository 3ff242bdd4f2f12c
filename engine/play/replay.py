"""Replay: a recording's keys, played again as a policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..config import UserError, WorldConfig
from ..data.about_world import check_keys_mean_the_same
from ..data.recording import Recording
from ..data.starts import known_actions
from ..worlds.base import ActionSpace


class Replay:
    """A policy that holds what a recording held, frame by frame, and starts games where it did.

    The same checkpoint on the same machine then draws the same frames again.
    """

    def __init__(self, directory: str | Path) -> None:
        """Raises UserError where there is no recording, or none with a frame to replay."""
        self._recording = Recording(directory)
        if len(self._recording) < 2:
            raise UserError(
                f"{directory} holds {len(self._recording)} whole frames; there is nothing to replay."
            )
        self._actions = self._recording.actions
        self._at = 0  # number of the frame that was shown last

    def fit(self, space: ActionSpace, world: WorldConfig) -> None:
        """Puts the keys in the order of the game `world`. Raises UserError for a held key that it does not
        know, and where its keys do something else.
        """
        check_keys_mean_the_same(self._recording.header, world, str(self._recording.directory))
        self._actions = known_actions(self._recording, 0, len(self._recording), space)

    @property
    def left(self) -> int:
        """How many frames are still to come."""
        return len(self._recording) - 1 - self._at

    def first(self) -> dict:
        """The seed and the start of the recorded game, as far as it tells them."""
        return {"seed": self._recording.header["seed"], **self._began(0)}

    def reset_next(self) -> dict | None:
        """What the recorded game was reset to for its next frame, or None; that frame then counts as seen."""
        if not self._recording.resets[self._at + 1]:
            return None
        self._at += 1
        return self._began(self._at)

    def __call__(self, state: dict[str, float], space: ActionSpace) -> np.ndarray:
        """The keys held for the next frame, multi-hot (k,)."""
        self._at += 1
        return self._actions[self._at]

    def _began(self, frame: int) -> dict:
        events = self._recording.events[frame]
        return next((event["reset"] for event in events if isinstance(event, dict) and "reset" in event), {})
