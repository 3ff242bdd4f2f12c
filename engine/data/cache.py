"""The files of the latents cache: where they are, which recording each belongs to, whether it is current."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .recording import ACTIONS, FRAMES, HEADER

ABANDONED = 24 * 3600.0  # seconds after which a half written file is removed
OWNERS = "owners.json"  # in a cache: the out= folders of the trainings that use it


def stable_hash(text: str) -> int:
    """A 64-bit hash of a text, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def cache_place(data: str | Path, out: str | Path, key: str, recordings: Sequence[Path]) -> Path:
    """The folder of an encoder's cache (`key`): inside `data`, or, if that cannot be written and does not
    hold all entries already, inside `out`.
    """
    there, name = Path(data), f"latents-{key}"
    try:
        (there / name).mkdir(exist_ok=True)
        probe = there / name / f"probe-{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError:
        if not all(is_current(entry_of(there / name, directory), directory, key) for directory in recordings):
            return Path(out) / name
    return there / name


def drop_old(place: Path, data: str | Path, out: str | Path, recordings: Sequence[Path]) -> None:
    """Registers the training in `out` as an owner of the cache in `place`, and removes what nobody uses any
    more: caches of its earlier encoders without other owners, and entries of recordings that are gone.
    """
    mine = str(Path(out).resolve())
    caches = {found for root in (Path(data), Path(out)) for found in root.glob("latents-*")}
    for cache in filter(_is_cache, caches):
        owners = {owner for owner in _owners(cache) if Path(owner).is_dir()} - {mine}
        try:
            if cache.resolve() == place.resolve():
                _write_owners(cache, owners | {mine})
            elif owners:
                _write_owners(cache, owners)
            else:
                shutil.rmtree(cache)
                print(f"Removed {cache}: no autoencoder that is there made these latents.", file=sys.stderr)
        except OSError:
            continue  # a read-only folder
    keep = {entry_of(place, directory).stem for directory in recordings}
    old = [file for file in place.glob("*.np[yz]") if file.stem not in keep]
    old += [file for file in place.glob("*.tmp") if _age(file) > ABANDONED]  # of processes that were killed
    for file in old if os.access(place, os.W_OK) else ():
        file.unlink(missing_ok=True)


def draft_of(file: Path) -> Path:
    """The temporary name of `file` until it is complete, different in each process: two trainings may write
    the same cache.
    """
    return file.with_name(f"{file.name}.{os.getpid()}.tmp")


def _age(file: Path) -> float:
    """Seconds since the file was last written."""
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return 0.0  # it has just been renamed


def _is_cache(folder: Path) -> bool:
    """Whether a folder holds files of a cache only."""
    return (
        folder.is_dir()
        and {file.suffix for file in folder.iterdir()} <= {".npy", ".npz", ".json", ".tmp"}
        and not (folder / HEADER).exists()
    )


def _owners(cache: Path) -> set[str]:
    try:
        return set(map(str, json.loads((cache / OWNERS).read_text())))
    except (OSError, ValueError, TypeError):
        return set()


def _write_owners(cache: Path, owners: set[str]) -> None:
    if owners != _owners(cache):
        beside = draft_of(cache / OWNERS)
        beside.write_text(json.dumps(sorted(owners)))
        os.replace(beside, cache / OWNERS)


def entry_of(path: Path, directory: str | Path) -> Path:
    """The .npz of a recording in the cache `path`. Its name has a hash of the recording's whole path, since
    two collections may have recordings of the same name.
    """
    directory = Path(directory).resolve()
    return path / f"{directory.name}-{stable_hash(str(directory)):016x}.npz"


def stamp_of(directory: str | Path) -> str:
    """Sizes and times of a recording's files: if they have not changed, its content need not be read
    again.
    """
    found = []
    for name in (HEADER, ACTIONS, FRAMES):
        file = Path(directory) / name
        stat = file.stat() if file.exists() else None
        found.append([stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] if stat else None)
    return json.dumps(found)


def content_of(directory: str | Path) -> str:
    """Hash of a recording's files."""
    digest = hashlib.sha256()
    for name in (HEADER, ACTIONS, FRAMES):
        file = Path(directory) / name
        with open(file if file.exists() else os.devnull, "rb") as opened:
            part = hashlib.sha256()
            while block := opened.read(1 << 20):
                part.update(block)
        digest.update(part.digest())
    return digest.hexdigest()


def is_current(file: Path, directory: str | Path, key: str) -> bool:
    """Whether the entry was made by the encoder `key` from the recording's present content."""
    found = load_entry(file, key)
    if found is None:
        return False
    return str(found["stamp"]) == stamp_of(directory) or str(found["content"]) == content_of(directory)


def load_entry(file: Path, key: str) -> dict[str, np.ndarray] | None:
    """An entry's arrays without the latents; None where it is missing, damaged, or of another encoder."""
    try:
        with np.load(file) as opened:
            found = {name: opened[name] for name in opened.files}
        latents = np.load(file.with_suffix(".npy"), mmap_mode="r")
        whole = str(found["key"]) == key and "content" in found and len(latents) == len(found["actions"])
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None
    return found if whole else None
