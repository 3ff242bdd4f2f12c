"""Recordings → latents cache → segments → batches.

`action[t]` stays beside the frame `t` that it caused through every step; tests/test_dataset.py holds that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .config import UserError
from .recording import ACTIONS, Recording


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split(recordings: Sequence[Path], held_out: float = 0.05) -> tuple[list[Path], list[Path]]:
    """Recordings → (train, held out), decided by the directory names alone, so that more data moves none.

    Of two recordings or more at least one is held out and at least one is for training.
    """
    order = sorted(map(Path, recordings), key=lambda path: (_hash(path.name), str(path)))
    count = sum(_hash(path.name) < held_out * 2**64 for path in order)
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


class LatentsCache:
    """Float16 latents, actions and resets of many recordings in the directory `path`, memory-mapped.

    `key` identifies the autoencoder that made them. Lists with an item per recording: `latents` (n, c, h, w),
    `actions` (n, k), `resets` (n,), `names`, `directories`. `recordings` limits it to those; one that is
    missing or was made by another autoencoder raises UserError.
    """

    def __init__(self, path: str | Path, key: str, recordings: Sequence[Path] | None = None) -> None:
        self.path, self.key = Path(path), key
        if recordings is None:
            files = sorted(self.path.glob("*.npz"))
        else:
            files = [_entry(self.path, recording) for recording in recordings]
        if not files:
            raise UserError(f"There is no latents cache in {self.path}; build it from recordings first.")
        self.latents: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.resets: list[np.ndarray] = []
        self.names: list[tuple[str, ...]] = []
        self.directories: list[str] = []
        for file in files:
            found = _load_entry(file)
            if found is None or str(found["key"]) != key:
                raise UserError(
                    f"The latents cache {file} does not belong to this autoencoder; build it again."
                )
            self.latents.append(np.load(file.with_suffix(".npy"), mmap_mode="r"))
            self.actions.append(found["actions"])
            self.resets.append(found["resets"])
            self.names.append(tuple(found["names"].tolist()))
            self.directories.append(str(found["directory"]))

    def __len__(self) -> int:
        return sum(map(len, self.latents))

    def longest(self) -> int:
        """Frames of the longest episode."""
        ends = (np.flatnonzero(np.append(resets, True)) for resets in self.resets)
        return max(int(np.diff(end, prepend=0).max()) for end in ends)

    @classmethod
    def build(
        cls,
        recordings: Sequence[Path],
        encode: Callable[[torch.Tensor], torch.Tensor],
        path: str | Path,
        key: str,
        batch: int = 256,
        workers: int = 1,
    ) -> LatentsCache:
        """Encodes the recordings that are not there yet; `encode`: uint8 (n, 3, h, w) → (n, c, h', w').
        `workers`: threads that read them, where encoding is not what takes long.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)

        def build(directory: Path) -> None:
            file = _entry(path, directory)
            found = _load_entry(file)
            if found is None or str(found["key"]) != key or found["stamp"] != _stamp(directory):
                _build_entry(directory, encode, file, key, batch)

        with ThreadPoolExecutor(workers) as pool:
            done = pool.map(build, recordings)
            list(tqdm(done, desc="latents", unit="recording", total=len(recordings), disable=None))
        return cls(path, key, recordings)


def _entry(path: Path, directory: str | Path) -> Path:
    """The name has the whole path's hash, since recordings of two collections may have the same name."""
    directory = Path(directory).resolve()
    return path / f"{directory.name}-{_hash(str(directory)):016x}.npz"


def _stamp(directory: str | Path) -> int:
    """Tells a recording from its older, shorter self."""
    file = Path(directory) / ACTIONS
    return file.stat().st_size if file.exists() else 0


def _load_entry(file: Path) -> dict[str, np.ndarray] | None:
    if not (file.exists() and file.with_suffix(".npy").exists()):
        return None
    with np.load(file) as found:
        return {name: found[name] for name in found.files}


def _build_entry(directory: str | Path, encode: Callable, file: Path, key: str, batch: int) -> None:
    """Latents go to .npy, all else to .npz; the .npz comes last and vouches for both."""
    recording, stamp = Recording(directory), _stamp(directory)
    if not len(recording):
        raise UserError(f"{directory} holds no frame; delete it.")
    file.unlink(missing_ok=True)
    partial = file.with_suffix(".npy.tmp")
    latents = None
    for start, frames in _batches(recording, batch):
        with torch.inference_mode():
            part = encode(torch.from_numpy(frames).permute(0, 3, 1, 2)).to("cpu", torch.float16).numpy()
        if not np.isfinite(part).all():
            raise UserError(f"The autoencoder's latents of {directory} are not finite; train it again.")
        if latents is None:
            shape = (len(recording), *part.shape[1:])
            latents = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
        latents[start : start + len(part)] = part
    latents.flush()
    os.replace(partial, file.with_suffix(".npy"))
    with open(file.with_suffix(".npz.tmp"), "wb") as out:
        np.savez(
            out,
            key=key,
            stamp=stamp,
            directory=str(directory),
            names=np.array(recording.names, dtype=np.str_),
            actions=recording.actions,
            resets=recording.resets,
        )
    os.replace(file.with_suffix(".npz.tmp"), file)


def _batches(recording: Recording, batch: int) -> Iterator[tuple[int, np.ndarray]]:
    frames = recording.pick(range(len(recording)))
    for start in range(0, len(recording), batch):
        count = min(batch, len(recording) - start)
        yield start, np.stack([next(frames) for _ in range(count)])


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
