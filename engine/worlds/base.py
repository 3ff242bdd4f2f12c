"""What a true game looks like to the engine: `World` and its `ActionSpace`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class ActionSpace:
    """The keys of a game: names in action order and, for each, the scancodes that press it.

    Scancodes are SDL's names of physical keys ("W", "Left", "Space", "Left Ctrl"), so that other keyboard
    layouts work.
    """

    names: tuple[str, ...]
    bindings: tuple[tuple[str, ...], ...]
    mouse: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def encode(self, held: Iterable[str]) -> np.ndarray:
        """Names of held keys → multi-hot float32 (k,). Raises KeyError with the unknown name."""
        action = np.zeros(len(self.names), np.float32)
        for name in held:
            if name not in self.names:
                raise KeyError(f"action {name!r} is not among {', '.join(self.names)}")
            action[self.names.index(name)] = 1
        return action

    def decode(self, action: np.ndarray) -> tuple[str, ...]:
        """Multi-hot (k,) → names of held keys."""
        return tuple(name for name, held in zip(self.names, action, strict=True) if held > 0.5)


class World(Protocol):
    """A true game; `Session` has the same verbs. `step(action)` returns the frame that this action caused."""

    action_space: ActionSpace
    fps: float
    done: bool  # the episode ended with the last frame; reset before the next step

    def reset(self, seed: int) -> np.ndarray:
        """Starts an episode → first frame, uint8 (h, w, 3)."""
        ...

    def step(self, action: np.ndarray) -> np.ndarray:
        """Holds the keys `action` (k,) for one frame → frame, uint8 (h, w, 3)."""
        ...

    def state(self) -> dict[str, float]:
        """True state where the simulator tells it: x, y, angle (degrees), health, ammo."""
        ...

    def close(self) -> None: ...
