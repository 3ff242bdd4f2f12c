"""The path from recordings to batches: alignment, borders, the cache's key, exact resuming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import UserError, WorldConfig
from engine.data.dataset import load_frames, split
from engine.data.latents import LatentsCache, laid_states
from engine.data.recording import Recorder, Recording
from engine.data.segments import Batches, Segments

NAMES = ("left", "right", "jump")
EPISODES = (23, 9, 40, 14)  # frames


def shade(action: np.ndarray) -> int:
    """The grey that an action causes in the test's world."""
    return 20 + 30 * int(action @ [1, 2, 4])


def record(
    directory: Path, seed: int, names: tuple[str, ...] = NAMES, episodes=EPISODES, states: bool = True
) -> Path:
    """A world whose frames show which keys caused them, and whose state tells their grey, their number and
    that in their episode; the keys change at every third frame or so.
    """
    world = WorldConfig(name="test", height=32, width=32, keys={name: [] for name in names})
    rng, total = np.random.default_rng(seed), 0
    with Recorder(directory, world, "true", seed, lossless=True) as recorder:
        for length in episodes:
            action = np.zeros(len(names), np.float32)
            for i in range(length):
                if i and rng.random() < 0.35:
                    action = rng.integers(0, 2, len(names)).astype(np.float32)
                held = np.array([action[names.index(name)] if name in names else 0 for name in NAMES])
                told = {"angle": float(shade(held)), "x": float(total), "y": float(i)} if states else None
                frame = np.full((32, 32, 3), shade(held), np.uint8)
                recorder.add(frame, action, reset=i == 0, t_ns=0, state=told)
                total += 1
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


def mismatches(latents: torch.Tensor, actions: torch.Tensor, lag: int) -> float:
    """Share of frames whose grey is not that of the action `lag` frames later."""
    grey = latents[:, :, 0, 0, 0].numpy()
    wanted = np.array([[shade(action) for action in row] for row in actions.numpy()])
    steps = grey.shape[1] - 2
    return float(np.mean(grey[:, 1:-1] != wanted[:, 1 + lag : 1 + lag + steps]))


def test_an_action_stands_beside_the_frame_it_caused(cache):
    latents, actions, _ = Segments(cache, 8, NAMES).batch(range(0, 100, 3))
    assert latents.shape == (34, 8, 3, 2, 2) and latents.dtype == torch.float32
    assert actions.shape == (34, 8, 3) and actions.dtype == torch.float32
    assert mismatches(latents, actions, 0) == 0
    assert mismatches(latents, actions, 1) > 0.1, "the check does not see actions that come a frame too early"
    assert mismatches(latents, actions, -1) > 0.1, "the check does not see actions that come a frame too late"


def test_frames_in_a_devices_memory_are_the_mapped_ones(cache):
    states = ("y", "angle")
    mapped, near = (Segments(cache, 8, NAMES, states, 5, near) for near in (None, torch.device("cpu")))
    places = np.random.default_rng(0).permutation(len(mapped))
    for there, here in zip(mapped.batch(places), near.batch(places), strict=True):
        assert there.dtype == here.dtype == torch.float32 and torch.equal(there, here)


def test_batches_keep_the_alignment(cache):
    latents, actions, _ = next(Batches(Segments(cache, 6, NAMES), 64, seed=5))
    assert mismatches(latents, actions, 0) == 0


@pytest.mark.parametrize("length", [1, 2, 9, 10, 40])
def test_segments_never_cross_a_border_and_none_is_missing(cache, length):
    segments = Segments(cache, length, NAMES)
    assert len(segments) == 3 * sum(max(0, episode - length + 1) for episode in EPISODES)
    starts = np.cumsum((0, *EPISODES))
    for _, start in segments.places:
        episode = np.searchsorted(starts, start, side="right") - 1
        assert start + length <= starts[episode + 1]


