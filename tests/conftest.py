"""What every test gets: a seed, one thread, Triton's interpreter without a GPU, no window that pops up."""

from __future__ import annotations

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
    """A checkpoint of doom_gathering: tiny networks that learned nothing, with starts a and b beside it."""
    from engine.autoencoder import Autoencoder
    from engine.checkpoint import save_checkpoint
    from engine.config import AutoencoderConfig, DenoiserConfig, ModelConfig
    from engine.denoiser import Denoiser
    from engine.recording import Recorder, Recording
    from engine.starts import cut_start

    keys = {"forward": ["W", "Up"], "turn_left": ["Left"], "turn_right": ["Right"]}
    world = WorldConfig("doom_gathering", "doom", "health_gathering", keys=keys)
    small = AutoencoderConfig(4, [8, 8, 12], 1)
    window = {"window": 3, "recent": 3, "ladder": [0.5, 0.8, 1.0], "correction": 0.8}
    model = ModelConfig(small, DenoiserConfig(32, 2, 32, fine=8, stem=1, head=1, **window))
    torch.manual_seed(0)
    autoencoder = Autoencoder(small)
    denoiser = Denoiser(model.denoiser, len(keys), *small.latent_shape(world), autoencoder)
    for name, weights in denoiser.named_parameters():
        # fresh ones may be zero: noise and keys would change nothing
        small = weights.ndim == 4 and not name.startswith("motion")
        torch.nn.init.normal_(weights, std=0.04 if small else 0.2)
    folder = tmp_path_factory.mktemp("checkpoint")
    networks = {"autoencoder": autoencoder, "denoiser": denoiser}
    save_checkpoint(folder / "tiny.safetensors", networks, model, world)

    frames = np.random.default_rng(0).integers(0, 255, (1, 6, 8, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    with Recorder(folder / "walk", world, "true", 0, lossless=True) as recorder:
        for number in range(30):
            moved = np.roll(frames[0], 4 * number, 1)
            recorder.add(moved, [number > 0, number % 3 == 1, 0], reset=number in (0, 20))
    for name, frame in (("a", 12), ("b", 25)):
        cut_start(Recording(folder / "walk"), frame, folder / "starts" / "doom_gathering" / name)
    return folder / "tiny.safetensors"


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
