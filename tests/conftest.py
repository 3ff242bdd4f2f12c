"""What every test gets: a seed, one thread, Triton's interpreter without a GPU, no window that pops up."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import WorldConfig

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before its import
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
torch.set_num_threads(1)  # tensors are tiny; a second thread costs more than it brings and shares the core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for each test, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def doom_config() -> WorldConfig:
    """A ViZDoom world with three keys and episodes of 24 frames, at the smallest size that ViZDoom draws."""
    pytest.importorskip("vizdoom")
    keys = {"forward": ["W"], "turn_left": ["Left"], "turn_right": ["Right"]}
    return WorldConfig("doom_gathering", "doom", "health_gathering", episode_frames=24, keys=keys)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of doom_gathering: tiny networks that learned nothing, with starts a and b, which come
    from the recording `walk` beside it; `startless.safetensors` is the same one without starts.
    """
    from engine.config import AutoencoderConfig, DenoiserConfig, ModelConfig, StateConfig
    from engine.data.recording import Recorder, Recording
    from engine.data.starts import STEPS, cut_start
    from engine.model.autoencoder import Autoencoder
    from engine.model.checkpoint import save_checkpoint
    from engine.model.networks import make_denoiser, make_states
    from engine.worlds.base import ActionSpace

    keys = {"forward": ["W", "Up"], "turn_left": ["Left"], "turn_right": ["Right"]}
    world = WorldConfig("doom_gathering", "doom", "health_gathering", keys=keys)
    small = {"conv_width": 8, "conv_in_layers": 1, "conv_out_layers": 1, "action_history": 4}
    denoiser = DenoiserConfig(32, 2, 32, context_frames=3, correction=0.8, **small)
    state = StateConfig(["x", "y", "angle"], ["position", "position", "angle"])
    model = ModelConfig(AutoencoderConfig(4, [8, 8, 12], 1), denoiser, state)
    torch.manual_seed(0)
    networks = {
        "autoencoder": Autoencoder(model.autoencoder),
        "states": make_states(model, world),
        "denoiser": make_denoiser(model, world),
    }
    places = torch.rand(200, 3) * torch.tensor([500, 300, 360.0])
    networks["states"].fit(places, torch.rand(200, 3).round(), torch.zeros(200, dtype=torch.bool))
    for weights in networks["denoiser"].parameters():
        # fresh ones may be zero: noise and keys would change nothing
        torch.nn.init.normal_(weights, std=0.04 if weights.ndim == 4 else 0.2)
    folder = tmp_path_factory.mktemp("checkpoint")
    frames = np.random.default_rng(0).integers(0, 255, (1, 6, 8, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    with Recorder(folder / "walk", world, "true", 0, lossless=True) as recorder:
        for number in range(30):
            moved = np.roll(frames[0], 4 * number, 1)
            told = {"x": 9.0 * number, "y": 40.0, "angle": 7.0 * number}
            recorder.add(moved, [number > 0, number % 3 == 1, 0], reset=number in (0, 20), state=told)
    walk, space = Recording(folder / "walk"), ActionSpace(tuple(keys), tuple(map(tuple, keys.values())))
    extras = {}
    for name, last in (("a", 12), ("b", 25)):
        start = cut_start(walk, last, space, 16, name)
        with torch.no_grad():
            pixels = torch.from_numpy(start.frames).permute(0, 3, 1, 2)
            latents = networks["autoencoder"].eval().encode(pixels)
        states = torch.tensor([[told[key] for key in state.names] for told in start.states])
        parts = {"latents": (latents * STEPS).round().clamp(-128, 127).to(torch.int8), "states": states}
        parts["actions"] = torch.from_numpy(start.actions).to(torch.uint8)
        extras |= {f"starts.{name}.{key}": value for key, value in parts.items()}
    save_checkpoint(folder / "tiny.safetensors", networks, model, world, extras)
    save_checkpoint(folder / "startless.safetensors", networks, model, world)
    return folder / "tiny.safetensors"


TOY = ("preset=toy", "device=cpu", "precision=fp32", "threads=1", "max_minutes=1000")
TOY_STAGES = ("autoencoder", "state", "denoiser", "distill", "decoder")


def run_training(*options: str) -> dict:
    """train.py's main() with these options and those of TOY → the figures on the last line of its output."""
    from engine.programs import train

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert train.main([*TOY, *options]) == 0
    return json.loads(said.getvalue().splitlines()[-1])


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of a true game, 800 frames."""
    pytest.importorskip("vizdoom")
    path = tmp_path_factory.mktemp("toy") / "data"
    figures = run_training("stage=collect", "world=doom_gathering", "frames=800", "workers=1", f"data={path}")
    assert figures["frames"] == 800
    return path


@pytest.fixture(scope="session")
def toy(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    """All stages in turn, at preset=toy → their folder and each one's figures. Write nothing there."""
    out = tmp_path_factory.mktemp("trained")
    return out, {
        stage: run_training(f"stage={stage}", f"data={toy_data}", f"out={out}") for stage in TOY_STAGES
    }


@pytest.fixture(scope="session")
def toy_checkpoint(toy: tuple[Path, dict]) -> Path:
    """What play plays of it."""
    return toy[0] / "decoder.safetensors"


@pytest.fixture
def real_display() -> Iterator[dict[str, str]]:
    """Environment for a subprocess that is to open a real window: a fresh X server, no dummy driver."""
    if not shutil.which("Xvfb"):
        pytest.skip("needs Xvfb")
    read, write = os.pipe()
    command = ["Xvfb", "-displayfd", str(write), "-screen", "0", "1024x768x24", "-nolisten", "tcp"]
    server = subprocess.Popen(command, pass_fds=[write], stderr=subprocess.DEVNULL)
    os.close(write)
    try:
        with os.fdopen(read) as line:
            number = line.readline().strip()  # the server writes it when it is ready; empty when it failed
        assert number, "Xvfb did not start"
        plain = {key: value for key, value in os.environ.items() if not key.startswith("SDL_VIDEO")}
        yield {**plain, "DISPLAY": f":{number}"}
    finally:
        server.terminate()
        server.wait(10)
