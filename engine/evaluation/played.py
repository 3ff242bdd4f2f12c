"""Played: routes in the true world, what a generated game starts from and what it should show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from ..config import UserError
from .clips import Clips
from .generated import Games
from .route import Route
from .truth import Truth

ELSEWHERE = 1.0  # map units or degrees: tolerance of the place where a route ends


@dataclass(frozen=True)
class Played:
    """Routes of one length: the last true frames before each, its keys, and its true frames and states."""

    kinds: list[str]  # (b)
    before: np.ndarray  # uint8 (b, t, h, w, 3)
    actions: np.ndarray  # (b, t + t', k), beginning with those of the frames before
    true: np.ndarray  # uint8 (b, t', h, w, 3)
    told_before: list[list[dict[str, float] | None]]  # (b)(t)
    told: list[list[dict[str, float] | None]]  # (b)(t')

    def games(self, seed: int) -> Games:
        """The routes as generated games; game i has the noise of seed + i."""
        seeds = torch.arange(len(self.before)) + seed
        return Games(self.before, torch.from_numpy(self.actions), seeds, self.told_before)

    def cut(self, most: int) -> Played:
        """The first `most` frames of the routes."""
        actions, told = self.actions[:, : self.before.shape[1] + most], [one[:most] for one in self.told]
        return Played(self.kinds, self.before, actions, self.true[:, :most], self.told_before, told)


def play_routes(truth: Truth, routes: list[Route], name: str = "routes") -> Played:
    """Plays routes of one length in the true world. Raises UserError where a route ends elsewhere than when
    it was made.
    """
    history, columns = truth.history, ([], [], [], [], [])
    for route in tqdm(routes, desc=f"{name}: true", unit="route", disable=None):
        script = np.concatenate([route.warmup, route.actions])
        seen = truth.follow(route.seed, script)
        if seen is None or _apart(route, seen[1][-1]) > ELSEWHERE:
            raise UserError(
                f"The {route.kind} route of seed {route.seed} does not lead here where it led when it was "
                "made: this simulator plays otherwise; make routes anew with python -m "
                "engine.evaluation.build_routes."
            )
        frames, told = seen
        actions = np.concatenate([np.zeros((1, script.shape[1]), np.float32), script])
        at = len(route.warmup) + 1  # no action caused the first frame
        first = at - history
        if first < 0:
            raise UserError(
                f"A route of seed {route.seed} needs a warm-up of {history} frames, the network's past."
            )
        for column, value in zip(
            columns, (frames[first:at], actions[first:], frames[at:], told[first:at], told[at:]), strict=True
        ):
            column.append(value)
    before, actions, true, told_before, told = columns
    kinds = [route.kind for route in routes]
    return Played(kinds, np.stack(before), np.stack(actions), np.stack(true), told_before, told)


def _apart(route: Route, told: dict[str, float]) -> float:
    here = [told[name] for name in ("x", "y", "angle") if name in told]
    gaps = np.abs(np.subtract(here, route.end)) if len(here) == len(route.end) else np.zeros(1)
    return float(np.minimum(gaps, np.abs(gaps - 360)).max(initial=0))


def recorded(clips: Clips, count: int, history: int, length: int, seed: int) -> Played:
    """Random clips of recordings as routes, for use without a simulator."""
    frames, actions, told = clips.choose(clips.places(history + length), count, history + length, seed)
    kinds, (before, after) = ["recorded"] * len(frames), (slice(history), slice(history, None))
    told_before, told = ([one[part] for one in told] for part in (before, after))
    return Played(kinds, frames[:, before], actions.numpy(), frames[:, after], told_before, told)
