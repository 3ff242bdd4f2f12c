"""stage=pack: small, near to what was trained, nothing overwritten."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from engine.config import ModelConfig, TrainConfig, UserError, WorldConfig
from engine.data.dataset import true_recordings
from engine.data.recording import Recorder, Recording
from engine.data.starts import STEPS, packed_starts
from engine.model import packing
from engine.model.checkpoint import Checkpoint, save_checkpoint
from engine.model.networks import load_autoencoder
from engine.programs import train


class Net(nn.Module):
    """Of every kind of weight one that is large and one that is small."""

    def __init__(self):
        super().__init__()
        self.large, self.small = nn.Linear(128, 96), nn.Linear(8, 8)
        self.conv, self.norm = nn.Conv2d(16, 24, 5), nn.BatchNorm2d(24)


def networks(seed: int) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    return {"states": Net(), "other": Net()}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "starts_of", lambda config, source: {"starts.1.frame": torch.ones(2, 2)})
    modules = networks(0)
    with torch.no_grad():
        modules["other"].large.weight[5] = 0
        modules["other"].conv.weight[3] *= 1000  # a channel of its own scale
    extras = {"frames": torch.randint(256, (2, 4, 4, 3), dtype=torch.uint8), "state": torch.rand(5, 3)}
    world = WorldConfig("hall", keys={"go": ["W"]})
    path = tmp_path / "trained.safetensors"
    save_checkpoint(path, modules, ModelConfig(), world, extras, minutes=3)
    return modules, extras, path


def run(capsys, *options: str) -> tuple[int, str, str]:
    code = train.main(["stage=pack", *options])
    return code, *capsys.readouterr()


def test_it_is_small_and_near_to_what_was_trained(trained, tmp_path, capsys):
    modules, extras, path = trained
    code, out, _ = run(capsys, f"checkpoint={path}", f"out={tmp_path}/ship")
    assert code == 0
    told = json.loads(out.splitlines()[-1])
    packed = Checkpoint(tmp_path / "ship" / "hall.safetensors")
    assert told["checkpoint"] == str(packed.path)
    assert told["megabytes"] == pytest.approx(packed.path.stat().st_size / 1e6, abs=1e-3)
    assert packed.about["card"]["world"] == "hall" and packed.about["minutes"] == 3
    assert packed.about["packed_from"] == Checkpoint(path).digest()
    worst = 0.0
    for name, module in networks(1).items():
        packed.load_into(name, module)
        for key, value in module.state_dict().items():
            true = modules[name].state_dict()[key]
            assert value.dtype == true.dtype
            if value.ndim < 2:
                assert torch.equal(value, true), (name, key)
                continue
            error = float((value - true).norm() / true.norm())
            worst = max(worst, error)
            assert 0 < error < (5e-4 if name == "states" or "small" in key else 0.01), (name, key, error)
        if name == "other":
            weight = module.conv.weight.flatten(1)
            true = modules[name].conv.weight.flatten(1)
            assert ((weight - true).norm(dim=1) < 0.01 * true.norm(dim=1)).all(), "each channel for itself"
            assert not module.large.weight[5].any() and module.large.weight[4].any()
    assert told["error"] == pytest.approx(worst, abs=1e-5) and told["matrix"].startswith("other.")
    for name, value in (extras | {"starts.1.frame": torch.ones(2, 2)}).items():
        assert torch.equal(packed.extras[name], value) and packed.extras[name].dtype == value.dtype
    sizes = [sum(p.numel() for p in module.parameters()) for module in modules.values()]
    assert packed.path.stat().st_size < 2.1 * sizes[0] + 1.2 * sizes[1] + 6000


def test_nothing_is_overwritten_unless_told(trained, tmp_path, capsys):
    _, _, path = trained
    target = tmp_path / "ship.safetensors"
    target.write_bytes(b"somebody's")
    code, out, err = run(capsys, f"checkpoint={path}", f"out={target}")
    assert code == 2 and not out and "again=true" in err and target.read_bytes() == b"somebody's"
    assert run(capsys, f"checkpoint={path}", f"out={target}", "again=true")[0] == 0
    before = path.read_bytes()
    code, _, err = run(capsys, f"checkpoint={path}", f"out={path}", "again=true")
    assert code == 2 and path.read_bytes() == before
    code, _, err = run(capsys, f"checkpoint={target}", f"out={tmp_path}/twice.safetensors")
    assert code == 2 and "packed already" in err and not (tmp_path / "twice.safetensors").exists()


def test_it_needs_a_checkpoint(tmp_path, capsys):
    code, _, err = run(capsys, f"out={tmp_path}")
    assert code == 2 and "checkpoint=FILE" in err
    code, _, err = run(capsys, f"checkpoint={tmp_path}/none.safetensors", f"out={tmp_path}")
    assert code == 2 and "no checkpoint" in err


# where games start ---------------------------------------------------------------------------------


def packed_with(tiny_checkpoint, out, **options) -> dict:
    """The starts of a file that is packed with these options, by name."""
    checkpoint = str(tiny_checkpoint.parent / "startless.safetensors")
    config = TrainConfig("pack", checkpoint=checkpoint, out=str(out / "small.safetensors"), **options)
    small = Checkpoint(packing.pack(config)["checkpoint"])
    return packed_starts(small.extras, small.model, small.world)


def write(directory, world: WorldConfig, frames: int, held: str = "", episode: int = 100) -> None:
    with Recorder(directory, world, "true", 0) as recorder:
        for number in range(frames):
            action = [float(name == held) for name in world.keys]
            recorder.add(
                np.zeros((world.height, world.width, 3), np.uint8), action, reset=number % episode == 0
            )


def test_of_a_single_recording_come_the_starts(tiny_checkpoint, tmp_path):
    """Four frames each, as many as the model knows of, in the middle of episodes."""
    walk = Recording(tiny_checkpoint.parent / "walk")
    starts = packed_with(tiny_checkpoint, tmp_path, data=str(walk.directory))
    assert list(starts) == ["1", "2", "3", "4"]
    autoencoder = load_autoencoder(Checkpoint(tiny_checkpoint)).eval()
    for start, last in zip(starts.values(), (8, 12, 16, 28), strict=True):
        pixels = torch.from_numpy(walk.frames(last - 3, last + 1)).permute(0, 3, 1, 2)
        with torch.no_grad():
            torch.testing.assert_close(start.latents, autoencoder.encode(pixels), rtol=0, atol=0.5 / STEPS)
        np.testing.assert_array_equal(start.actions, walk.actions[last - 3 : last + 1])
        assert start.states == walk.states[last - 3 : last + 1] and len(start.latents) == 4


def test_a_named_start_and_one_of_short_episodes(tiny_checkpoint, tmp_path):
    walk = Recording(tiny_checkpoint.parent / "walk")
    (start,) = packed_with(tiny_checkpoint, tmp_path, starts=[f"{walk.directory}:21"]).values()
    assert start.states == walk.states[20:22], "the episode began at 20"
    world = Checkpoint(tiny_checkpoint).world
    write(tmp_path / "data" / "r", world, 6, episode=3)
    starts = packed_with(tiny_checkpoint, tmp_path, data=str(tmp_path / "data"), again=True)
    assert [len(start.latents) for start in starts.values()] == [3, 3]


@pytest.mark.parametrize(
    "choice, said",
    [
        ("walk", "DIR:FRAME"),
        ("walk:30", "no frame 30"),
        ("nowhere:3", "nowhere"),
        ("flying:3", "the key fly"),
        ("small:3", "64x32, doom_gathering of 128x96"),
        ("empty:0", "0 frames"),
    ],
)
def test_a_start_that_does_not_fit_is_one_sentence(choice, said, tiny_checkpoint, tmp_path):
    keys = {"forward": ["W"], "fly": ["F"]}
    write(tmp_path / "flying", WorldConfig(keys=keys), 5, "fly")
    write(tmp_path / "small", WorldConfig(keys=keys, height=32, width=64), 5, "forward")
    write(tmp_path / "empty", WorldConfig(keys=keys), 0)
    folder = tiny_checkpoint.parent if choice.startswith("walk") else tmp_path
    with pytest.raises(UserError, match=said) as caught:
        packed_with(tiny_checkpoint, tmp_path, starts=[f"{folder}/{choice}"])
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*.safetensors"))


def test_recordings_without_a_frame_are_told(tiny_checkpoint, tmp_path):
    write(tmp_path / "data" / "r", WorldConfig(keys={"forward": ["W"]}), 0)
    with pytest.raises(UserError, match="no frame to start from"):
        packed_with(tiny_checkpoint, tmp_path, data=str(tmp_path / "data"))


def test_unnamed_starts_come_from_held_out_recordings_of_the_true_world(tiny_checkpoint, tmp_path):
    """What a network drew is no truth, nor does it move what was held out."""
    world, data = Checkpoint(tiny_checkpoint).world, tmp_path / "data"
    for name, frames in (("a", 3), ("b", 4)):
        write(data / name, world, frames)
    (held_out,) = true_recordings(str(data), world)[1]
    for number in range(8):
        with Recorder(data / f"dream{number}", world, "dream", 0) as recorder:
            recorder.add(np.full((96, 128, 3), 200, np.uint8), [0, 0, 0], reset=True)
    (start,) = packed_with(tiny_checkpoint, tmp_path, data=str(data)).values()
    assert len(start.latents) == len(Recording(held_out))
    write(data / "c", replace(world, fps=35.0), 3)
    with pytest.raises(UserError, match="c is of 35 frames a second"):
        packed_with(tiny_checkpoint, tmp_path, data=str(data), again=True)


def test_a_start_of_another_environment_is_refused(tiny_checkpoint, tmp_path):
    car = WorldConfig("gym", "gym", id="Car-v0", fps=17.5, keys={"forward": ["W"]})
    write(tmp_path / "car", car, 3)
    with pytest.raises(UserError, match="car is a recording of Car-v0, and this game is doom_gathering"):
        packed_with(tiny_checkpoint, tmp_path, starts=[f"{tmp_path}/car:2"])
