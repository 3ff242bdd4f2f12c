"""stage=evaluate: each figure on pictures whose answer is known, and the whole stage on a tiny network."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from engine import evaluation
from engine.config import TrainConfig, UserError, load_config
from engine.dataset import split
from engine.evaluation import Clips, evaluate, horizontal_flow, motion, psnr, sharpness, turning
from engine.picture import load_picture
from engine.recording import Recorder, Recording, find_recordings
from engine.session import Player

WIDE = (
    np.random.default_rng(0).integers(0, 255, (12, 60, 3), np.uint8).repeat(8, 0).repeat(8, 1)
)  # (96, 480, 3)


def view(place: int) -> np.ndarray:
    """What is seen of a wide landscape from `place` pixels to the right of its left edge → (96, 128, 3)."""
    return np.roll(WIDE, -place, 1)[:, :128]


@pytest.mark.parametrize("shift", [-9, -1, 1, 4, 16])
def test_flow_is_the_shift_of_the_picture(shift):
    assert horizontal_flow(view(100), view(100 - shift)) == shift


def test_flow_of_what_does_not_move_or_shows_nothing_is_zero():
    assert horizontal_flow(view(50), view(50)) == 0
    wall = np.full((96, 128, 3), 90, np.uint8)
    assert horizontal_flow(wall, wall) == 0 and horizontal_flow(view(50), wall) == 0


def test_psnr_sharpness_and_motion_of_known_pictures():
    grey = np.full((2, 96, 128, 3), 100, np.uint8)
    assert psnr(grey, grey + 10) == pytest.approx(20 * np.log10(25.5))
    assert sharpness(grey) == motion(grey) == 0
    stripes = grey.copy()
    stripes[:, ::2] += 10
    assert sharpness(stripes) == pytest.approx(10)
    assert motion(np.stack([grey[0], grey[0] + 7, grey[0]])) == 7


@pytest.fixture
def player(tiny_checkpoint) -> Player:
    return Player(tiny_checkpoint, "cpu", "fp32")


@pytest.fixture
def turns(player, tmp_path):
    """A recording that turns left (the picture moves right by 5 a frame), right and rests, 12 frames each."""
    place, way = 200, 0
    with Recorder(tmp_path / "data" / "turns", player.world, "true", 0, lossless=True) as recorder:
        for number in range(240):
            way = (1, 0, -1, 0)[number // 12 % 4] if number else 0  # 1: left
            place -= 5 * way
            recorder.add(view(place), [0, way == 1, way == -1], reset=number == 0, t_ns=number)
    return tmp_path / "data"


@pytest.mark.parametrize("obeys, share", [(1, 1.0), (-1, 0.0), (0, 0.0)])
def test_turning_tells_obedience_from_defiance(player, turns, monkeypatch, obeys, share):
    """A world that turns as told, the wrong way, or not at all, in place of the network."""

    def roll(player, frames, actions, seed):
        start = player.denoiser.config.sink + player.denoiser.config.recent
        wide = np.concatenate([frames[:, start - 1]] * 3, 2)
        made = []
        for number in range(start, actions.shape[1]):
            way = (actions[:, start : number + 1, 1] - actions[:, start : number + 1, 2]).sum(1).int()
            made.append(
                [np.roll(w, 5 * obeys * int(n), 1)[:, 128:256] for w, n in zip(wide, way, strict=True)]
            )
        return np.stack(made, 1)

    monkeypatch.setattr(evaluation, "roll", roll)
    figures = turning(player, Clips([Recording(turns / "turns")], player), 0)
    assert figures["turn_trials"] >= 8
    assert figures["turn_obeyed"] == figures["turn_obeyed_within_2"] == share


def test_the_whole_stage(tiny_checkpoint, turns, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "CLIPS", 4)
    monkeypatch.setattr(evaluation, "TRIALS", 5)
    options = [
        f"checkpoint={tiny_checkpoint}",
        f"data={turns}",
        f"out={tmp_path}/out",
        "frames=20",
        "device=cpu",
    ]
    config = load_config("train", TrainConfig, ["stage=evaluate", "precision=fp32", *options])
    figures = evaluate(config)
    assert json.loads((tmp_path / "out" / "evaluation" / "figures.json").read_text()) == figures
    names = {
        "psnr@1",
        "psnr@16",
        "psnr@64",
        "psnr@1_moving",
        "psnr@1_moved",
        "sharpness_autoencoder",
        "sharpness@64",
        "turn_obeyed",
        "spin_motion_last",
        "idle_motion_woken",
    }
    assert (
        names <= set(figures) and np.isfinite([v for v in figures.values() if not isinstance(v, str)]).all()
    )
    for name in ("rollout", "endurance"):
        assert load_picture(tmp_path / "out" / "evaluation" / f"{name}.png").std() > 5
    timings = {"step_ms_p50", "step_ms_p99"}
    assert {k: v for k, v in evaluate(config).items() if k not in timings} == {
        k: v for k, v in figures.items() if k not in timings
    }, "two runs agree"


@pytest.mark.parametrize("unseen, names", [(False, {"b"}), (True, {"a", "b"})])
def test_recordings_that_are_new_to_the_network_are_all_used(
    unseen, names, tiny_checkpoint, turns, tmp_path, monkeypatch
):
    (turns / "turns").rename(turns / "a")
    shutil.copytree(turns / "a", turns / "b")
    assert [path.name for path in split(find_recordings(turns))[1]] == ["b"]
    seen = set()

    def fidelity(player, clips, report, seed):
        seen.update(recording.directory.name for recording in clips.recordings)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "fidelity", fidelity)
    options = [f"checkpoint={tiny_checkpoint}", f"data={turns}", f"out={tmp_path}", f"unseen={unseen}"]
    with pytest.raises(KeyboardInterrupt):
        evaluate(load_config("train", TrainConfig, ["stage=evaluate", "precision=fp32", *options]))
    assert seen == names


def test_a_recording_with_other_keys_is_refused(player, tmp_path):
    other = replace(player.world, keys={"jump": ["Space"]})
    with Recorder(tmp_path / "jumps", other, "true", 0) as recorder:
        recorder.add(view(0), [0], reset=True, t_ns=0)
    with pytest.raises(UserError, match="other keys"):
        Clips([Recording(tmp_path / "jumps")], player)
