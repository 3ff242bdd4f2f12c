"""The latents cache: built once, by content, of the encoder that is there, on whatever disk there is."""

from __future__ import annotations

import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import UserError, WorldConfig
from engine.data.cache import cache_place, drop_old
from engine.data.latents import LatentsCache
from engine.data.recording import Recorder

NAMES = ("left", "right", "jump")
EPISODES = (23, 9, 40, 14)  # frames


def shade(action: np.ndarray) -> int:
    """The grey that an action causes in the test's world."""
    return 20 + 30 * int(action @ [1, 2, 4])


def record(directory: Path, seed: int, names: tuple[str, ...] = NAMES, episodes=EPISODES) -> Path:
    """A world whose frames show which keys caused them; the keys change at every third frame or so."""
    world = WorldConfig(name="test", height=32, width=32, keys={name: [] for name in names})
    rng = np.random.default_rng(seed)
    with Recorder(directory, world, "true", seed, lossless=True) as recorder:
        for length in episodes:
            action = np.zeros(len(names), np.float32)
            for i in range(length):
                if i and rng.random() < 0.35:
                    action = rng.integers(0, 2, len(names)).astype(np.float32)
                held = np.array([action[names.index(name)] if name in names else 0 for name in NAMES])
                recorder.add(np.full((32, 32, 3), shade(held), np.uint8), action, reset=i == 0, t_ns=0)
    return directory


def encode(frames: torch.Tensor) -> torch.Tensor:
    """(n, 3, h, w) uint8 → (n, 3, h / 16, w / 16): mean grey."""
    return torch.nn.functional.avg_pool2d(frames.float(), 16)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("data")
    return [record(root / f"r{i}", i) for i in range(3)]


@pytest.fixture(scope="module")
def cache(recordings, tmp_path_factory) -> LatentsCache:
    return LatentsCache.build(recordings, encode, tmp_path_factory.mktemp("cache"), "key", batch=16)


def test_several_readers_build_the_same_cache(cache, recordings, tmp_path):
    several = LatentsCache.build(recordings, encode, tmp_path, "key", batch=16, workers=2)
    for one, other in zip(cache.latents, several.latents, strict=True):
        assert np.array_equal(one, other)
    assert several.directories == cache.directories


def test_the_cache_is_built_once_and_knows_its_autoencoder(recordings, tmp_path):
    calls = []

    def counting(frames):
        calls.append(len(frames))
        return encode(frames)

    LatentsCache.build(recordings[:2], counting, tmp_path, "one", batch=50)
    assert sum(calls) == 2 * sum(EPISODES) and max(calls) == 50
    both = LatentsCache.build(recordings, counting, tmp_path, "one", batch=50)
    assert sum(calls) == 3 * sum(EPISODES) and len(both) == 3 * sum(EPISODES)
    assert len(LatentsCache(tmp_path, "one")) == len(both)
    assert len(LatentsCache(tmp_path, "one", recordings[1:2])) == sum(EPISODES)
    with pytest.raises(UserError, match="autoencoder"):
        LatentsCache(tmp_path, "two")
    LatentsCache.build(recordings, counting, tmp_path, "two")
    assert sum(calls) == 6 * sum(EPISODES)
    assert not list(tmp_path.glob("*.tmp"))


def test_an_interrupted_build_goes_on(recordings, tmp_path):
    def failing(frames):
        raise KeyboardInterrupt

    LatentsCache.build(recordings[:1], encode, tmp_path, "one")
    with pytest.raises(KeyboardInterrupt):
        LatentsCache.build(recordings, failing, tmp_path, "one")
    with pytest.raises(UserError, match="build it"):
        LatentsCache(tmp_path, "one", recordings)
    assert len(LatentsCache.build(recordings, encode, tmp_path, "one")) == 3 * sum(EPISODES)


def test_a_recording_that_grew_is_encoded_again(tmp_path):
    record(tmp_path / "r", 0, episodes=(5,))
    assert len(LatentsCache.build([tmp_path / "r"], encode, tmp_path / "c", "k")) == 5
    for file in (tmp_path / "r").iterdir():
        file.unlink()
    record(tmp_path / "r", 0, episodes=(5, 6))
    assert len(LatentsCache.build([tmp_path / "r"], encode, tmp_path / "c", "k")) == 11


def swap(one: Path, other: Path) -> None:
    """Each takes the other's place, with all its times."""
    beside = one.with_name("beside")
    one.rename(beside)
    other.rename(one)
    beside.rename(other)


@pytest.mark.parametrize("how", ["renamed", "copied", "in place"])
def test_recordings_that_were_replaced_are_encoded_again(tmp_path, how):
    """By others with as many frames and lines of the same length, however they got there."""
    a, b = (record(tmp_path / name, 0, episodes=(9,)) for name in "ab")
    for path, grey in ((a, 10), (b, 200)):
        for name in ("actions.jsonl", "frames.mkv", "session.json"):
            (path / name).unlink()
        world = WorldConfig(name="test", height=32, width=32, keys={"left": []})
        with Recorder(path, world, "true", 0, lossless=True) as recorder:
            for i in range(9):
                recorder.add(np.full((32, 32, 3), grey, np.uint8), [0], reset=i == 0, t_ns=i, rng=1)
    assert (a / "actions.jsonl").stat().st_size == (b / "actions.jsonl").stat().st_size
    before = LatentsCache.build([a], encode, tmp_path / "c", "k")
    assert (before.latents[0] == 10).all()
    if how == "renamed":
        swap(a, b)
    elif how == "copied":
        shutil.rmtree(a)
        shutil.copytree(b, a)
    else:
        for file in a.iterdir():
            old = file.stat()
            file.write_bytes((b / file.name).read_bytes())
            os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (LatentsCache.build([a], encode, tmp_path / "c", "k").latents[0] == 200).all()


