"""What a step may cost: the promise to the weakest machine, counted, not timed."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.config import ModelConfig, StateConfig, WorldConfig
from engine.model.autoencoder import Autoencoder
from engine.model.networks import make_denoiser, make_states
from engine.model.world_model import Generator
from engine.rollout.rollout import Rollout

DOOM = {
    "x": "position", "y": "position", "angle": "angle", "eye": "scalar", "vx": "velocity", "vy": "velocity",
    "health": "scalar",
}  # fmt: skip


@torch.inference_mode()
def test_a_step_fits_two_slow_cores():
    """Of the networks as configs make them by default, with the latents that all presets have: products and
    convolutions of a step with its picture, and how many more there are after a change of keys.
    """
    model = ModelConfig(state=StateConfig(list(DOOM), list(DOOM.values()), ["health"]))
    model.autoencoder.channels = 16
    world = WorldConfig(keys={key: [key] for key in "abcdef"})
    autoencoder = Autoencoder(model.autoencoder).eval()
    rollout = Rollout(Generator(make_denoiser(model, world).eval(), make_states(model, world)))
    shape, frames = model.autoencoder.latent_shape(world), rollout.start_frames
    states, nothing = torch.ones(1, frames, len(DOOM)), torch.zeros(1, frames, 6)
    rollout.reset(torch.randn(1, frames, *shape), nothing, torch.zeros(1, dtype=torch.int64), states)
    rollout.step(nothing[:, 0])

    def cost(keys: torch.Tensor, renoise: bool) -> float:
        """GFLOP of a step, a product and a sum being two, with its picture."""
        with FlopCounterMode(display=False) as counter:
            autoencoder.decode(rollout.step(keys, renoise=renoise))
        return counter.get_total_flops() / 1e9

    plain = cost(nothing[:, 0], False)
    corrected = cost(torch.ones(1, 6), True)
    assert 0.5 < plain <= 2.0, f"{plain:.2f} GFLOP a step"
    assert 0.1 < corrected - plain <= 0.36, f"{corrected - plain:.2f} GFLOP more when keys change"
