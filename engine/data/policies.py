"""Small seeded policies that play by themselves, for collection, smoke runs and evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from ..bounds import short_seed
from ..config import POLICIES, UserError
from ..worlds.base import ActionSpace
from .explorer import Bursts, Explorer

Policy = Callable[[dict[str, float], ActionSpace], np.ndarray]

OPPOSITES = (("forward", "backward"), ("strafe_left", "strafe_right"), ("turn_left", "turn_right"))
OPPOSITES += (("left", "right"), ("up", "down"))
SHARES = {
    "explore": 0.44,
    "scripted": 0.12,
    "random": 0.13,
    "taps": 0.06,
    "spin": 0.07,
    "walls": 0.08,
    "idle": 0.10,
}
STRETCH_SECONDS = {
    "idle": (2.0, 6.0),
    "explore": (10.0, 30.0),
}  # standing still teaches little after some seconds
DEFAULT_STRETCH_SECONDS = (5.0, 15.0)
WALK = (30, 80)  # frames of walking after which Scripted turns about, in worlds without state
NO_MAP = np.zeros((0, 4))


def make_policy(name: str, action_space: ActionSpace, seed: int, lines: np.ndarray = NO_MAP) -> Policy:
    """The policy called `name`, deterministic by `seed`. Raises UserError for an unknown name.

    `lines` (m, 4) are the walls of the world's map, if it has one; without, `explore` plays as `scripted`.
    """
    seed = short_seed(seed)
    classes = {
        "scripted": Scripted,
        "random": Random,
        "idle": Idle,
        "spin": Spin,
        "walls": Walls,
        "taps": Taps,
    }
    if name == "explore":
        usable = Explorer.usable(action_space, lines)
        return Explorer(action_space, seed, lines) if usable else Scripted(action_space, seed)
    if name not in classes:
        known = ", ".join(known for known in POLICIES if known != "keyboard")
        raise UserError(f"There is no policy {name!r} that plays alone; choose one of {known}.")
    return classes[name](action_space, seed)


class Held(ABC):
    """A policy that holds a combination of keys for some frames, then chooses the next with `choose`."""

    def __init__(self, action_space: ActionSpace, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.names = action_space.names
        self.held: tuple[str, ...] = ()
        self.left = 0
        self.position: tuple[float, float] | None = None
        self.stuck = 0  # frames in which a walking key moved nothing

    def __call__(self, state: dict[str, float], action_space: ActionSpace) -> np.ndarray:
        """True state of the last frame (may be empty) → keys for the next one, multi-hot (k,)."""
        self._feel(state)
        if self.left <= 0:
            self.held, self.left = self.choose()
        self.left -= 1
        return action_space.encode(name for name in self.held if name in action_space.names)

    @abstractmethod
    def choose(self) -> tuple[tuple[str, ...], int]:
        """The next keys to hold and for how many frames."""

    def _feel(self, state: dict[str, float]) -> None:
        position = (state["x"], state["y"]) if "x" in state and "y" in state else None
        walking = "forward" in self.held or "backward" in self.held
        if position and self.position and walking:
            moved = abs(position[0] - self.position[0]) + abs(position[1] - self.position[1])
            self.stuck = self.stuck + 1 if moved < 2.0 else 0  # free walking covers about 10 units a frame
        else:
            self.stuck = 0
        self.position = position

    def some(self, *names: str) -> str:
        """A random one of these keys that this world has; '' if it has none of them."""
        there = [name for name in names if name in self.names]
        return str(self.rng.choice(there)) if there else ""

    def frames(self, low: int, high: int) -> int:
        """A random number of frames, low … high."""
        return int(self.rng.integers(low, high + 1))


class Random(Held):
    """Random combinations of keys, each held for 4 to 20 frames, never opposite ones together. When stuck at
    a wall for a while it steps away.
    """

    def __call__(self, state: dict[str, float], action_space: ActionSpace) -> np.ndarray:
        if self.stuck >= 8:  # long enough to see what pushing does
            self.left = 0
        return super().__call__(state, action_space)

    def choose(self) -> tuple[tuple[str, ...], int]:
        if self.stuck >= 8:
            held = (
                self.some("backward", "strafe_left", "strafe_right"),
                self.some("turn_left", "turn_right"),
            )
            return held, self.frames(8, 24)
        count = min(int(self.rng.choice(4, p=[0.08, 0.42, 0.36, 0.14])), len(self.names))
        held: list[str] = []
        for name in self.rng.permutation(self.names)[:count]:
            if not any({name, other} == set(pair) for other in held for pair in OPPOSITES):
                held.append(str(name))
        return tuple(held), self.frames(4, 20)


class Idle(Held):
    """Holds no key."""

    def choose(self) -> tuple[tuple[str, ...], int]:
        return (), 1


class Taps(Held):
    """Short taps of one key, rarely of two, with pauses between them."""

    def choose(self) -> tuple[tuple[str, ...], int]:
        if self.held or not self.names:
            return (), self.frames(2, 12)
        held = [str(name) for name in self.rng.permutation(self.names)[: 1 + (self.rng.random() < 0.2)]]
        return tuple(held[:1] if any(set(held) == set(pair) for pair in OPPOSITES) else held), self.frames(
            1, 3
        )


class Spin(Held):
    """Turns in one direction for long, reverses at random, and rests now and then."""

    def choose(self) -> tuple[tuple[str, ...], int]:
        if self.rng.random() < 0.15:
            return (), self.frames(3, 12)
        turn = self.some("turn_left", "turn_right", "left", "right") or self.some(*self.names)
        return (turn,), self.frames(15, 90)


class Walls(Held):
    """Runs straight until a wall stops it, then slides along it, keeps pushing, or backs off and turns.

    In worlds without state, where walls are not known, it does the latter now and then.
    """

    def choose(self) -> tuple[tuple[str, ...], int]:
        if not self.stuck and (self.position or self.rng.random() < 0.6):
            return (self.some("forward", "up") or self.some(*self.names),), self.frames(8, 30)
        kind = self.rng.random()
        if kind < 0.45:
            return ("forward", self.some("strafe_left", "strafe_right")), self.frames(8, 30)
        if kind < 0.65:
            return ("forward",), self.frames(5, 20)
        if kind < 0.85:
            return ("forward", self.some("turn_left", "turn_right")), self.frames(8, 25)
        return ("backward", self.some("turn_left", "turn_right")), self.frames(8, 25)


class Scripted(Held):
    """Plays somewhat like a person: long walks, turns, some strafes, bursts of fire, rarely stuck.

    In worlds without state, where it cannot know that it is stuck, it turns about after some seconds of
    walking.
    """

    def __init__(self, action_space: ActionSpace, seed: int) -> None:
        super().__init__(action_space, seed)
        self.generic = Random(action_space, seed) if "turn_left" not in self.names else None
        self.bursts = Bursts(action_space, self.rng)
        self.walk_left = self.frames(*WALK)  # without state: frames of walking until it turns about

    def __call__(self, state: dict[str, float], action_space: ActionSpace) -> np.ndarray:
        if self.generic:  # it does not know what the keys do
            return self.generic(state, action_space)
        if self.position is None and "forward" in self.held:
            self.walk_left -= 1
        if self.stuck >= 4 or self.walk_left <= 0:
            self.left = 0
        return self.bursts(super().__call__(state, action_space))

    def choose(self) -> tuple[tuple[str, ...], int]:
        turn = self.some("turn_left", "turn_right")
        if "forward" not in self.names:  # a fixed place: sweep and rest
            return ((turn,), self.frames(3, 25)) if self.rng.random() < 0.7 else ((), self.frames(2, 10))
        if self.walk_left <= 0:
            self.walk_left = self.frames(*WALK)
            return (turn,), self.frames(16, 30)  # 100 to 200 degrees
        if self.stuck >= 4:
            if self.rng.random() < 0.6:  # a view full of wall teaches little: most often step back, turn away
                return ("backward", turn), self.frames(12, 28)
            return (turn,), self.frames(10, 24)  # 60–145 degrees at two tics a frame
        kind = self.rng.random()
        if kind < 0.42:
            return ("forward",), self.frames(10, 45)
        if kind < 0.66:
            return ("forward", turn), self.frames(3, 14)
        if kind < 0.80:
            return (turn,), self.frames(2, 12)
        if kind < 0.88:
            return ("forward", self.some("strafe_left", "strafe_right")), self.frames(5, 20)
        if kind < 0.94:
            return (self.some("strafe_left", "strafe_right"),), self.frames(4, 14)
        if kind < 0.97:
            return ("backward",), self.frames(4, 14)
        return (), self.frames(4, 14)


class PolicyMixture:
    """Switches between the policies of SHARES every few seconds, so that each gets its share of play time."""

    def __init__(self, action_space: ActionSpace, seed: int, fps: float, lines: np.ndarray = NO_MAP) -> None:
        """`lines` (m, 4) are the walls of the world's map, if it has one."""
        self.rng = np.random.default_rng(seed)
        self.fps = fps
        self.name = ""
        self._left = 0
        # a policy with short stretches must be drawn more often to get its share of the time
        weights = {name: share / sum(_stretch(name)) for name, share in SHARES.items()}
        self._chances = [weight / sum(weights.values()) for weight in weights.values()]
        self._policies = {
            name: make_policy(name, action_space, int(self.rng.integers(2**31)), lines) for name in SHARES
        }

    def __call__(self, state: dict[str, float], action_space: ActionSpace) -> np.ndarray:
        """True state of the last frame (may be empty) → keys for the next one, multi-hot (k,)."""
        if self._left <= 0:
            self.name = str(self.rng.choice(list(SHARES), p=self._chances))
            self._left = max(round(self.rng.uniform(*_stretch(self.name)) * self.fps), 1)
        self._left -= 1
        return self._policies[self.name](state, action_space)


def _stretch(name: str) -> tuple[float, float]:
    return STRETCH_SECONDS.get(name, DEFAULT_STRETCH_SECONDS)