def test_a_recording_that_was_only_touched_is_not_encoded_again(tmp_path):
    directory = record(tmp_path / "r", 0)
    LatentsCache.build([directory], encode, tmp_path / "c", "k")
    for file in directory.iterdir():
        os.utime(file, (1, 1))
    LatentsCache.build([directory], None, tmp_path / "c", "k")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_damaged_entries_are_encoded_again(recordings, tmp_path, suffix, damage):
    LatentsCache.build(recordings, encode, tmp_path, "k")
    file = sorted(tmp_path.glob(f"*{suffix}"))[0]
    content = file.read_bytes()
    changed = {"cut": content[: len(content) // 2], "empty": b"", "foreign": b"no array at all" * 10}[damage]
    file.write_bytes(changed)
    with pytest.raises(UserError, match="build it"):
        LatentsCache(tmp_path, "k", recordings)
    again = LatentsCache.build(recordings, encode, tmp_path, "k")
    assert len(again) == 3 * sum(EPISODES) and file.read_bytes()[:6] == content[:6]


def test_a_full_disk_is_told_and_leaves_nothing_half_written(recordings, tmp_path):
    """The limit on a file's size stands for the disk's end: a mapped file would be a SIGBUS there."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="free some space"):
            LatentsCache.build(recordings, encode, tmp_path / "c", "k", batch=16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "c").iterdir())
    assert len(LatentsCache.build(recordings, encode, tmp_path / "c", "k")) == 3 * sum(EPISODES)


def test_two_trainings_may_build_one_cache(cache, recordings, tmp_path, monkeypatch):
    """The second one begins and ends while the first is in the middle of a recording."""
    seen = []

    def slow(frames):
        seen.append(len(frames))
        if len(seen) == 2:
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)
                LatentsCache.build(recordings, encode, tmp_path, "key", batch=16)
        return encode(frames)

    both = LatentsCache.build(recordings, slow, tmp_path, "key", batch=16)
    for one, other in zip(both.latents, cache.latents, strict=True):
        assert np.array_equal(one, other)
    assert not list(tmp_path.glob("*.tmp"))


def test_what_a_killed_training_left_is_removed_after_a_day(recordings, tmp_path):
    place = tmp_path / "latents-key"
    place.mkdir()
    for name, age in (("a.npy.7.tmp", 2 * 86400), ("b.npz.7.tmp", 2 * 86400), ("c.npy.8.tmp", 3600)):
        (place / name).touch()
        os.utime(place / name, (time.time() - age,) * 2)
    drop_old(place, tmp_path, tmp_path, recordings)
    assert [file.name for file in place.glob("*.tmp")] == ["c.npy.8.tmp"]


def test_the_cache_lies_in_out_where_data_cannot_be_written(recordings, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    assert cache_place(data, out, "k", recordings) == data / "latents-k"
    shutil.rmtree(data / "latents-k")
    (data / "latents-k").write_text("no folder can be made here")
    assert cache_place(data, out, "k", recordings) == out / "latents-k"
    assert cache_place(tmp_path / "nowhere", out, "k", recordings) == out / "latents-k"


def test_a_whole_cache_beside_read_only_recordings_is_used(recordings, tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    LatentsCache.build(recordings[:2], encode, data / "latents-k", "k")

    def refuse(path, *given, **named) -> None:
        raise OSError(30, "Read-only file system", str(path))

    for name in ("mkdir", "touch"):
        monkeypatch.setattr(Path, name, refuse)
    assert cache_place(data, out, "k", recordings[:2]) == data / "latents-k"
    assert cache_place(data, out, "k", recordings) == out / "latents-k", "one is missing"


def test_caches_of_autoencoders_that_are_gone_are_removed(recordings, tmp_path, capsys):
    data, mine, theirs = (tmp_path / name for name in ("data", "mine", "theirs"))
    for folder in (data, mine, theirs):
        folder.mkdir()

    def use(key: str, out: Path, given: list[Path] = recordings) -> Path:
        place = cache_place(data, out, key, given)
        drop_old(place, data, out, given)
        LatentsCache.build(given, encode, place, key)
        return place

    def there() -> list[str]:
        return sorted(path.name for path in data.glob("latents-*"))

    use("one", mine)
    use("one", theirs)
    use("two", mine)
    assert there() == ["latents-one", "latents-two"], "another training has it still"
    use("three", theirs)
    assert there() == ["latents-three", "latents-two"] and "latents-one" in capsys.readouterr().err
    shutil.rmtree(mine)
    use("four", theirs)
    assert there() == ["latents-four"], "nor is one needed of a training that is gone"
    (data / "latents-mine").mkdir()
    (data / "latents-mine" / "holiday.mp4").touch()
    record(data / "latents-walk", 0)
    place = use("five", theirs, recordings[:2])
    assert there() == ["latents-five", "latents-mine", "latents-walk"], "only caches are removed"
    assert len(list(place.glob("*.npz"))) == 2
    use("five", theirs, recordings[1:])
    assert len(list(place.glob("*.npz"))) == len(list(place.glob("*.npy"))) == 2, (
        "of recordings that are gone"
    )


def test_no_cache_and_bad_latents_are_told(recordings, tmp_path):
    with pytest.raises(UserError, match="no latents cache"):
        LatentsCache(tmp_path, "key")
    with pytest.raises(UserError, match="not finite"):
        LatentsCache.build(recordings, lambda frames: encode(frames) * 1e6, tmp_path, "key")
