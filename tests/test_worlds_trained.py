"""Other worlds than Doom, from nothing to play: keys of their environment, short episodes, no state."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import TOY_STAGES, run_training

from engine.data.recording import Recording
from engine.model.checkpoint import Checkpoint
from engine.programs import play

WORLD = ("world=gym", "world.id=CartPole-v1")


@pytest.mark.slow
def test_a_gymnasium_world_is_trained_and_played(tmp_path, capsys):
    pytest.importorskip("gymnasium")
    pytest.importorskip("pygame")
    data, out = tmp_path / "data", tmp_path / "out"
    places = [*WORLD, f"data={data}", f"out={out}"]
    figures = run_training("stage=collect", "frames=300", "workers=1", *places)
    assert figures["frames"] == 300 and figures["episodes"] > 5, "a pole falls within a second or two"
    for stage in TOY_STAGES:
        figures = run_training(f"stage={stage}", "steps=4", *places)
        assert figures["stage"] == stage
    made = Checkpoint(out / "decoder.safetensors")
    assert list(made.world.keys) == ["action_0", "action_1"] and made.world.keys["action_0"] == ["Left", "A"]
    assert made.world.id == "CartPole-v1" and not made.model.state.names
    assert set(made.modules) == {"autoencoder", "denoiser"}
    options = [f"checkpoint={made.path}", "display=headless", "frames=8", "device=cpu", "precision=fp32"]
    capsys.readouterr()
    assert play.main([*options, "policy=random", f"record={tmp_path / 'r'}"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["frames"] == 8 and told["world"] == "gym" and told["start"] == "true game"
    recording = Recording(tmp_path / "r")
    assert recording.names == ("action_0", "action_1") and recording.states == [None] * 9
    assert recording.frames().std() > 0 and np.any(recording.actions)
