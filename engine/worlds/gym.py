"""Any Gymnasium environment that renders RGB as a `World`; its actions become keys."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..config import UserError, WorldConfig
from .base import ActionSpace, short_seed
from .frames import Pixels, fit
from .gym_keys import bindings_of, moves_of

FPS = 20.0  # of an environment that does not tell its own
FASTEST = 10_000  # what recordings take


class GymWorld:
    """One Gymnasium environment; `step` advances it by `config.tics` of its steps.

    Whatever the environment itself raises, in any method, comes as a UserError that names it.
    """

    def __init__(self, config: WorldConfig) -> None:
        """Makes the environment. Raises UserError if it is missing, draws no RGB or fits no keys."""
        try:
            import gymnasium
        except ImportError:
            raise UserError("The world needs Gymnasium; install it with: pip install -e .[gym]") from None
        if not config.id:
            raise UserError("A gym world needs the id of its environment, such as world.id=CartPole-v1.")
        self.config = config
        self.state_kinds: dict[str, str] = {}
        self.done = True
        self._frames = 0
        self._frame: np.ndarray | None = None
        self._pixels = Pixels(config.id)
        self._failed = False
        with self._named("cannot be made"):
            self._env = gymnasium.make(config.id, render_mode="rgb_array", disable_env_checker=True)
        try:
            self.reset(0)  # what it draws is seen before anything is recorded
            with self._named("does not tell its actions"):
                self._moves = moves_of(self._env)
            self.fps = config.fps or _fps(self._env.metadata) / config.tics
            self.action_space = _action_space(config, self._moves.names)
        except BaseException:
            self._failed = True
            self.close()
            raise
        self.done = True

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """An environment may raise anything, also what ends a program."""
        try:
            yield
        except UserError:
            self._failed = True
            raise
        except (Exception, SystemExit) as error:
            self._failed = True
            said = ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            raise UserError(f"The environment {self.config.id!r} {what}: {said} ({where}).") from error

    def reset(self, seed: int) -> np.ndarray:
        """Starts an episode → first frame, uint8 (h, w, 3)."""
        with self._named("failed in reset"):
            self._env.reset(seed=short_seed(seed))
        self.done = False
        self._frames = 0
        return self._draw()

    def step(self, action: np.ndarray) -> np.ndarray:
        """Holds the keys `action` (k,) for one frame → frame, uint8 (h, w, 3); the last again where nothing
        is drawn of an episode's end.
        """
        if self.done:
            raise RuntimeError("the episode is over; reset the world before the next step")
        with self._named("failed in step"):
            move = self._moves.move(np.asarray(action) > 0.5)
            for _ in range(self.config.tics):
                _, _, terminated, truncated, _ = self._env.step(move)
                self.done = bool(terminated or truncated)
                if self.done:
                    break
        self._frames += 1
        frame = self._draw()
        self.done = self.done or self._frames >= self.config.episode_frames
        return frame

    def _draw(self) -> np.ndarray:
        with self._named("failed in render"):
            picture = self._env.render()
            if picture is not None or not self.done:
                self._frame = fit(self._pixels(picture), self.config.height, self.config.width)
        return self._frame

    def state(self) -> dict[str, float]:
        """Empty: environments have no common words for their state."""
        return {}

    def map_lines(self) -> np.ndarray:
        """Empty (0, 4): no map is known."""
        return np.zeros((0, 4))

    def close(self) -> None:
        """Ends the environment; one that has failed already is not asked whether it does so well."""
        with suppress(Exception, SystemExit) if self._failed else self._named("failed in close"):
            self._env.close()


def _fps(metadata: Any) -> float:
    """The rate at which an environment's steps are real time."""
    try:
        told = float(metadata["render_fps"])
    except (KeyError, TypeError, ValueError):
        return FPS
    return told if 0 < told <= FASTEST else FPS


def _action_space(config: WorldConfig, names: list[str]) -> ActionSpace:
    """Keys given by the environment's own names change only these; given by other names they are all."""
    given = {name: tuple(codes) for name, codes in config.keys.items()}
    if given.keys() <= set(names):
        return ActionSpace(tuple(names), tuple(bindings_of(names, given)))
    if len(given) != len(names):
        said = f"some of {', '.join(names)}, or as many of other names, in this order"
        raise UserError(f"The world.keys of {config.id!r} must be {said}; given are {', '.join(given)}.")
    return ActionSpace(tuple(given), tuple(given.values()))
