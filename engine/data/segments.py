"""Segments of the latents cache (latents.py), and random batches of them.

`action[t]` is always the action that caused frame `t`; tests/test_segments.py checks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import UserError
from .latents import LatentsCache


class Clip(NamedTuple):
    """A batch of segments: consecutive frames with their actions and states. `actions` begin some frames
    earlier, so that the first frames have their history; before an episode they are 0.
    """

    latents: Tensor  # (b, t, c, y, x) float32
    actions: Tensor  # (b, before + t, k) float32
    states: Tensor  # (b, t, s) float32, NaN where unknown

    def to(self, device: torch.device) -> Clip:
        """The clip on a device."""
        return Clip(*(x.to(device, non_blocking=True) for x in self))


class Segments:
    """All segments of `length` consecutive frames within one episode; `places` (n, 2): recording and first
    frame of each.

    Actions have the columns `names`, 0 where a recording lacks a key, and `before` more frames in front.
    States have the columns `state_names`. `near`: a device into whose memory all frames are copied, so that
    a GPU need not wait for them. Raises UserError where a recording has a key that is not in `names`, or no
    episode is long enough.
    """

    def __init__(
        self,
        cache: LatentsCache,
        length: int,
        names: Sequence[str],
        state_names: Sequence[str] = (),
        before: int = 0,
        near: torch.device | None = None,
    ) -> None:
        self.cache, self.length, self.before = cache, length, before
        self.names, self.state_names = tuple(names), tuple(state_names)
        self._actions = [self._laid_actions(i) for i in range(len(cache.latents))]
        self._states = [self._laid_states(i) for i in range(len(cache.latents))]
        places, begins = [], []
        for number, resets in enumerate(cache.resets):
            # a segment may begin with a reset but must not contain a later one
            borders = np.concatenate([[0], np.cumsum(resets)])  # resets before frame i
            start = np.arange(max(0, len(resets) - length + 1))
            start = start[borders[start + length] == borders[start + 1]]
            places.append(np.stack([np.full_like(start, number), start], 1))
            firsts = np.maximum.accumulate(np.where(resets, np.arange(len(resets)), 0))
            begins.append(firsts[start])
        self.places = np.concatenate(places)  # (n, 2)
        self._begins = np.concatenate(begins)  # (n,): first frame of each segment's episode
        if not len(self.places):
            raise UserError(f"No episode in {cache.path} has {length} frames; collect longer ones.")
        self._first = np.cumsum([0, *map(len, cache.latents)])[
            :-1
        ]  # index of each recording's first frame in `_all`
        self._all: list[Tensor] = []
        if near:
            all_parts = (cache.latents, self._actions, self._states)
            self._all = [torch.from_numpy(np.concatenate(parts)).to(near) for parts in all_parts]

    def _laid_actions(self, number: int) -> np.ndarray:
        known, actions = self.cache.names[number], self.cache.actions[number]
        if unknown := [name for name in known if name not in self.names]:
            where = self.cache.directories[number]
            raise UserError(f"{where} has the key {unknown[0]!r}, which this world does not have.")
        laid = np.zeros((len(actions), len(self.names)), np.float32)
        laid[:, [self.names.index(name) for name in known]] = actions
        return laid

    def _laid_states(self, number: int) -> np.ndarray:
        """A recording's states (n, s); all NaN where it lacks one of the names."""
        known, states = self.cache.state_names[number], self.cache.states[number]
        if not set(self.state_names) <= set(known):
            return np.full((len(states), len(self.state_names)), np.nan, np.float32)
        return states[:, [known.index(name) for name in self.state_names]].astype(np.float32)

    def __len__(self) -> int:
        return len(self.places)

    def changed(self, tail: int) -> np.ndarray:
        """Which segments have a key change among their last `tail` frames, bool (len,)."""
        tail = min(tail, self.length - 1)  # the first frame's change lies before the segment
        found = np.zeros(len(self), bool)
        for number, actions in enumerate(self._actions):
            mine = self.places[:, 0] == number
            change = np.any(actions[1:] != actions[:-1], 1)  # between frames i and i + 1
            before = np.concatenate([[0, 0], np.cumsum(change)])  # changes up to frame i - 1
            stop = self.places[mine, 1] + self.length
            found[mine] = before[stop] > before[stop - tail]
        return found

    def batch(self, indices: Sequence[int] | np.ndarray) -> Clip:
        """The segments with these indices."""
        chosen = np.asarray(indices)
        number, start = self.places[chosen].T
        frames = start[:, None] + np.arange(self.length)
        acting = start[:, None] + np.arange(-self.before, self.length)
        held = acting >= self._begins[chosen][:, None]  # nothing is held before an episode
        acting = np.maximum(acting, 0)
        if self._all:
            first = self._first[number][:, None]
            latents, actions, states = self._all
            where = [torch.from_numpy(first + x).to(latents.device) for x in (frames, acting)]
            actions = actions[where[1]] * torch.from_numpy(held).to(actions.device)[..., None]
            return Clip(latents[where[0]].float(), actions, states[where[0]])
        pairs = list(zip(number.tolist(), frames, acting, strict=True))
        latents = np.stack([self.cache.latents[n][f[0] : f[-1] + 1] for n, f, _ in pairs])
        actions = np.stack([self._actions[n][a] for n, _, a in pairs]) * held[..., None]
        states = np.stack([self._states[n][f] for n, f, _ in pairs])
        parts = latents, actions.astype(np.float32), states
        return Clip(*(torch.from_numpy(x).float() for x in parts))


class Batches:
    """Endless random batches; batch n depends on seed, rank, world_size and n alone, so that setting
    `position` resumes exactly.

    At least `change_share` of every batch has a key change in its last `tail` frames (None: anywhere), if
    there are such segments: keys rarely change, and what a key does is best learnt where it does.
    """

    def __init__(
        self,
        segments: Segments,
        batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        change_share: float = 0.5,
        tail: int | None = None,
    ) -> None:
        self.segments, self.batch, self.seed = segments, batch, seed
        self.rank, self.world_size, self.position = rank, world_size, 0
        changed = np.flatnonzero(segments.changed(segments.length if tail is None else tail))
        self._changed = changed
        self._sure = int(np.ceil(change_share * batch)) if len(changed) else 0

    def indices(self, position: int) -> np.ndarray:
        """Indices (b,) of the segments in the batch at `position`."""
        rng = np.random.default_rng([self.seed, position * self.world_size + self.rank])
        sure = self._changed[rng.integers(len(self._changed), size=self._sure)] if self._sure else []
        free = rng.integers(len(self.segments), size=self.batch - self._sure)
        return rng.permutation(np.concatenate([sure, free]).astype(np.int64))

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Clip:
        """The batch at `position`, which advances by one."""
        chosen = self.indices(self.position)
        self.position += 1
        return self.segments.batch(chosen)
