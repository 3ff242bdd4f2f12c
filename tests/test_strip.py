"""What the shipped network shows, as pictures: eight committed frames, so that a change of them is seen.

When a change is meant, or another network ships, this renews tests/shipped_strip.png; look at it:

    python tests/test_strip.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine.kernels import use

from engine.config import PlayConfig
from engine.data.picture import load_picture, save_picture
from engine.play.game import open_game

STRIP = Path(__file__).with_name("shipped_strip.png")
RENEW = "if that is meant, run `python tests/test_strip.py` and look at tests/shipped_strip.png"
HELD = 3 * [("forward",)] + 3 * [("forward", "turn_left")] + 2 * [("turn_right",)]


def shipped_strip() -> np.ndarray:
    """The default checkpoint's first start, seed 1, under HELD, without what differs between machines:
    float32 on the CPU, by the operations' definitions → uint8 (h, 8 w, 3).
    """
    with use("reference"):
        game = open_game(PlayConfig(device="cpu", precision="fp32", kernels="reference"))
        game.reset(1)
        frames = [game.step(game.action_space.encode(held)) for held in HELD]
    return np.concatenate(frames, 1)


def test_the_shipped_network_shows_what_it_showed() -> None:
    shown, kept = shipped_strip().astype(int), load_picture(STRIP).astype(int)
    assert shown.shape == kept.shape, f"the frames have another size; {RENEW}"
    off = np.abs(shown - kept)
    by_frame = np.stack(np.split(off, len(HELD), 1)).max((1, 2, 3))
    assert off.max() <= 1, f"the frames are off by {by_frame.tolist()} grey levels; {RENEW}"


@pytest.mark.parametrize("frame", range(1, len(HELD)))
def test_the_strip_is_of_a_game_that_goes_on(frame: int) -> None:
    """A strip of one still picture would show nothing."""
    frames = np.split(load_picture(STRIP).astype(int), len(HELD), 1)
    assert np.abs(frames[frame] - frames[frame - 1]).mean() > 1


if __name__ == "__main__":
    save_picture(STRIP, shipped_strip())
    print(f"{STRIP} shows the shipped network as it plays now.")