def test_no_segment_is_one_sentence(cache):
    with pytest.raises(UserError, match="41 frames"):
        Segments(cache, 41, NAMES)


def test_batches_resume_exactly(cache):
    segments = Segments(cache, 6, NAMES)
    stream = Batches(segments, 8, seed=3)
    first = [next(stream) for _ in range(5)]
    again = Batches(segments, 8, seed=3)
    again.position = 3
    for wanted, found in zip(first[3:], again, strict=False):
        assert torch.equal(wanted[0], found[0]) and torch.equal(wanted[1], found[1])
    assert stream.position == 5


def test_batches_differ_by_position_seed_and_rank(cache):
    segments = Segments(cache, 6, NAMES)
    drawn = {
        tuple(Batches(segments, 8, seed, rank, 2).indices(position).tolist())
        for seed in (0, 1)
        for rank in (0, 1)
        for position in (0, 1, 2)
    }
    assert len(drawn) == 12


def test_change_share(tmp_path):
    """One change in 200 frames: without the share most batches would not have it at all."""
    world = WorldConfig(name="test", height=32, width=32, keys={"go": []})
    with Recorder(tmp_path / "r", world, "true", 0) as recorder:
        for i in range(200):
            recorder.add(np.zeros((32, 32, 3), np.uint8), [float(i >= 100)], reset=i == 0)
    cache = LatentsCache.build([tmp_path / "r"], encode, tmp_path / "c", "k")
    segments = Segments(cache, 10, ("go",))
    for tail in (1, 3, 10):
        has = segments.changed(tail)
        for (_, start), found in zip(segments.places, has, strict=True):
            inside = range(max(start + 1, start + 10 - tail), start + 10)
            assert found == (100 in inside), (tail, start)
        chosen = Batches(segments, 16, 0, change_share=0.5, tail=tail).indices(0)
        assert has[chosen].sum() >= 8 and not has[chosen].all()
    still = Batches(segments, 16, 0, change_share=0.0).indices(0)
    assert segments.changed(10)[still].sum() < 8


def test_without_any_change_batches_still_come(tmp_path):
    record(tmp_path / "r", 0, names=("left",), episodes=(1, 1, 1))
    cache = LatentsCache.build([tmp_path / "r"], encode, tmp_path / "c", "k")
    assert next(Batches(Segments(cache, 1, NAMES), 4, 0))[0].shape == (4, 1, 3, 2, 2)


def test_actions_are_laid_out_by_name(recordings, tmp_path):
    other = record(tmp_path / "other", 9, names=("jump", "left"))
    cache = LatentsCache.build([recordings[0], other], encode, tmp_path / "c", "k")
    order = ("jump", "fly", "right", "left")
    segments = Segments(cache, 5, order)
    latents, actions, _ = segments.batch(range(len(segments)))
    assert not actions[:, :, 1].any()
    assert mismatches(latents, actions[:, :, [3, 2, 0]], 0) == 0
    with pytest.raises(UserError, match="right"):
        Segments(cache, 5, ("jump", "left"))


def test_split_is_stable():
    paths = [Path(f"/data/doom-{i:05d}") for i in range(200)]
    train, held = split(paths)
    assert sorted(train + held) == paths and 2 <= len(held) <= 20
    assert split(paths[::-1]) == (train, held)
    assert set(split(paths + [Path("/data/new")])[1]) >= set(held)
    assert split(paths[:1]) == (paths[:1], [])
    for count in (2, 3, 5):
        assert [len(part) for part in split(paths[:count], 0.0)] == [count - 1, 1]
    assert [len(part) for part in split(paths[:2], 1.0)] == [1, 1]


def test_load_frames_is_spread_out(recordings):
    frames = load_frames(recordings, 60, seed=0)
    assert frames.shape == (60, 3, 32, 32) and frames.dtype == torch.uint8
    assert torch.equal(frames, load_frames(recordings, 60, seed=0))
    assert not torch.equal(frames, load_frames(recordings, 60, seed=1))
    every = load_frames(recordings, 10_000, seed=0)
    assert len(every) == 3 * sum(EPISODES)
    assert len(every[:, 0, 0, 0].unique()) == 8
    with pytest.raises(UserError, match="no frame"):
        load_frames([], 5, 0)


