"""What every test gets: a seed, one thread, Triton's interpreter without a GPU, no window that pops up."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator

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
