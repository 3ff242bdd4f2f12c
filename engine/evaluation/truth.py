"""Truth: the true world as an oracle: what happens from one of its states under any keys.

To return to a state, the simulator is reset with the same seed and given the same actions again.
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

SCRIPT = "scripted"  # the policy that is played up to a state
SHORTEST, LONGER, KINDS = 30, 17, 6  # frames of that: 30, 47, ... 115, and again
SAMPLED = (
    "scripted",
    "random",
    "spin",
    "walls",
)  # policies for `sample`, by turns an episode each
EPISODE, APART = 192, 6  # most frames of such an episode, and frames between those that are kept
ATTEMPTS = 8  # states that are tried for each wanted one, as an episode may end too early


@dataclass(frozen=True)
class State:
    """A state of the true world: how to get there, and its last frames, from which a game can start."""

    seed: int
    script: np.ndarray  # (n, k): actions since the reset
    frames: np.ndarray  # uint8 (t, h, w, 3)
    actions: np.ndarray  # (t, k): those that caused these frames
    told: list[dict[str, float]] = field(default_factory=list)  # states of these frames: x, y, angle ...


@dataclass(frozen=True)
class Counterfactuals:
    """True frames, uint8 (n, t, h, w, 3), of a state under several action lists (n, t, k)."""

    state: State
    actions: np.ndarray
    frames: np.ndarray


class Truth:
    """The true world. `history`: how many frames a generated game starts from."""

    def __init__(self, world: World, history: int):
        self.world, self.history = world, history
        self.space = world.action_space
        self._known: dict[tuple, tuple[np.ndarray, list[dict[str, float]]]] = {}

    @classmethod
    def open(cls, config: WorldConfig, history: int, seed: int) -> Truth:
        """Starts the simulator. Raises UserError where it is missing, or not deterministic."""
        truth = cls(make_world(config), history)
        try:
            state = next(truth.states(seed))
            if state is not None:
                truth.run(state, np.zeros((2, len(truth.space)), np.float32))
        except BaseException:  # also KeyboardInterrupt
            truth.close()
            raise
        return truth

    def state(self, seed: int, length: int) -> State | None:
        """The state after `length` actions of the scripted policy in the episode of this seed; None if it
        ends before.
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
        """Plays an episode from its first frame under actions (n, k) → n + 1 frames and their states; None if
        it ends before.
        """
        frames, told = [self.world.reset(seed)], [self.world.state()]
        for action in actions:
            if self.world.done:
                return None
            frames.append(self.world.step(action))
            told.append(self.world.state())
        return (np.stack(frames), told) if not self.world.done else None

    def states(self, seed: int) -> Iterator[State | None]:
        """Endless states, each from another episode; deterministic by seed. If an episode ends too early, an
        earlier state of it; None if that fails, too.
        """
        for number in itertools.count(1000 * seed):
            state = self.state(number, SHORTEST + LONGER * (number % KINDS))
            yield state or self.state(number, self.history)

    def run(self, state: State, actions: np.ndarray) -> tuple[np.ndarray, list[dict[str, float]]]:
        """Plays actions (t, k) from the state → frames uint8 (t, h, w, 3) and their states; fewer if the
        episode ends. Results are cached.
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
        """Plays each of the action lists (n, t, k) from the state; None if an episode ends too early."""
        made = [self.run(state, one)[0] for one in actions]
        if any(len(frames) < actions.shape[1] for frames in made):
            return None
        return Counterfactuals(state, np.asarray(actions, np.float32), np.stack(made))

    def gather(
        self, count: int, seed: int, plan: Callable[[int, State], np.ndarray | None], name: str
    ) -> list[Counterfactuals]:
        """Branches of `count` states under the action lists that `plan(number, state)` returns (n, t, k).
        States without a plan, or whose episode ends too early, are skipped; fewer branches if not enough are
        found.
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
        """Plays actions from the state → yields frames; when an episode ends, a new one begins."""
        self._return_to(state)
        episode = state.seed
        for action in actions:
            if self.world.done:
                episode += 1
                self.world.reset(episode)
            yield self.world.step(action)

    def sample(self, count: int, seed: int) -> tuple[np.ndarray, list[dict[str, float]]]:
        """`count` true frames, uint8 (n, h, w, 3), of many episodes, in the order they were played, and their
        states.
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
    """All branches as generated games; those of one state have the same noise."""
    frames = np.concatenate([np.repeat(one.state.frames[None], len(one.actions), 0) for one in found])
    before = np.concatenate([np.repeat(one.state.actions[None], len(one.actions), 0) for one in found])
    after = np.concatenate([one.actions for one in found])
    numbers = np.concatenate([np.full(len(one.actions), seed + i) for i, one in enumerate(found)])
    told = [one.state.told for one in found for _ in one.actions]
    actions = torch.from_numpy(np.concatenate([before, after], 1))
    return Games(frames, actions, torch.from_numpy(numbers), told)
