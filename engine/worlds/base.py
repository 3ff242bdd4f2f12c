"""What a true game looks like to the engine: `World` and its `ActionSpace`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

# position: a coordinate on a fixed map · angle: degrees, 0 to 360 · velocity: of a position, along the axes
# of the map, in its units per step of the simulator (not per frame) · scalar: anything else
STATE_KINDS = ("position", "angle", "velocity", "scalar")


@dataclass(frozen=True)
class ActionSpace:
    """The keys of a game: names in action order and, for each, the scancodes that press it.

    Scancodes are SDL's names of physical keys ("W", "Left", "Space", "Left Ctrl"), so that other keyboard
    layouts work.
    """

    names: tuple[str, ...]
    bindings: tuple[tuple[str, ...], ...]

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
    state_kinds: dict[str, str]  # what `state` tells → its kind, one of STATE_KINDS; empty: it tells nothing

    def reset(self, seed: int) -> np.ndarray:
        """Starts an episode → first frame, uint8 (h, w, 3)."""
        ...

    def step(self, action: np.ndarray) -> np.ndarray:
        """Holds the keys `action` (k,) for one frame → frame, uint8 (h, w, 3)."""
        ...

    def state(self) -> dict[str, float]:
        """True state at the last frame, with the names of `state_kinds`."""
        ...

    def map_lines(self) -> np.ndarray:
        """The walls of the map, in the units of the positions: (m, 4), x1 y1 x2 y2; (0, 4) without a map."""
        ...

    def close(self) -> None: ...
