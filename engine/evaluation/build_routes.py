"""Makes a file of routes for a world: python -m engine.evaluation.build_routes world=NAME seed=0 out=FILE

Routes are drawn at random; those that in the true world do what their kind says are kept.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..config import TrainConfig, UserError, load_config
from ..data.policies import OPPOSITES, make_policy
from ..data.sight import free_distances, wall_views
from ..errors import run_program
from ..worlds import make_world
from .measures import psnr
from .route import RETURN, Route, save_routes
from .truth import Truth

FRAMES = 64  # of a route
WARMUPS = (24, 36, 48, 60)  # frames that the scripted policy plays before a route, by turns
REST = 20  # frames without keys until the player stands still
KINDS = {"open": 20, "turn": 20, "wall": 20, "random": 18, "scripted": 18}  # routes
RETURNS = {5: 8, 10: 6, 20: 4}  # seconds of a loop → how many routes
# map units before a wall at which a walk of a loop ends: after touching it, a loop does not close
CLEAR = 130.0
# PSNR in dB of the true view at the return against that at the start, at least: medkits may differ
ALIKE = 28.0
AWAY = 24.0  # the same halfway, at most
OPEN_SHARE = 0.9  # share of views that no wall fills, in a walk in the open
WALKED, STOPPED = 3.0, 0.5  # map units a frame from which one walks, and below which one stands
TRIALS = 50  # most draws for each route
FIRST = 500_000  # seed of the first episode, far from those of collections and evaluations


class Builder:
    """Draws routes in a true world."""

    def __init__(self, truth: Truth, lines: np.ndarray, fps: float, seed: int):
        self.truth, self.lines, self.fps, self.space = truth, lines, fps, truth.space
        self.rng = np.random.default_rng(seed)
        self.episodes = count(FIRST + 10_000 * seed)

    def build(self, kinds: dict[str, int], returns: dict[int, int]) -> Iterator[Route]:
        """Routes of all kinds for which this world has keys: as many as wanted, or fewer if not found."""
        for kind, wanted in kinds.items():
            yield from self._gather(kind, wanted, getattr(self, kind), 0)
        for seconds, wanted in returns.items():
            frames = round(seconds * self.fps)
            yield from self._gather(f"{RETURN}{seconds}", wanted, lambda n=frames: self.loop(n), REST)

    def _gather(
        self, kind: str, wanted: int, draw: Callable[[], np.ndarray | None], rest: int
    ) -> Iterator[Route]:
        found, keep, short = 0, self.keeps(kind), 0
        with tqdm(total=wanted, desc=kind, disable=None) as bar:
            for trial in range(TRIALS * wanted):
                if found == wanted or short == trial == TRIALS:
                    return  # enough routes, or no episode is long enough
                seed = next(self.episodes)
                warmup = self.warm_up(seed, WARMUPS[trial % len(WARMUPS)], rest)
                actions = draw()
                if actions is None:
                    return
                seen = self.truth.follow(seed, np.concatenate([warmup, actions]))
                short += seen is None
                if seen is None or not keep(seen[0][len(warmup) :], seen[1][len(warmup) :]):
                    continue
                last = seen[1][-1]
                end = tuple(last[name] for name in ("x", "y", "angle") if name in last)
                found += 1
                bar.update()
                yield Route(kind, seed, warmup, actions, end)

    def warm_up(self, seed: int, frames: int, rest: int) -> np.ndarray:
        """Plays the scripted policy in an episode's first frames, then `rest` frames without keys → these
        actions (n, k). The world stays where they lead.
        """
        policy, world, held = make_policy("scripted", self.space, seed), self.truth.world, []
        world.reset(seed)
        while len(held) < frames + rest and not world.done:
            idle = len(held) >= frames
            held.append(self.space.encode(()) if idle else policy(world.state(), self.space))
            world.step(held[-1])
        return np.stack(held)

    def keeps(self, kind: str) -> Callable[[np.ndarray, list[dict]], bool]:
        """A test whether frames and states of a route are as its kind says."""
        if kind.startswith(RETURN):
            return lambda frames, told: _came_back(frames)
        rules = {"open": self._is_open, "wall": self._reaches_wall}
        return rules.get(kind, lambda frames, told: True)

    def _is_open(self, frames: np.ndarray, told: list[dict]) -> bool:
        views, steps = wall_views(told, self.lines), _steps(told)
        walks = steps is None or (steps[6:] > WALKED).mean() > OPEN_SHARE
        return walks and (views is None or 1 - views.mean() >= OPEN_SHARE)

    def _reaches_wall(self, frames: np.ndarray, told: list[dict]) -> bool:
        """Whether the view is open at first, a wall fills it by half of the time, and the player then
        stands.
        """
        views, steps = wall_views(told, self.lines), _steps(told)
        if views is None or steps is None:
            return True
        near = np.flatnonzero(views)
        return not views[:8].any() and len(near) > 8 and near[0] < 48 and (steps[-8:] < STOPPED).all()

    def _walk(self, names: tuple[str, ...], most: int, backward: bool) -> int:
        """Holds keys in the true world for at most so many frames, until a wall is near → how many frames."""
        world = self.truth.world
        for length in range(1, most + 1):
            if not world.done:
                world.step(self.space.encode(names))
            told = world.state()
            if "turn" not in names[0] and {"x", "y", "angle"} <= told.keys():
                way, here = told["angle"] + 180 * backward, np.array([[told["x"], told["y"]]])
                if free_distances(self.lines, here, np.array([way]))[0] < CLEAR:
                    return length
        return most

    def held(self, frames: int, *names: str) -> np.ndarray:
        return np.repeat(self.space.encode(names)[None], frames, 0)

    def pair(self) -> tuple[str, str] | None:
        """The two keys that turn, in random order; None without them."""
        for pair in (("turn_left", "turn_right"), ("left", "right")):
            if set(pair) <= set(self.space.names):
                return pair if self.rng.random() < 0.5 else pair[::-1]
        return None

    def ahead(self) -> str | None:
        return next((name for name in ("forward", "up") if name in self.space.names), None)

    def frames(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def open(self) -> np.ndarray | None:
        """Walks, with turns on the way."""
        ahead = self.ahead()
        if not ahead:
            return None
        parts, total = [], 0
        while total < FRAMES:
            turn = self.pair()
            parts.append(self.held(self.frames(8, 24), ahead))
            parts += [self.held(self.frames(3, 14), ahead, turn[0])] if turn else []
            total = sum(map(len, parts))
        return np.concatenate(parts)[:FRAMES]

    def turn(self) -> np.ndarray | None:
        """Turns one way and back, several times, standing or walking."""
        parts, total = [], 0
        ahead = [self.ahead()] if self.ahead() and self.rng.random() < 0.3 else []
        while total < FRAMES:
            pair, length = self.pair(), self.frames(5, 20)
            if pair is None:
                return None
            parts += [self.held(length, name, *ahead) for name in pair]
            total = sum(map(len, parts))
        return np.concatenate(parts)[:FRAMES]

    def wall(self) -> np.ndarray | None:
        """Walks straight on, perhaps after a turn, and pushes on."""
        ahead, turn = self.ahead(), self.pair()
        if not ahead:
            return None
        first = self.held(self.frames(1, 8), turn[0]) if turn and self.rng.random() < 0.5 else None
        straight = self.held(FRAMES, ahead)
        return (straight if first is None else np.concatenate([first, straight]))[:FRAMES]

    def random(self) -> np.ndarray:
        policy = make_policy("random", self.space, int(self.rng.integers(2**31)))
        return np.stack([policy({}, self.space) for _ in range(FRAMES)])

    def scripted(self) -> np.ndarray:
        """Keys of the scripted policy when it knows no state."""
        policy = make_policy("scripted", self.space, int(self.rng.integers(2**31)))
        return np.stack([policy({}, self.space) for _ in range(FRAMES)])

    def loop(self, frames: int) -> np.ndarray | None:
        """Keys that lead away, then the opposite keys in reverse order, which lead back, and a rest.

        Speeds rise and fall alike on both ways, so that the player comes back exactly if it touches nothing.
        """
        ahead, opposite = self.ahead(), {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}
        if not ahead or self.pair() is None:
            return None
        both = opposite[ahead] in self.space.names  # otherwise only turns can be undone
        parts, total, half = [], 0, (frames - REST - 1) // 2
        while total < half:
            walk = (ahead,) if self.rng.random() < 0.9 else (opposite[ahead],)
            for names, most in (((self.pair()[0],), self.frames(3, 16)), (walk, self.frames(8, 28))):
                names = names if both else (self.pair()[0],)
                length = self._walk(names, min(most, half - total), backward=names == (opposite[ahead],))
                parts, total = [*parts, (names, length)], total + length
        back = [(tuple(opposite[name] for name in names), length) for names, length in reversed(parts)]
        # with a pause, as two turns would be one, and a turn begins slowly
        keys = [self.held(length, *names) for names, length in (*parts, ((), 1), *back) if length]
        return np.concatenate([*keys, self.held(frames - 2 * half - 1)])


def _steps(told: list[dict]) -> np.ndarray | None:
    """Map units walked in each frame (n - 1,); None without positions."""
    if not all({"x", "y"} <= one.keys() for one in told):
        return None
    return np.hypot(*np.diff([(one["x"], one["y"]) for one in told], axis=0).T)


def _came_back(frames: np.ndarray) -> bool:
    """Whether a view is left and then seen again."""
    middle = len(frames) // 2
    away, back = (psnr(frames[:1], frames[at : at + 1]) for at in (middle, len(frames) - 1))
    return back >= ALIKE and away < AWAY


def build_routes(config: TrainConfig) -> dict:
    """Writes the routes of `config.world` to the file `config.out` → figures."""
    path = Path(config.out)
    if path.suffix != ".json":
        raise UserError(f"out={path} must be the .json file that the routes are written to.")
    if path.exists() and not config.again:
        raise UserError(f"{path} is there already; choose another out=FILE, or again=true to replace it.")
    world = make_world(config.world)
    try:
        builder = Builder(Truth(world, 1), world.map_lines(), world.fps, config.seed)
        routes = list(builder.build(KINDS, RETURNS))
    finally:
        world.close()
    command = f"python -m engine.evaluation.build_routes world={config.world.name} seed={config.seed}"
    save_routes(path, config.world.name, world.action_space.names, routes, command)
    kinds = {route.kind: 0 for route in routes}
    return {"routes": len(routes)} | {kind: sum(r.kind == kind for r in routes) for kind in kinds}


def main(arguments: list[str]) -> int:
    """The program → its exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a simulator is closed, too
    print(json.dumps(build_routes(load_config("train", TrainConfig, arguments))))
    return 0


if __name__ == "__main__":
    sys.exit(run_program("build_routes", lambda: main(sys.argv[1:])))
