"""Replay: a recording's keys, played again as a policy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import UserError, WorldConfig
from ..data.about_world import check_keys_mean_the_same
from ..data.recording import Recording
from ..data.starts import known_actions
from ..worlds.base import ActionSpace
from .game import Game

DRAWN = ("id", "scenario", "map", "width", "height", "tics", "episode_frames")  # on which a true game depends


class Beginning(NamedTuple):
    """How a game came to a frame that a recording begins a game with."""

    seed: int | None  # None: not told
    start: str  # "": not told
    # what was held (k,) between the reset and this frame, and for how many frames
    before: Sequence[tuple[np.ndarray, int]] = ()


class Replay:
    """A policy that holds what a recording held, frame by frame, and starts games where it did.

    The same checkpoint, or the same true game, on the same machine then draws the same frames again. In
    another one (a true recording in a dream) games start from the recording's own frames.
    """

    def __init__(self, directory: str | Path) -> None:
        """Raises UserError where there is no recording, or none with a frame to replay."""
        self._recording = Recording(directory)
        if len(self._recording) < 2:
            raise UserError(
                f"{directory} holds {len(self._recording)} whole frames; there is nothing to replay."
            )
        self._actions = self._recording.actions
        self._same = True  # the game is the recorded one
        self._at = 0  # number of the frame that was shown last

    def precision(self, wanted: str) -> str:
        """In which a dream is to be drawn: as it was recorded, where `wanted` leaves that open (auto)."""
        return wanted if wanted != "auto" else self._recording.header["precision"] or wanted

    def fit(self, game: Game) -> None:
        """Puts the keys in the game's order. Raises UserError for a held key that it does not know, and where
        its keys do something else.
        """
        header, self._space = self._recording.header, game.action_space
        check_keys_mean_the_same(header, game.world, str(self._recording.directory))
        self._actions = known_actions(self._recording, 0, len(self._recording), self._space)
        recorded = header["source"], header["checkpoint"]
        self._same = recorded == (game.source, game.digest) and "seed" in self._told(0)
        if self._same and game.source == "true" and (other := _differences(header["config"], game.world)):
            said = f"{self._recording.directory} was recorded with {other}"
            print(f"{said}: what is drawn here is not what was seen there.", file=sys.stderr)

    @property
    def left(self) -> int:
        """How many frames are still to come."""
        return len(self._recording) - 1 - self._at

    def first(self) -> Beginning:
        """How the recorded game began."""
        return self._began(0)

    def reset_next(self) -> Beginning | None:
        """How the recorded game began anew with its next frame, or None; that frame then counts as seen."""
        if not self._recording.resets[self._at + 1]:
            return None
        self._at += 1
        return self._began(self._at)

    def __call__(self, state: dict[str, float], space: ActionSpace) -> np.ndarray:
        """The keys held for the next frame, multi-hot (k,)."""
        self._at += 1
        return self._actions[self._at]

    def go_back(self, frames: int) -> None:
        """The game has been run backwards by so many."""
        self._at = max(0, self._at - frames)

    def _began(self, frame: int) -> Beginning:
        told = self._told(frame)
        seed = told.get("seed", self._recording.header["seed"] if frame == 0 else None)
        if not self._same:
            return Beginning(seed, f"{self._recording.directory}:{frame}")
        try:
            before = [(self._space.encode(names), frames) for names, frames in told.get("held", [])]
        except KeyError as error:
            raise UserError(
                f"{self._recording.directory} cannot be replayed here: {error.args[0]}."
            ) from None
        return Beginning(seed, told.get("start", ""), before)

    def _told(self, frame: int) -> dict[str, Any]:
        """What is recorded of the reset at this frame; nothing, where that was not noted."""
        events = [event for event in self._recording.events[frame] if isinstance(event, dict)]
        return next((event["reset"] for event in events if "reset" in event), {})


def _differences(there: dict[str, Any], world: WorldConfig) -> str:
    """What of a recorded world's config is otherwise than in `world`, as far as it was told."""
    here = asdict(world)
    return ", ".join(f"{name} {there[name]}" for name in DRAWN if there.get(name, here[name]) != here[name])
