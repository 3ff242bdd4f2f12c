"""Truth: states of the true world, to which it can be brought back, and what becomes of each under any keys.

A simulator is not wound back: it is reset with the same seed and given the same actions again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from ..config import UserError, WorldConfig
from ..data.policies import make_policy
from ..worlds import World, make_world
from .generated import Games

SCRIPT = "scripted"  # the policy that leads to the states
SHORTEST, LONGER, KINDS = 30, 17, 6  # frames that it plays: 30, 47, ... 115, and again
SAMPLED = (
    "scripted",
    "random",
    "spin",
    "walls",
)  # the policies that sample the world, an episode each by turns
EPISODE, APART = 192, 6  # frames of such an episode at most, and between those that are kept
ATTEMPTS = 8  # states that are tried for each that is wanted, as episodes end


@dataclass(frozen=True)
class State:
    """A moment of the true world: how to get there, and the last frames before it as a game's start."""

    seed: int
    script: np.ndarray  # actions since the reset (n, k)
    frames: np.ndarray  # uint8 (t, h, w, 3)
    actions: np.ndarray  # that caused these frames (t, k)
    told: list[dict[str, float]] = field(default_factory=list)  # of these frames: x, y, angle ...


@dataclass(frozen=True)
class Counterfactuals:
    """What became of a state under several action lists (n, t, k): true frames, uint8 (n, t, h, w, 3)."""

    state: State
    actions: np.ndarray
    frames: np.ndarray


class Truth:
    """The true world as an oracle. `history`: frames that a generated game starts from."""

    def __init__(self, world: World, history: int):
        self.world, self.history = world, history
        self.space = world.action_space
        self._known: dict[tuple, tuple[np.ndarray, list[dict[str, float]]]] = {}

    @classmethod
    def open(cls, config: WorldConfig, history: int, seed: int) -> Truth:
        """Starts the simulator. Raises UserError where it is missing or does not repeat itself."""
        truth = cls(make_world(config), history)
        try:
            state = next(truth.states(seed))
            if state is not None:
                truth.run(state, np.zeros((2, len(truth.space)), np.float32))
        except BaseException:  # stopped by hand, too
            truth.close()
            raise
        return truth

    def state(self, seed: int, length: int) -> State | None:
        """The state that the script of this seed leads to after `length` actions; None where the episode ends
        before.
        """
        policy = make_policy(SCRIPT, self.space, seed)
        frames, actions = [self.world.reset(seed)], [np.zeros(len(self.space), np.float32)]
        told = [self.world.state()]
        while len(actions) <= length:
            if self.world.done:
                return None
            actions.append(policy(told[-1], self.space))
            frames.append(self.world.step(actions[-1]))
            told.append(self.world.state())
        last = slice(-self.history, None)
        return State(seed, np.stack(actions[1:]), np.stack(frames[last]), np.stack(actions[last]), told[last])

    def follow(self, seed: int, actions: np.ndarray) -> tuple[np.ndarray, list[dict[str, float]]] | None:
        """An episode from its first frame under actions (n, k) → n + 1 frames and the states at these; None
        where it ends before.
        """
        frames, told = [self.world.reset(seed)], [self.world.state()]
        for action in actions:
            if self.world.done:
                return None
            frames.append(self.world.step(action))
            told.append(self.world.state())
        return (np.stack(frames), told) if not self.world.done else None

    def states(self, seed: int) -> Iterator[State | None]:
        """States without end, each from another episode; which, says the seed alone. Of an episode that ends
        early an earlier one; None where it ends at once.
        """
        for number in itertools.count(1000 * seed):
            state = self.state(number, SHORTEST + LONGER * (number % KINDS))
            yield state or self.state(number, self.history)

    def run(self, state: State, actions: np.ndarray) -> tuple[np.ndarray, list[dict[str, float]]]:
        """From the state under actions (t, k) → frames uint8 (t, h, w, 3) and true states at these; fewer
        where the episode ends. What was run before is remembered.
        """
        actions = np.asarray(actions, np.float32)
        key = (state.seed, len(state.script), actions.tobytes())
        if key not in self._known:
            self._return_to(state)
            frames, states = [], []
            for action in actions:
                if self.world.done:
                    break
                frames.append(self.world.step(action))
                states.append(self.world.state())
            shape = (0, *state.frames.shape[1:])
            self._known[key] = (np.stack(frames) if frames else np.zeros(shape, np.uint8), states)
        return self._known[key]

    def branch(self, state: State, actions: np.ndarray) -> Counterfactuals | None:
        """The state under each of the action lists (n, t, k); None where an episode ends too early."""
        made = [self.run(state, one)[0] for one in actions]
        if any(len(frames) < actions.shape[1] for frames in made):
            return None
        return Counterfactuals(state, np.asarray(actions, np.float32), np.stack(made))

    def gather(
        self, count: int, seed: int, plan: Callable[[int, State], np.ndarray | None], name: str
    ) -> list[Counterfactuals]:
        """`count` states and their branches under what `plan(number, state)` says (n, t, k); states whose
        episode ends too early, or for which there is no plan, are passed over. Fewer where none are found.
        """
        found: list[Counterfactuals] = []
        with tqdm(total=count, desc=f"{name}: true", unit="state", disable=None) as progress:
            for tried, state in enumerate(self.states(seed)):
                if len(found) == count or tried == ATTEMPTS * count:
                    break
                actions = None if state is None else plan(len(found), state)
                branches = None if actions is None else self.branch(state, actions)
                if branches is not None:
                    found.append(branches)
                    progress.update()
        return found

    def play(self, state: State, actions: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """From the state under actions → frames; a new episode begins where one ends."""
        self._return_to(state)
        episode = state.seed
        for action in actions:
            if self.world.done:
                episode += 1
                self.world.reset(episode)
            yield self.world.step(action)

    def sample(self, count: int, seed: int) -> tuple[np.ndarray, list[dict[str, float]]]:
        """So many true frames, uint8 (n, h, w, 3), of many episodes in the order they were played, and the
        states at these.
        """
        frames, told = [], []
        with tqdm(total=count, desc="true frames", unit="frame", disable=None) as bar:
            for number in itertools.count(1000 * seed):
                policy = make_policy(SAMPLED[number % len(SAMPLED)], self.space, number)
                self.world.reset(number)
                for step in range(EPISODE):
                    if self.world.done:
                        break
                    frame = self.world.step(policy(self.world.state(), self.space))
                    if step % APART == APART - 1:
                        frames.append(frame)
                        told.append(self.world.state())
                        bar.update()
                    if len(frames) == count:
                        return np.stack(frames), told

    def _return_to(self, state: State) -> None:
        frame = self.world.reset(state.seed)
        for action in state.script:
            frame = self.world.step(action)
        if not np.array_equal(frame, state.frames[-1]):
            raise UserError("The world does not repeat itself under the same seed and keys.")

    def close(self) -> None:
        """Ends the simulator."""
        self.world.close()


def starts(found: list[Counterfactuals], seed: int) -> Games:
    """All branches side by side as the network's games; those of one state have the same noise."""
    frames = np.concatenate([np.repeat(one.state.frames[None], len(one.actions), 0) for one in found])
    before = np.concatenate([np.repeat(one.state.actions[None], len(one.actions), 0) for one in found])
    after = np.concatenate([one.actions for one in found])
    numbers = np.concatenate([np.full(len(one.actions), seed + i) for i, one in enumerate(found)])
    told = [one.state.told for one in found for _ in one.actions]
    actions = torch.from_numpy(np.concatenate([before, after], 1))
    return Games(frames, actions, torch.from_numpy(numbers), told)
