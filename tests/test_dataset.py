"""Which recordings are trained on: those of the true world that is wanted, and no others without a word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.config import UserError, WorldConfig
from engine.data.dataset import true_recordings
from engine.data.recording import Recorder, Recording
from engine.data.starts import load_start
from engine.worlds.base import ActionSpace

YARD = WorldConfig("yard", height=32, width=64, keys={"go": ["W"]})
KINDS = {"x": "position", "y": "position"}


def record(where: Path, world: WorldConfig = YARD, source: str = "true") -> Path:
    """Three frames that tell where they are."""
    with Recorder(where, world, source, 0, state_kinds=KINDS) as recorder:
        for number in range(3):
            frame = np.full((world.height, world.width, 3), number, np.uint8)
            recorder.add(frame, [1.0], reset=number == 0, state={"x": 1.0 * number, "y": 5.0})
    return where


def test_what_a_network_drew_is_left_out(tmp_path, capsys) -> None:
    true = [record(tmp_path / name) for name in ("a", "b")]
    record(tmp_path / "c", source="dream")
    train, held_out = true_recordings(str(tmp_path), YARD)
    assert sorted(train + held_out) == true and len(train) == len(held_out) == 1
    assert "1 of 3 recordings" in capsys.readouterr().err


def test_dreams_alone_teach_nothing(tmp_path) -> None:
    record(tmp_path / "a", source="dream")
    with pytest.raises(UserError, match="generated games"):
        true_recordings(str(tmp_path), YARD)


@pytest.mark.parametrize(
    "world, said",
    [
        (replace(YARD, name="meadow"), "of meadow, not of yard"),
        (replace(YARD, height=64), "of 64x64, not of 64x32"),
    ],
)
def test_another_world_is_refused(tmp_path, world, said) -> None:
    record(tmp_path / "a")
    record(tmp_path / "b", world)
    with pytest.raises(UserError, match=said):
        true_recordings(str(tmp_path), YARD)


def test_another_environment_is_refused(tmp_path) -> None:
    """All Gymnasium games are of the world gym."""
    cart, car = (WorldConfig("gym", "gym", id=name, height=32, width=64) for name in ("Cart-v1", "Car-v0"))
    for number, world in enumerate((cart, car)):
        with Recorder(tmp_path / str(number), world, "true", 0, names=("go",)) as recorder:
            recorder.add(np.zeros((32, 64, 3), np.uint8), [1.0], reset=True)
    with pytest.raises(UserError, match="of Car-v0, not of Cart-v1"):
        true_recordings(str(tmp_path), cart)


def test_a_start_brings_its_state_into_its_own_world_alone(tmp_path) -> None:
    """x and y of another map are places of another map."""
    where, space = str(record(tmp_path / "a")), ActionSpace(("go",), (("W",),))
    own = load_start(f"{where}:2", space, {}, 16, YARD)
    assert own.states == Recording(where).states and own.states[2] == {"x": 2.0, "y": 5.0}
    foreign = load_start(f"{where}:2", space, {}, 16, replace(YARD, name="meadow"))
    assert foreign.states is None and np.array_equal(foreign.frames, own.frames)
