"""LatentsCache: latents of recordings, encoded once, on disk and memory-mapped."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from ..config import UserError
from .cache import content_of, draft_of, entry_of, is_current, load_entry, stamp_of
from .recording import Recording

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LatentsCache:
    """Latents, actions, resets and states of many recordings, in the directory `path`.

    Lists with one item for each recording: `latents` (n, c, y, x) float16, memory-mapped, `actions` (n, k),
    `resets` (n,), `states` (n, s), `names` of keys, `state_names`, `directories`. `key`: digest of the
    encoder; `recordings`: which ones, all in the cache unless given. Raises UserError for an entry that is
    missing, damaged or of another encoder.
    """

    def __init__(self, path: str | Path, key: str, recordings: Sequence[Path] | None = None) -> None:
        self.path, self.key = Path(path), key
        if recordings is None:
            files = sorted(self.path.glob("*.npz"))
        else:
            files = [entry_of(self.path, recording) for recording in recordings]
        if not files:
            raise UserError(f"There is no latents cache in {self.path}; build it from recordings first.")
        self.latents: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.resets: list[np.ndarray] = []
        self.names: list[tuple[str, ...]] = []
        self.states: list[np.ndarray] = []
        self.state_names: list[tuple[str, ...]] = []
        self.directories: list[str] = []
        for file in files:
            found = load_entry(file, key)
            if found is None:
                raise UserError(
                    f"The latents cache {file} does not belong to this autoencoder; build it again."
                )
            self.latents.append(np.load(file.with_suffix(".npy"), mmap_mode="r"))
            self.actions.append(found["actions"])
            self.resets.append(found["resets"])
            self.names.append(tuple(found["names"].tolist()))
            self.states.append(found["states"])
            self.state_names.append(tuple(found["state_names"].tolist()))
            self.directories.append(str(found["directory"]))

    def __len__(self) -> int:
        return sum(map(len, self.latents))

    def longest(self) -> int:
        """How many frames the longest episode has."""
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
        """The cache of these recordings; those that are missing or have changed are encoded first. `encode`:
        uint8 (n, 3, h, w) → (n, c, y, x). `workers`: processes that decode video, 0 for this one. Raises
        UserError where latents are not finite or the disk fails.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        files = {}
        for directory in recordings:
            file = entry_of(path, directory)
            if not is_current(file, directory, key):
                file.unlink(missing_ok=True)
                files[str(directory)] = file
        with tqdm(total=len(files), desc="latents", unit="recording", disable=None) as progress:
            for _ in _encode(files, encode, key, batch, workers):
                progress.update()
        return cls(path, key, recordings)


class Frames(IterableDataset):
    """All frames of recordings in batches: (directory, index of the first frame, number of frames in the
    recording, frames uint8 (n, h, w, 3), and, with a recording's first batch, the other arrays of its cache
    entry, else None). Each worker process decodes recordings of its own.
    """

    def __init__(self, directories: Sequence[str], batch: int):
        self.directories, self.batch = directories, batch

    def __iter__(self) -> Iterator[tuple[str, int, int, torch.Tensor, dict | None]]:
        worker = get_worker_info()
        mine = self.directories[worker.id :: worker.num_workers] if worker else self.directories
        for directory in mine:
            stamp, content, recording = stamp_of(directory), content_of(directory), Recording(directory)
            if not len(recording):
                raise UserError(f"{directory} holds no frame; delete it.")
            about = {
                "stamp": stamp,
                "content": content,
                "directory": directory,
                "names": np.array(recording.names, dtype=np.str_),
            }
            about |= {"actions": recording.actions, "resets": recording.resets}
            state_names, states = laid_states(recording)
            about |= {"states": states, "state_names": np.array(state_names, dtype=np.str_)}
            frames = recording.pick(range(len(recording)))
            for start in range(0, len(recording), self.batch):
                count = min(self.batch, len(recording) - start)
                part = np.stack([next(frames) for _ in range(count)])
                yield directory, start, len(recording), torch.from_numpy(part), None if start else about


def laid_states(recording: Recording) -> tuple[list[str], np.ndarray]:
    """A recording's states: names, and values (n, s) float32, NaN where a frame lacks them."""
    names = list(recording.state_kinds)
    rows = [[(state or {}).get(name, np.nan) for name in names] for state in recording.states]
    return names, np.array(rows, np.float32).reshape(len(rows), len(names))


class Latents:
    """Writes one recording's latents to a .npy file, part by part; `finish` gives it its name. Space on the
    disk is reserved first, so that a full disk raises OSError at once.
    """

    def __init__(self, file: Path, shape: tuple[int, ...]):
        self.file = file.with_suffix(".npy")
        self.partial = draft_of(self.file)
        self.out = open(self.partial, "wb")  # noqa: SIM115
        try:
            self._reserve(shape)
        except OSError:
            self.drop()
            raise

    def _reserve(self, shape: tuple[int, ...]) -> None:
        head = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self.out, head | {"shape": shape})
        self.out.flush()
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self.out.fileno(), self.out.tell(), 2 * int(np.prod(shape)))
        except OSError as error:
            if error.errno in FULL:  # other errors: the file system cannot reserve space
                raise

    def write(self, part: np.ndarray) -> None:
        """Appends latents of the next frames, float16 (n, c, y, x)."""
        self.out.write(np.ascontiguousarray(part).data)

    def finish(self) -> None:
        """Closes the complete file and renames it."""
        self.out.close()
        os.replace(self.partial, self.file)

    def drop(self) -> None:
        """Removes the unfinished file."""
        with suppress(OSError):  # flushing to a full disk
            self.out.close()
        self.partial.unlink(missing_ok=True)


def _encode(files: dict[str, Path], encode: Callable, key: str, batch: int, workers: int) -> Iterator[Path]:
    """Writes the cache entries of recordings (directory → .npz) and yields each that is complete. Latents go
    to a .npy; the .npz with all else is written last, so that it marks a complete entry.
    """
    workers = min(workers, len(files))
    # Frames makes the batches itself, and they must not be converted
    how = {"batch_size": None, "collate_fn": _unchanged, "num_workers": workers}
    begun: dict[str, tuple[Latents, dict]] = {}
    try:
        for directory, start, total, frames, about in DataLoader(Frames(list(files), batch), **how):
            with torch.inference_mode():
                part = encode(frames.permute(0, 3, 1, 2)).to("cpu", torch.float16).numpy()
            if not np.isfinite(part).all():
                raise UserError(f"The autoencoder's latents of {directory} are not finite; train it again.")
            file = files[directory]
            if about:
                begun[directory] = Latents(file, (total, *part.shape[1:])), about
            latents, about = begun[directory]
            latents.write(part)
            if start + len(part) == total:
                latents.finish()
                _write_about(file, about | {"key": key})
                del begun[directory]
                yield file
    except OSError as error:
        said = f"Latents could not be written beside {file}" if begun else "Latents could not be made"
        raise UserError(f"{said} ({error.strerror or error}); free some space and run again.") from error
    finally:
        for latents, _ in begun.values():
            latents.drop()


def _unchanged(batch):
    return batch


def _write_about(file: Path, about: dict) -> None:
    partial = draft_of(file)
    try:
        with open(partial, "wb") as out:
            np.savez(out, **about)
        os.replace(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
