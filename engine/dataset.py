"""Recordings → segments → batches; between the first two stands the latents cache (latents.py).

`action[t]` stays beside the frame `t` that it caused through every step; tests/test_dataset.py holds that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .config import UserError
from .latents import LatentsCache, stable_hash
from .recording import Recording


def split(recordings: Sequence[Path], held_out: float = 0.05) -> tuple[list[Path], list[Path]]:
    """Recordings → (train, held out), decided by the directory names alone, so that more data moves none.

    Of two recordings or more at least one is held out and at least one is for training.
    """
    order = sorted(map(Path, recordings), key=lambda path: (stable_hash(path.name), str(path)))
    count = sum(stable_hash(path.name) < held_out * 2**64 for path in order)
    count = min(max(count, 1), len(order) - 1) if len(order) > 1 else 0
    return sorted(order[count:]), sorted(order[:count])


def load_frames(recordings: Sequence[Path], limit: int, seed: int) -> torch.Tensor:
    """At most `limit` frames, spread at random over all recordings in their order → uint8 (n, 3, h, w)."""
    opened = [Recording(path) for path in recordings]
    ends = np.cumsum([len(recording) for recording in opened])
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        raise UserError("The recordings hold no frame.")
    count = min(limit, total)
    edges = np.arange(count + 1) * total // count  # one frame out of each stretch
    chosen = np.random.default_rng(seed).integers(edges[:-1], edges[1:])
    height, width = opened[0].header["height"], opened[0].header["width"]
    frames = torch.empty(count, 3, height, width, dtype=torch.uint8)
    done = 0
    with tqdm(total=count, desc="frames", unit="frame", disable=None) as progress:
        for recording, end in zip(opened, ends, strict=True):
            if (recording.header["height"], recording.header["width"]) != (height, width):
                raise UserError(f"{recording.directory} has another frame size than {opened[0].directory}.")
            first = end - len(recording)
            for frame in recording.pick(chosen[(chosen >= first) & (chosen < end)] - first):
                frames[done] = torch.from_numpy(frame).permute(2, 0, 1)
                done += 1
                progress.update()
    return frames


class Segments:
    """All runs of `length` consecutive frames that lie inside one episode, as (recording, start) in `places`.

    Actions are laid out as `names`; a name that a recording lacks is 0, one that only a recording knows
    raises UserError, as does a cache without any run that long. `near`: a device that takes all frames into
    its memory, as fits a GPU that would wait for them.
    """

    def __init__(
        self, cache: LatentsCache, length: int, names: Sequence[str], near: torch.device | None = None
    ) -> None:
        self.cache, self.length, self.names = cache, length, tuple(names)
        self._actions = [self._layout(i) for i in range(len(cache.latents))]
        places = []
        for number, resets in enumerate(cache.resets):
            # A border lies before every reset; a run may start on one but never step over it.
            borders = np.concatenate([[0], np.cumsum(resets)])  # resets before frame i
            start = np.arange(max(0, len(resets) - length + 1))
            start = start[borders[start + length] == borders[start + 1]]
            places.append(np.stack([np.full_like(start, number), start], 1))
        self.places = np.concatenate(places)  # (n, 2)
        if not len(self.places):
            raise UserError(f"No episode in {cache.path} has {length} frames; collect longer ones.")
        self._first = np.cumsum([0, *map(len, cache.latents)])[:-1]  # each recording's first frame in all
        self._all: list[torch.Tensor] = []
        if near:
            both = (np.concatenate(parts) for parts in (cache.latents, self._actions))
            self._all = [torch.from_numpy(x).to(near) for x in both]

    def _layout(self, number: int) -> np.ndarray:
        known, actions = self.cache.names[number], self.cache.actions[number]
        if unknown := [name for name in known if name not in self.names]:
            where = self.cache.directories[number]
            raise UserError(f"{where} has the key {unknown[0]!r}, which this world does not have.")
        laid = np.zeros((len(actions), len(self.names)), np.float32)
        laid[:, [self.names.index(name) for name in known]] = actions
        return laid

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

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Segments of these numbers → latents float32 (b, t, c, h, w), actions float32 (b, t, k)."""
        if self._all:
            number, start = self.places[np.asarray(indices)].T
            frames = torch.from_numpy((self._first[number] + start)[:, None] + np.arange(self.length))
            latents, actions = (x[frames.to(x.device)].float() for x in self._all)
            return latents, actions
        shape = (len(indices), self.length)
        latents = np.empty((*shape, *self.cache.latents[0].shape[1:]), np.float16)
        actions = np.empty((*shape, len(self.names)), np.float32)
        for row, (number, start) in enumerate(self.places[np.asarray(indices)].tolist()):
            latents[row] = self.cache.latents[number][start : start + self.length]
            actions[row] = self._actions[number][start : start + self.length]
        return torch.from_numpy(latents).float(), torch.from_numpy(actions)


class Batches:
    """Endless random batches, the n-th of which depends on seed, rank, world_size and n alone.

    Setting `position` resumes exactly. At least `change_share` of every batch has a key change in its last
    `tail` frames (None: anywhere), as far as there are any: most frames hold their keys, and what a key does
    is learnt where it changes.
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
        """Segment numbers of the batch at `position`, (b,)."""
        rng = np.random.default_rng([self.seed, position * self.world_size + self.rank])
        sure = self._changed[rng.integers(len(self._changed), size=self._sure)] if self._sure else []
        free = rng.integers(len(self.segments), size=self.batch - self._sure)
        return rng.permutation(np.concatenate([sure, free]).astype(np.int64))

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents float32 (b, t, c, h, w) and actions float32 (b, t, k) at `position`, which moves on."""
        chosen = self.indices(self.position)
        self.position += 1
        return self.segments.batch(chosen)
