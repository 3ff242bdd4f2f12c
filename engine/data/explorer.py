"""Explorer: a policy that walks to far places, looks about, turns and comes back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..worlds.base import ActionSpace
from .floor import Floor
from .sight import free_distances

Keys = tuple[str, ...]

NEEDED = {"forward", "turn_left", "turn_right"}
DIRECTIONS = 32  # in which it measures the free distance before it chooses one
SHOULDER = 24.0  # map units that must be free on both sides of its way; a player's radius is 16
SPARE = 90.0  # map units before a wall at which most walks end, so that the view shows more than the wall
AIM = 6.0  # degrees off its way from which it turns; one frame of turning is 7
ARRIVED = 30.0  # map units
JUMP = 64.0  # map units: a longer step within a frame is a new episode, or a teleport


class Explorer:
    """A policy that knows the map's walls and its own place (see `usable`). Deterministic by seed.

    After each walk it draws what to do: the next walk, the same way back, a look to both sides, standing
    still, steps aside, or a slide along a wall.
    """

    def __init__(self, action_space: ActionSpace, seed: int, lines: np.ndarray) -> None:
        """`lines` (m, 4) are the walls of the map: x1, y1, x2, y2."""
        self.rng = np.random.default_rng(seed)
        self.names, self.lines = action_space.names, lines
        self.floor = Floor(lines)
        self.bursts = Bursts(action_space, self.rng)
        self.place = np.zeros(3)  # x, y, angle
        self.moved = 0.0  # map units in the last frame
        self.plan: Iterator[Keys] | None = None

    @staticmethod
    def usable(action_space: ActionSpace, lines: np.ndarray) -> bool:
        """Whether the world has a map, and keys to walk and to turn."""
        return len(lines) > 0 and set(action_space.names) >= NEEDED

    def __call__(self, state: dict[str, float], action_space: ActionSpace) -> np.ndarray:
        """The last frame's state, with x, y and angle → keys for the next frame, multi-hot (k,). Missing
        numbers count as unchanged, so that it takes itself for stuck and goes another way.
        """
        known = zip(("x", "y", "angle"), self.place, strict=True)
        place = np.array([state.get(name, last) for name, last in known])
        self.moved = float(np.hypot(*(place - self.place)[:2]))
        self.place = place
        if self.plan is None or self.moved > JUMP:
            self.plan = self._explore()
        keys = next(self.plan)
        return self.bursts(action_space.encode(name for name in keys if name in self.names))

    def _explore(self) -> Iterator[Keys]:
        while True:
            begin = self.place[:2]
            if self.rng.random() < 0.4:
                yield from self._follow(self.floor.route(begin, self.rng))
            else:
                yield from self._into_the_open()
            yield from self._after(begin)

    def _follow(self, route: np.ndarray) -> Iterator[Keys]:
        """Walks along a route (n, 2), always straight to the farthest of its places that can be reached
        so.
        """
        at = 0
        while at < len(route) - 1:
            ahead = range(len(route) - 1, at, -4)  # every fourth is near enough
            at = next((i for i in ahead if self.floor.clear(self.place[:2], route[i])), at + 1)
            way = route[at] - self.place[:2]
            yield from self._turn_to(float(np.rad2deg(np.arctan2(way[1], way[0]))))
            yield from self._walk_to(route[at], near=16.0 if at < len(route) - 1 else ARRIVED)
            if np.hypot(*(route[at] - self.place[:2])) > 2 * ARRIVED:  # something stopped it
                return

    def _into_the_open(self) -> Iterator[Keys]:
        """Turns to a direction in which it can see far, and walks there, mostly not up to the wall."""
        begin = self.place[:2]
        angle, free = self._way()
        yield from self._turn_to(angle)
        spare = min(SPARE, 0.3 * free) if self.rng.random() < 0.7 else 20.0
        far = (free - spare) * self.rng.uniform(0.5, 1.0)
        if far > ARRIVED:
            gaze = np.deg2rad(angle)
            yield from self._walk_to(begin + far * np.array([np.cos(gaze), np.sin(gaze)]))

    def _way(self) -> tuple[float, float]:
        """→ a random direction in degrees, and the free map units in it; far ones are likelier."""
        angles = self.rng.uniform(0, 360) + np.arange(DIRECTIONS) * (360 / DIRECTIONS)
        sideways = np.deg2rad(angles + 90)
        shoulders = np.stack([np.cos(sideways), np.sin(sideways)], 1)  # (n, 2)
        free = np.stack(
            [
                free_distances(self.lines, self.place[:2] + side * SHOULDER * shoulders, angles)
                for side in (-1, 0, 1)
            ]
        ).min(axis=0)
        free = np.minimum(free, 2000.0)
        weights = np.maximum(free - SHOULDER, 1.0) ** 2
        chosen = self.rng.choice(DIRECTIONS, p=weights / weights.sum())
        return float(angles[chosen]), float(free[chosen])

    def _off(self, angle: float) -> float:
        """Degrees from the heading to `angle`, positive to the left, in [-180, 180)."""
        return (angle - self.place[2] + 180) % 360 - 180

    def _turn_to(self, angle: float) -> Iterator[Keys]:
        walk = ("forward",) if self.rng.random() < 0.3 else ()  # some turn while they walk
        for _ in range(60):
            off = self._off(angle)
            if abs(off) < AIM:
                return
            yield ("turn_left" if off > 0 else "turn_right", *(walk if abs(off) < 70 else ()))

    def _walk_to(self, target: np.ndarray, key: str = "forward", near: float = ARRIVED) -> Iterator[Keys]:
        """Walks to `target`, backwards if `key` is "backward", until it is `near` (map units), stuck or past
        it.
        """
        stuck, aside, sway = 0, "", self.rng.random() < 0.25
        turned = 0.0 if key == "forward" else 180.0
        for count in range(240):
            way = target - self.place[:2]
            if np.hypot(*way) < near or stuck > 5:
                return
            off = self._off(np.rad2deg(np.arctan2(way[1], way[0])) + turned)
            if abs(off) > 100 and count > 3:  # it has gone past
                return
            if sway and self.rng.random() < 0.1:
                aside = "" if aside else str(self.rng.choice(["strafe_left", "strafe_right"]))
            turn = "turn_left" if off > 0 else "turn_right"
            yield tuple(filter(None, (key, aside, turn if abs(off) > AIM else "")))
            stuck = stuck + 1 if self.moved < 2.0 and count > 2 else 0

    def _after(self, begin: np.ndarray) -> Iterator[Keys]:
        """What it does after a walk that began at `begin` (2,)."""
        kind = self.rng.random()
        if kind < 0.40:
            return
        if kind < 0.55:  # the same way back, face first or backwards
            if "backward" in self.names and self.rng.random() < 0.3:
                yield from self._walk_to(begin, "backward")
            else:
                way = begin - self.place[:2]
                yield from self._turn_to(float(np.rad2deg(np.arctan2(way[1], way[0]))))
                yield from self._walk_to(begin)
        elif kind < 0.70:
            yield from self._look_about()
        elif kind < 0.78:
            yield from self._hold((), 5, 25)
        elif kind < 0.90:
            yield from self._aside()
        else:
            yield from self._slide()

    def _look_about(self) -> Iterator[Keys]:
        """Turns one way and, after a moment, the same way back, or all around."""
        one, other = self.rng.permutation(["turn_left", "turn_right"])
        count = int(self.rng.integers(8, 30))
        yield from self._hold((str(one),), count, count)
        yield from self._hold((), 0, 8)
        back = self.rng.random() < 0.7
        yield from self._hold((str(other if back else one),), count, count if back else 2 * count)

    def _aside(self) -> Iterator[Keys]:
        """A few steps aside or back, and mostly as many to where it was."""
        pairs = [("strafe_left", "strafe_right"), ("strafe_right", "strafe_left"), ("backward", "forward")]
        there, back = pairs[int(self.rng.integers(3))]
        count = int(self.rng.integers(3, 20))
        yield from self._hold((there,), count, count)
        yield from self._hold((), 0, 4)
        if self.rng.random() < 0.7:
            yield from self._hold((back,), count, count)

    def _slide(self) -> Iterator[Keys]:
        """Runs to the next wall, slides along it at an angle, then turns away."""
        for _ in range(60):
            yield ("forward",)
            if self.moved < 6.0:
                break
        turn = str(self.rng.choice(["turn_left", "turn_right"]))
        yield from self._hold(("forward", turn), 5, 9)
        yield from self._hold(("forward",), 8, 30)
        yield from self._hold((turn,), 6, 16)

    def _hold(self, keys: Keys, low: int, high: int) -> Iterator[Keys]:
        for _ in range(int(self.rng.integers(low, high + 1))):
            yield keys


class Bursts:
    """Adds the fire key for a few frames now and then, where the world has one."""

    def __init__(self, action_space: ActionSpace, rng: np.random.Generator) -> None:
        self.rng = rng
        self.key = action_space.names.index("attack") if "attack" in action_space.names else None
        self.left = 0

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """Sets or clears the fire key of the action (k,), in place → the action."""
        if self.key is not None:
            if self.left <= -1 and self.rng.random() < 0.03:
                self.left = int(self.rng.integers(3, 15))
            action[self.key] = self.left > 0
            self.left = max(self.left - 1, -1)
        return action
