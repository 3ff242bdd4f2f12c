"""Recordings → a cache of latents, encoded once and mapped into memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from .config import UserError
from .recording import ACTIONS, Recording


def stable_hash(text: str) -> int:
    """64 bits of a text, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


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
        workers: int = 0,
    ) -> LatentsCache:
        """Encodes the recordings that are not there yet; `encode`: uint8 (n, 3, h, w) → (n, c, h', w').
        `workers`: processes that decode them, where encoding is not what takes long; 0: this one.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        files = {}
        for directory in recordings:
            file = _entry(path, directory)
            found = _load_entry(file)
            if found is None or str(found["key"]) != key or found["stamp"] != _stamp(directory):
                file.unlink(missing_ok=True)
                files[str(directory)] = file
        with tqdm(total=len(files), desc="latents", unit="recording", disable=None) as progress:
            for _ in _encode(files, encode, key, batch, workers):
                progress.update()
        return cls(path, key, recordings)


def _entry(path: Path, directory: str | Path) -> Path:
    """The name has the whole path's hash, since recordings of two collections may have the same name."""
    directory = Path(directory).resolve()
    return path / f"{directory.name}-{stable_hash(str(directory)):016x}.npz"


def _stamp(directory: str | Path) -> int:
    """Tells a recording from its older, shorter self."""
    file = Path(directory) / ACTIONS
    return file.stat().st_size if file.exists() else 0


def _load_entry(file: Path) -> dict[str, np.ndarray] | None:
    if not (file.exists() and file.with_suffix(".npy").exists()):
        return None
    with np.load(file) as found:
        return {name: found[name] for name in found.files}


class Frames(IterableDataset):
    """All frames of recordings, in batches: (directory, number of the first, of all, uint8 (n, h, w, 3), and
    with a recording's first batch what its entry has besides latents). Of several processes each decodes
    recordings of its own.
    """

    def __init__(self, directories: Sequence[str], batch: int):
        self.directories, self.batch = directories, batch

    def __iter__(self) -> Iterator[tuple[str, int, int, torch.Tensor, dict | None]]:
        worker = get_worker_info()
        mine = self.directories[worker.id :: worker.num_workers] if worker else self.directories
        for directory in mine:
            stamp, recording = _stamp(directory), Recording(directory)
            if not len(recording):
                raise UserError(f"{directory} holds no frame; delete it.")
            about = {
                "stamp": stamp,
                "directory": directory,
                "names": np.array(recording.names, dtype=np.str_),
            }
            about |= {"actions": recording.actions, "resets": recording.resets}
            frames = recording.pick(range(len(recording)))
            for start in range(0, len(recording), self.batch):
                count = min(self.batch, len(recording) - start)
                part = np.stack([next(frames) for _ in range(count)])
                yield directory, start, len(recording), torch.from_numpy(part), None if start else about


def _as_it_is(item):
    return item


def _encode(files: dict[str, Path], encode: Callable, key: str, batch: int, workers: int) -> Iterator[Path]:
    """Writes the entries of recordings, by their directories, and yields each when it is whole. Latents go to
    .npy, all else to .npz; the .npz comes last and vouches for both.
    """
    workers = min(workers, len(files))
    # a batch of frames is handed on as it is, and not one of several of these
    how = {"batch_size": None, "collate_fn": _as_it_is, "num_workers": workers}
    begun: dict[str, tuple[np.ndarray, dict]] = {}
    for directory, start, total, frames, about in DataLoader(Frames(list(files), batch), **how):
        with torch.inference_mode():
            part = encode(frames.permute(0, 3, 1, 2)).to("cpu", torch.float16).numpy()
        if not np.isfinite(part).all():
            raise UserError(f"The autoencoder's latents of {directory} are not finite; train it again.")
        file = files[directory]
        if about:
            shape, partial = (total, *part.shape[1:]), file.with_suffix(".npy.tmp")
            latents = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
            begun[directory] = latents, about
        latents, about = begun[directory]
        latents[start : start + len(part)] = part
        if start + len(part) == total:
            latents.flush()
            os.replace(file.with_suffix(".npy.tmp"), file.with_suffix(".npy"))
            with open(file.with_suffix(".npz.tmp"), "wb") as out:
                np.savez(out, key=key, **about)
            os.replace(file.with_suffix(".npz.tmp"), file)
            del begun[directory]
            yield file