# what lies in front, and states -------------------------------------------------------------------


@pytest.mark.parametrize("near", [None, torch.device("cpu")], ids=["mapped", "near"])
def test_actions_in_front_are_those_that_were_held_and_none_before_an_episode(cache, recordings, near):
    length, before = 7, 5
    segments = Segments(cache, length, NAMES, (), before, near)
    clip = segments.batch(range(len(segments)))
    assert clip.actions.shape == (len(segments), before + length, 3)
    plain = Segments(cache, length, NAMES).batch(range(len(segments)))
    assert torch.equal(clip.actions[:, before:], plain.actions), "action[t] stays beside frame t"
    opened = [Recording(path) for path in recordings]
    starts, outside, inside = np.cumsum((0, *EPISODES)), 0, 0
    for row, (number, start) in zip(clip.actions, segments.places, strict=True):
        begins = max(begin for begin in starts if begin <= start)
        for place in range(before):
            frame = start - before + place
            held = opened[number].actions[frame] if frame >= begins else np.zeros(3)
            assert row[place].tolist() == held.tolist(), (number, start, frame)
            outside, inside = outside + (frame < begins), inside + bool(np.any(held))
    assert outside > 100 and inside > 100


@pytest.mark.parametrize("near", [None, torch.device("cpu")], ids=["mapped", "near"])
def test_states_stand_beside_their_frames(cache, near):
    """The grey of a frame is its angle, its number in all is x; asked for in another order than recorded."""
    segments = Segments(cache, 6, NAMES, ("x", "angle"), 2, near)
    clip = segments.batch(range(len(segments)))
    assert clip.states.shape == (len(segments), 6, 2) and clip.states.dtype == torch.float32
    assert torch.equal(clip.states[..., 1], clip.latents[:, :, 0, 0, 0])
    numbers = torch.from_numpy(segments.places[:, 1:] + np.arange(6))
    assert torch.equal(clip.states[..., 0], numbers.float())
    assert Segments(cache, 6, NAMES).batch([0]).states.shape == (1, 6, 0)


def test_a_recording_without_states_has_none(recordings, tmp_path):
    """NaN throughout where one of the names is lacking; the others keep theirs, each in its own order."""
    silent = record(tmp_path / "silent", 9, states=False)
    cache = LatentsCache.build([recordings[0], silent], encode, tmp_path / "c", "k")
    for names, known in ((("x", "y"), True), (("x", "speed"), False)):
        segments = Segments(cache, 5, NAMES, names)
        states = segments.batch(range(len(segments))).states
        there = torch.from_numpy(segments.places[:, 0] == cache.directories.index(str(recordings[0])))
        assert there.any() and not there.all()
        assert states[there].isfinite().all() == known and states[~there].isnan().all()


def test_a_frame_without_state_is_not_made_up(tmp_path):
    world = WorldConfig(name="test", height=32, width=32, keys={"go": []})
    with Recorder(tmp_path / "r", world, "true", 0) as recorder:
        for i in range(6):
            told = {"angle": 5.0, "x": i / 2} if i != 3 else None
            recorder.add(np.zeros((32, 32, 3), np.uint8), [0], reset=i == 0, state=told)
    names, states = laid_states(Recording(tmp_path / "r"))
    assert set(names) == {"angle", "x"} and states.dtype == np.float32
    assert np.isnan(states).all(1).tolist() == [False] * 3 + [True] + [False] * 2
    assert states[:, names.index("x")][[0, 1, 2, 4, 5]].tolist() == [0, 0.5, 1, 2, 2.5]


def test_the_longest_episode_is_known(cache):
    assert cache.longest() == max(EPISODES)
