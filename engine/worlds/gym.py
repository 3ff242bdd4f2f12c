"""Any Gymnasium environment that renders RGB as a `World`; its actions become keys."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ..bounds import short_seed
from ..config import UserError, WorldConfig
from .base import ActionSpace

NATURAL = {
    "left": ("Left", "A"),
    "right": ("Right", "D"),
    "up": ("Up", "W"),
    "down": ("Down", "S"),
    "fire": ("Space",),
    "forward": ("Up", "W"),
    "jump": ("Space",),
}
SPARE = [("Left", "A"), ("Right", "D"), ("Down", "S"), ("Up", "W"), ("Space",)]
SPARE += [(key,) for key in "1234567890QERFZXCVTGB"]


class GymWorld:
    """One Gymnasium environment; `step` advances it by `config.tics` of its steps."""

    def __init__(self, config: WorldConfig) -> None:
        """Makes the environment. Raises UserError if it is missing, draws no RGB or fits no keys."""
        try:
            import gymnasium
        except ImportError:
            raise UserError("The world needs Gymnasium; install it with: pip install -e .[gym]") from None
        if not config.id:
            raise UserError("A gym world needs the id of its environment, such as world.id=CartPole-v1.")
        try:
            self._env = gymnasium.make(config.id, render_mode="rgb_array", disable_env_checker=True)
            self._env.reset(seed=0)
            picture = self._env.render()
        except Exception as error:  # an environment may raise anything
            said = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"Gymnasium cannot make and draw {config.id!r}: {said}") from None
        if not (isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.shape[2] == 3):
            raise UserError(f"The environment {config.id!r} does not render RGB (render_mode rgb_array).")
        self.config = config
        self.state_kinds: dict[str, str] = {}
        self.fps = config.fps
        self.done = True
        self._frames = 0
        self._keys = _Keys(self._env)
        self.action_space = _action_space(config, self._keys.names)

    def reset(self, seed: int) -> np.ndarray:
        """Starts an episode → first frame, uint8 (h, w, 3)."""
        self._env.reset(seed=short_seed(seed))
        self.done = False
        self._frames = 0
        return self._frame()

    def step(self, action: np.ndarray) -> np.ndarray:
        """Holds the keys `action` (k,) for one frame → frame, uint8 (h, w, 3)."""
        if self.done:
            raise RuntimeError("the episode is over; reset the world before the next step")
        move = self._keys.move(np.asarray(action) > 0.5)
        for _ in range(self.config.tics):
            _, _, terminated, truncated, _ = self._env.step(move)
            self.done = bool(terminated or truncated)
            if self.done:
                break
        self._frames += 1
        self.done = self.done or self._frames >= self.config.episode_frames
        return self._frame()

    def _frame(self) -> np.ndarray:
        return fit(np.asarray(self._env.render()), self.config.height, self.config.width)

    def state(self) -> dict[str, float]:
        """Empty: environments have no common words for their state."""
        return {}

    def map_lines(self) -> np.ndarray:
        """Empty (0, 4): no map is known."""
        return np.zeros((0, 4))

    def close(self) -> None:
        """Ends the environment."""
        self._env.close()


class _Keys:
    """How held keys become one action of the environment, and what the keys are called."""

    def __init__(self, env: Any) -> None:
        space = env.action_space
        self._space = space
        kind = type(space).__name__
        if kind == "Discrete":
            self._discrete(env)
        elif kind == "MultiBinary":
            self.names = [f"button_{i}" for i in range(int(np.prod(space.shape)))]
            self.move = lambda held: held.reshape(space.shape).astype(space.dtype)
        elif kind == "Box":
            self._box()
        else:
            raise UserError(f"Keys can play Discrete, MultiBinary and Box action spaces, not {kind}.")

    def _discrete(self, env: Any) -> None:
        start, count = int(self._space.start), int(self._space.n)
        meanings = getattr(env.unwrapped, "get_action_meanings", lambda: [])()
        names = [re.sub(r"\W+", "_", str(name).lower()) for name in meanings]
        if len(names) != count or len(set(names)) != count:
            names = [f"action_{i}" for i in range(count)]
        rest = names.index("noop") if "noop" in names else None
        self.names = [name for name in names if name != "noop"]
        self._moves = [start + i for i in range(count) if i != rest]
        self._rest = start + (rest or 0)
        self.move = lambda held: self._moves[int(np.argmax(held))] if held.any() else self._rest

    def _box(self) -> None:
        low, high = (np.nan_to_num(side, posinf=1, neginf=-1) for side in (self._space.low, self._space.high))
        rest = np.clip(np.zeros_like(low), low, high)
        self.names, entries = [], []
        for index in np.ndindex(low.shape):
            for side, value in (("minus", low[index]), ("plus", high[index])):
                if value != rest[index]:  # a pedal, from 0 to 1, has one direction only
                    self.names.append(f"axis_{'_'.join(map(str, index))}_{side}")
                    entries.append((index, value))

        def move(held: np.ndarray) -> np.ndarray:
            action = rest.copy()
            for key in np.flatnonzero(held):
                action[entries[key][0]] = entries[key][1]
            return action

        self.move = move


def _action_space(config: WorldConfig, names: list[str]) -> ActionSpace:
    if config.keys:
        if len(config.keys) != len(names):
            raise UserError(
                f"{config.id!r} needs {len(names)} world.keys, in the order of {', '.join(names)}."
            )
        return ActionSpace(tuple(config.keys), tuple(map(tuple, config.keys.values())))
    taken = {NATURAL[name] for name in names if name in NATURAL}
    spare = iter([keys for keys in SPARE if keys not in taken])
    bindings = [NATURAL[name] if name in NATURAL else next(spare, ()) for name in names]
    return ActionSpace(tuple(names), tuple(bindings))


def fit(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Picture (h, w, 3) → uint8 (height, width, 3): whole, averaged over areas, centred on black.

    Areas have whole-pixel borders: integer arithmetic, the same everywhere. Enlarging repeats pixels.
    """
    scale = min(height / picture.shape[0], width / picture.shape[1])
    rows, columns = (max(round(side * scale), 1) for side in picture.shape[:2])
    total = picture.astype(np.uint32)
    area = np.ones((1, 1, 1), np.uint32)
    for axis, (old, new) in enumerate(((picture.shape[0], rows), (picture.shape[1], columns))):
        borders = np.arange(new) * old // new
        total = np.add.reduceat(total, borders, axis=axis)
        sizes = np.maximum(np.diff(np.append(borders, old)), 1)
        area = area * np.expand_dims(sizes, tuple(i for i in range(3) if i != axis))
    frame = np.zeros((height, width, 3), np.uint8)
    top, left = (height - rows) // 2, (width - columns) // 2
    frame[top : top + rows, left : left + columns] = (total + area // 2) // area
    return frame
