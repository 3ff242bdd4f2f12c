"""Recordings played again: from wherever they began, in the same game and in another one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.config import PlayConfig, UserError, WorldConfig
from engine.data.collection import Job
from engine.data.collection import play as collect
from engine.data.recording import Recorder, Recording
from engine.model.checkpoint import Checkpoint
from engine.play.game import open_game
from engine.play.playthrough import Playthrough, check_policy
from engine.programs import play


def opened(config: PlayConfig) -> Playthrough:
    return Playthrough(config, open_game(config), check_policy(config.policy))


def dream(checkpoint: Path, **options) -> PlayConfig:
    return PlayConfig(checkpoint=str(checkpoint), device="cpu", precision="fp32", **options)


def frames_of(game: Playthrough) -> np.ndarray:
    """All frames of a replay, its first one among them."""
    seen = [game.frame]
    while not game.over:
        game.advance()
        seen.append(game.frame)
    game.close()
    return np.stack(seen)


def begun_in_mid_game(
    config: PlayConfig, directory: Path, frames: int, resets: tuple[int, ...]
) -> np.ndarray:
    """Records the second half of a game of so many frames → the frames recorded."""
    game, seen = opened(config), []
    for number in range(frames):
        if number == frames // 2:
            game.record(directory)
            seen.append(game.frame)
        game.reset() if number in resets else game.advance()
        seen.append(game.frame)
    game.close()
    return np.stack(seen[frames // 2 :])


def test_a_dream_recorded_from_mid_game_on_replays_frame_by_frame(tiny_checkpoint, tmp_path):
    """In its second game, from a start that is not the first; also what was recorded of the replay."""
    first, second = tmp_path / "first", tmp_path / "second"
    seen = begun_in_mid_game(dream(tiny_checkpoint, policy="random", seed=3, start="b"), first, 28, (5, 20))
    assert len(seen) == 15 and len(np.unique(seen.mean((1, 2, 3)))) == 15
    config = dream(tiny_checkpoint, policy=str(first), record=str(second))
    np.testing.assert_array_equal(frames_of(opened(config)), seen)
    np.testing.assert_array_equal(frames_of(opened(replace(config, policy=str(second), record=""))), seen)
    elsewhere = opened(dream(tiny_checkpoint, policy=str(first), start="a"))
    np.testing.assert_array_equal(elsewhere.frame, opened(dream(tiny_checkpoint)).frame, "as asked for")


def test_a_dream_replays_in_the_precision_that_it_was_drawn_in(tiny_checkpoint, tmp_path):
    """Which may be another than is measured here and now, unless one is asked for."""
    for precision in ("fp32", "bf16"):
        config = replace(dream(tiny_checkpoint, policy="random"), precision=precision)
        game = play.open_playthrough(replace(config, record=str(tmp_path / precision)))
        seen = [game.frame]
        for _ in range(4):
            game.advance()
            seen.append(game.frame)
        game.close()
        config = replace(config, policy=str(tmp_path / precision), precision="auto")
        again = play.open_playthrough(config)
        assert again.game.precision == precision
        np.testing.assert_array_equal(frames_of(again), np.stack(seen))
    other = play.open_playthrough(replace(config, precision="fp32"))
    assert other.game.precision == "fp32"
    other.close()


def test_a_true_game_recorded_from_mid_game_on_replays_frame_by_frame(doom_config, tmp_path):
    """Over the end of an episode, which is 24 frames long."""
    config = PlayConfig(game="true", world=doom_config, policy="random", seed=7)
    seen = begun_in_mid_game(config, tmp_path / "r", 70, ())
    assert Recording(tmp_path / "r").resets.tolist().count(True) == 2
    again = frames_of(opened(replace(config, policy=str(tmp_path / "r"), seed=0)))
    np.testing.assert_array_equal(again, seen)


def test_a_true_game_of_another_pace_is_told(tmp_path, capsys):
    pytest.importorskip("gymnasium")
    world = WorldConfig("gym", "gym", id="gym_games:Plain-v0", height=32, width=64, tics=1, fps=0)
    config = PlayConfig(game="true", world=world, policy="random", record=str(tmp_path / "r"))
    game = opened(config)
    for _ in range(3):
        game.advance()
    game.close()
    config = replace(config, policy=str(tmp_path / "r"), record="")
    opened(config).close()
    assert not capsys.readouterr().err
    opened(replace(config, world=replace(world, tics=3))).close()
    assert "r was recorded with tics 1: what is drawn here is not" in capsys.readouterr().err


def test_what_was_collected_replays_in_the_true_game(doom_config, tmp_path):
    collect(Job(doom_config, tmp_path / "r", 5, 1, 60, lossless=True))
    recording = Recording(tmp_path / "r")
    assert recording.resets.sum() == 3
    config = PlayConfig(game="true", world=doom_config, policy=str(tmp_path / "r"))
    np.testing.assert_array_equal(frames_of(opened(config)), recording.frames())


@pytest.fixture
def record(tmp_path, tiny_checkpoint):
    """Writes a true recording of noise, with these events at its resets."""

    def write(name: str, told: dict | None, **changes) -> Path:
        world = replace(Checkpoint(tiny_checkpoint).world, **changes)
        noise = np.random.default_rng(0).integers(0, 255, (20, world.height, world.width, 3), np.uint8)
        with Recorder(tmp_path / name, world, "true", 4, lossless=True) as recorder:
            for number, frame in enumerate(noise):
                reset = number in (0, 12)
                events = [{"reset": told}] if reset and told is not None else []
                held = [number % 2, 0, number % 5 == 1]
                recorder.add(frame, held[: len(world.keys)], reset=reset, events=events)
        return tmp_path / name

    return write


@pytest.mark.parametrize("told", [None, {"seed": 9, "start": "episode"}])
def test_a_true_recording_in_a_dream_starts_from_its_own_frames(told, record, tiny_checkpoint, capsys):
    recording = Recording(record("r", told))
    game = opened(dream(tiny_checkpoint, policy=str(recording.directory)))
    np.testing.assert_array_equal(game.frame, recording.frames(0, 1)[0])
    assert game.seed == (9 if told else 4)
    for number in range(1, 20):
        game.advance()
        np.testing.assert_array_equal(game.action, recording.actions[number] * (number != 12))
        same = np.array_equal(game.frame, recording.frames(number, number + 1)[0])
        assert same == (number == 12), "what lies between is drawn"
    assert game.over
    options = ["display=headless", "device=cpu", "precision=fp32", f"checkpoint={tiny_checkpoint}"]
    assert play.main([*options, f"policy={recording.directory}"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["frames"] == 18 and figures["start"] == f"{recording.directory}:12"


def test_a_dream_of_another_checkpoint_starts_from_its_own_frames(tiny_checkpoint, tmp_path):
    begun_in_mid_game(dream(tiny_checkpoint, policy="random", start="b"), tmp_path / "r", 8, ())
    startless = tiny_checkpoint.parent / "startless.safetensors"
    game = opened(dream(startless, policy=str(tmp_path / "r")))
    np.testing.assert_array_equal(game.frame, Recording(tmp_path / "r").frames(0, 1)[0])
    game.advance()
    assert game.frame.std() > 0


def test_a_recording_that_does_not_fit_is_refused_in_words(record, tiny_checkpoint, capsys):
    names = record("small", None, height=64, width=64), record("flying", None, keys={"fly": ["F"]})
    for path, word in zip(names, ("128x96", "fly"), strict=True):
        options = ["display=headless", "device=cpu", f"checkpoint={tiny_checkpoint}", f"policy={path}"]
        assert play.main(options) == 2
        out, err = capsys.readouterr()
        assert not out and word in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "told",
    [
        {"seed": "nine"},
        {"start": 3},
        {"held": 5},
        {"held": [["forward", 2]]},
        {"held": [[["forward"], -2]]},
        {"held": [[["forward"], 1.5]]},
        {"held": [[[1], 1]]},
        7,
    ],
)
def test_a_damaged_beginning_is_told(told, record, tiny_checkpoint):
    with pytest.raises(UserError, match="damaged at line 1"):
        opened(dream(tiny_checkpoint, policy=str(record("r", told))))
