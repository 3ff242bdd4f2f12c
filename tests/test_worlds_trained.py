"""The README's loop for other worlds: collect, train, evaluate, pack, play, record, train on. On the command
line stand world= and places alone; what the world is like travels in recordings and checkpoints.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TOY, TOY_STAGES, run_training

from engine.config import WorldConfig
from engine.data.find import find_recordings
from engine.data.recording import Recording
from engine.evaluation import build_routes, stage
from engine.evaluation.section import QUICK
from engine.model.checkpoint import Checkpoint
from engine.programs import play, train

TINY = replace(
    QUICK, routes=2, returns=1, reference=64, minute=1.0, segment=0.3, steps=8, states=1, flips=1, idle=1.0
)  # fmt: skip
# world= → keys, frames a second, and what of it was chosen when it was collected
WORLDS = {
    "CartPole-v1": (["action_0", "action_1"], 25, ["world.tics=2"]),
    "gymnasium.envs.classic_control:Pendulum-v1": (["axis_0_minus", "axis_0_plus"], 30, []),
    "gym_games:Crane-v0": (None, 50, ["world.width=64", "world.height=64"]),
}


def played(capsys, *options: str) -> dict:
    """play.py's figures."""
    capsys.readouterr()
    assert play.main(["display=headless", "frames=8", "device=cpu", "precision=fp32", *options]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_the_loop_for_a_gymnasium_world(name, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gymnasium")
    pytest.importorskip("pygame")
    monkeypatch.setattr(stage, "QUICK", TINY)
    monkeypatch.setattr(build_routes, "TRIALS", 8)
    keys, fps, chosen = WORLDS[name]
    data, out = tmp_path / "data", tmp_path / "out"
    places = ["world=gym", f"data={data}", f"out={out}"]
    figures = run_training("stage=collect", *places, f"world.id={name}", *chosen, "frames=240", "workers=1")
    assert figures["frames"] == 240
    (recording,) = map(Recording, find_recordings(data))
    assert recording.fps == fps and list(recording.names) == (keys or list(recording.names))
    for number, one in enumerate(TOY_STAGES):
        given = [*places, f"world.id={name}"] if number % 2 else places  # either will do
        assert run_training(f"stage={one}", "steps=2", *given)["stage"] == one
    made = Checkpoint(out / "decoder.safetensors")
    assert made.world == WorldConfig(**recording.header["config"]) and made.world.id == name
    assert list(made.world.keys) == list(recording.names) and not made.model.state.names
    assert set(made.modules) == {"autoencoder", "denoiser"}

    given = ["stage=evaluate", "quick=true", "world=gym", f"data={data}", f"out={out}"]
    figures = run_training(*given, "frames=18")
    report = (out / "evaluation" / "report.md").read_text()
    assert np.isfinite([figures["psnr_1"], figures["frechet"], figures["fps_p50"]]).all()
    if name == "CartPole-v1":  # a pole falls within a second: what needs the true world is left out
        assert figures["held_out"] is False and "may have learned what it is measured on" in report
        assert report.count("its episodes end before a route of 64 frames does") == 4
        assert "psnr_1_of_recorded" in figures and "control_trials" not in figures
    else:
        assert "psnr_1_of_random" in figures and "held_out" not in figures

    small = tmp_path / "small.safetensors"
    run_training("stage=pack", f"checkpoint={made.path}", f"data={data}", f"out={small}")
    for path, start in ((made.path, "true game"), (small, "1")):
        session = tmp_path / f"dream of {path.stem}"
        told = played(capsys, f"checkpoint={path}", "policy=random", f"record={session}")
        assert told["frames"] == 8 and told["world"] == "gym" and told["start"] == start
        recording = Recording(session)
        assert recording.header["config"] == {**recording.header["config"], "id": name, "fps": fps}
        assert list(recording.names) == list(made.world.keys) and recording.states == [None] * 9
        assert recording.frames().std() > 0 and np.any(recording.actions)


@pytest.mark.slow
def test_the_loop_for_doom(toy, toy_data, tmp_path, capsys, monkeypatch):
    """The session's toy world is evaluated, packed, played, and trained on with one's own recording, in one
    command.
    """
    monkeypatch.setattr(stage, "QUICK", TINY)
    checkpoint, data = toy[0] / "decoder.safetensors", tmp_path / "data"
    figures = run_training(
        "stage=evaluate", "quick=true", f"checkpoint={checkpoint}", f"out={tmp_path}", "frames=18"
    )
    assert np.isfinite([figures["psnr_1"], figures["control_trials"], figures["fps_p50"]]).all()
    small = tmp_path / "small.safetensors"
    run_training("stage=pack", f"checkpoint={checkpoint}", f"data={toy_data}", f"out={small}")
    assert played(capsys, f"checkpoint={small}", "policy=random")["frames"] == 8
    told = played(capsys, "game=true", "policy=random", f"record={data / 'mine'}", "frames=60")
    assert told["game"] == "true"
    played(capsys, f"checkpoint={small}", "policy=random", f"record={data / 'dreamt'}", "frames=60")
    capsys.readouterr()
    figures = run_training(
        "stage=all", "steps=2", "frames=60", "workers=1", f"data={data}", f"out={tmp_path / 'out'}"
    )
    made = Checkpoint(figures["checkpoint"])
    assert made.world == Checkpoint(checkpoint).world and {"x", "y", "angle"} <= set(made.model.state.names)
    assert "1 of 3 recordings are of generated games and left out" in capsys.readouterr().err


@pytest.mark.slow
def test_one_command_for_a_world_that_is_not_named_twice(tmp_path, capsys):
    """stage=all takes up what lies in data=, and refuses another game without having collected anything."""
    pytest.importorskip("gymnasium")
    places = [f"data={tmp_path / 'data'}", f"out={tmp_path / 'out'}", "workers=1"]
    chosen = ["world=gym", "world.id=gym_games:Plain-v0", "world.width=64", "world.height=32", "world.tics=5"]
    run_training("stage=collect", "frames=80", *places, *chosen)
    figures = run_training("stage=all", "frames=120", "steps=1", *places)
    world = Checkpoint(figures["checkpoint"]).world
    assert (world.id, world.width, world.tics, world.fps) == ("gym_games:Plain-v0", 64, 5, 10)
    assert [len(Recording(path)) for path in find_recordings(tmp_path / "data")] == [120]
    for options in (
        ["world=doom_home"],
        ["world=gym", "world.id=CartPole-v1"],
        ["world=gym", "world.tics=1"],
    ):
        capsys.readouterr()
        assert train.main([*TOY, "stage=all", *places, *options]) == 2
        said = capsys.readouterr().err
        assert said.startswith("train.py: ") and "not of" in said and len(said.splitlines()) == 1
        assert len(find_recordings(tmp_path / "data")) == 1


@pytest.mark.slow
def test_a_trained_stage_is_not_gone_on_with_for_another_game(tmp_path, capsys):
    """The same out= with a folder of another world's recordings."""
    pytest.importorskip("gymnasium")
    size, one = (
        ["world.width=64", "world.height=32"],
        ["stage=autoencoder", "steps=1", f"out={tmp_path / 'out'}"],
    )
    for name in ("Plain", "Crane"):
        given = ["world=gym", f"world.id=gym_games:{name}-v0", f"data={tmp_path / name}", "workers=1"]
        run_training("stage=collect", "frames=20", *given, *size)
    run_training(*one, "world=gym", f"data={tmp_path / 'Plain'}")
    capsys.readouterr()
    assert train.main([*TOY, *one, "world=gym", f"data={Path(tmp_path) / 'Crane'}"]) == 2
    assert "world.id was gym_games:Plain-v0 and is gym_games:Crane-v0" in capsys.readouterr().err
