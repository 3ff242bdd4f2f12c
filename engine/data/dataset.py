"""Which recordings are for training and which are held out; frames sampled from them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..config import UserError, WorldConfig
from .about_world import world_of
from .cache import stable_hash
from .find import find_recordings, walk_recordings
from .recording import Recording
from .schema import read_header


def split(recordings: Sequence[Path], held_out: float = 0.05) -> tuple[list[Path], list[Path]]:
    """Recordings → (train, held out): a share of about `held_out`, chosen by hashes of the directory names,
    so that more data changes little. With two recordings or more, both lists have at least one.
    """
    order = sorted(map(Path, recordings), key=lambda path: (stable_hash(path.name), str(path)))
    count = sum(stable_hash(path.name) < held_out * 2**64 for path in order)
    count = min(max(count, 1), len(order) - 1) if len(order) > 1 else 0
    return sorted(order[count:]), sorted(order[:count])


def true_recordings(data: str, world: WorldConfig) -> tuple[list[Path], list[Path]]:
    """Recordings of the true game `world` in the folder `data` → (train, held out). Recordings of generated
    games are left out, and how many is printed.

    Raises UserError where one is of another world (about_world.py), or none is left.
    """
    found = find_recordings(data)
    true = true_headers(found)
    if not true:
        raise UserError(f"All recordings in {data} are of generated games; record or collect the true one.")
    if dreams := len(found) - len(true):
        print(f"{dreams} of {len(found)} recordings are of generated games and left out.", file=sys.stderr)
    world_of(true, world)
    return split(list(true))


def true_headers(recordings: Sequence[Path]) -> dict[Path, dict]:
    """The headers, by path, of those recordings that are of a true game."""
    headers = {path: read_header(path) for path in recordings}
    return {path: header for path, header in headers.items() if header["source"] != "dream"}


def recorded_world(data: str, world: WorldConfig, given: Collection[str]) -> WorldConfig:
    """The world of the true recordings in the folder `data` (world_of); `world` without any. Fields that
    differ from `world`'s are printed.
    """
    true = true_headers(list(walk_recordings(data)))
    found = world_of(true, world, given)
    changed = {
        name: getattr(found, name)
        for name in (field.name for field in fields(WorldConfig))
        if (old := getattr(world, name)) and old != getattr(found, name)
    }
    if changed:
        words = ", ".join(f"{name} {', '.join(v) if name == 'keys' else v}" for name, v in changed.items())
        print(f"Taken from the recordings in {data}: {words}.", file=sys.stderr)
    return found


def load_frames(recordings: Sequence[Path], limit: int, seed: int) -> torch.Tensor:
    """At most `limit` frames, one at random from each of as many equal stretches of all recordings → uint8
    (n, 3, h, w). Raises UserError without frames, or for frames of different sizes.
    """
    opened = [Recording(path) for path in recordings]
    ends = np.cumsum([len(recording) for recording in opened])
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        raise UserError("The recordings hold no frame.")
    count = min(limit, total)
    edges = np.arange(count + 1) * total // count  # of the stretches
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
