"""The autoencoder on real frames: shapes and types, unit latents, learning, each frame alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.autoencoder import Autoencoder, decode_clip, encode_clip, to_float
from engine.config import AutoencoderConfig, UserError

TINY = AutoencoderConfig(channels=6, widths=[8, 12, 16, 24], depth=2)


@pytest.fixture
def frames(doom_config) -> Tensor:
    """Eight different frames of a true game, uint8 (n, 3, h, w)."""
    from engine.worlds import make_world

    world, seen = make_world(doom_config), []
    try:
        for seed in range(2):
            seen.append(world.reset(seed).copy())
            for step in range(15):
                seen.append(world.step(np.array([1, step % 5 < 3, step % 7 > 4], np.float32)).copy())
    finally:
        world.close()
    picked = torch.from_numpy(np.stack(seen)[::4]).permute(0, 3, 1, 2).contiguous()
    assert picked.shape == (8, 3, 96, 128) and picked.dtype == torch.uint8
    return picked


def make(config: AutoencoderConfig = TINY) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(config)


def train(autoencoder: Autoencoder, batch: Callable[[], Tensor], steps: int) -> list[float]:
    optimiser = torch.optim.AdamW(autoencoder.train().parameters(), lr=4e-3)
    losses = []
    for _ in range(steps):
        loss, _ = autoencoder(batch())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def psnr(frames: Tensor, made: Tensor) -> float:
    return 10 * torch.log10(255**2 / (frames.float() - made.float()).square().mean()).item()


def test_shapes_and_types():
    autoencoder, pixels = make().eval(), torch.randint(256, (3, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        latents = autoencoder.encode(pixels)
        frames = autoencoder.decode(latents)
    assert latents.shape == (3, 6, 4, 6) and latents.dtype == torch.float32
    assert frames.shape == pixels.shape and frames.dtype == torch.uint8
    loss, logs = autoencoder(pixels)
    assert loss.ndim == 0 and loss.requires_grad and not logs["psnr"].requires_grad


def test_to_float_covers_the_range():
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_decode_clips_to_what_a_screen_shows():
    """Any float becomes the nearest of 256 values; nothing wraps around."""
    autoencoder = make()
    wild = torch.tensor([-9.0, -1.0, -0.996, 0.0, 0.999, 1.0, 1.001, 9.0])
    autoencoder.decoder = torch.nn.Identity()
    made = autoencoder.decode(wild[None, :, None, None]).flatten()
    assert made.tolist() == [0, 0, 1, 128, 255, 255, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)[None, :, None, None]
    assert torch.equal(autoencoder.decode(to_float(every)), every)


def test_it_learns_real_frames(frames):
    autoencoder = make()
    losses = train(autoencoder, lambda: frames, 60)
    first, last = losses[0], sum(losses[-5:]) / 5
    assert last < 0.7 * first, f"loss {first:.3f} → {last:.3f}"
    with torch.no_grad():
        autoencoder.standard.momentum = None  # a plain mean: 60 steps are too few for the moving one
        autoencoder.standard.reset_running_stats()
        trained = autoencoder.encode(frames).transpose(0, 1).flatten(1)  # (c, n)
        assert trained.mean(1).abs().max() < 1e-3 and (trained.var(1) - 1).abs().max() < 0.01
        autoencoder.eval()
        played = autoencoder.encode(frames).transpose(0, 1).flatten(1)
        assert (trained - played).abs().max() < 0.02, "play sees the latents of training"
        made = autoencoder.decode(autoencoder.encode(frames))
    flat = frames.float().mean((0, 2, 3), keepdim=True).expand_as(frames)
    assert psnr(frames, made) > psnr(frames, flat) + 2, "better than one colour"
    others = made.roll(3, 0)
    assert psnr(frames, made) > psnr(frames, others) + 1, "each frame is its own"


@torch.no_grad()
def test_each_frame_alone(frames):
    """A frame's latents in play do not depend on the frames beside it, nor its picture on other latents."""
    autoencoder = make().eval()
    latents = autoencoder.encode(frames)
    for i in (0, 5, 7):
        alone = autoencoder.encode(frames[i : i + 1])
        assert torch.allclose(alone, latents[i : i + 1], atol=1e-4)
        both = autoencoder.decode(latents)[i].int() - autoencoder.decode(alone)[0].int()
        assert both.abs().max() <= 1


@torch.no_grad()
def test_clips_keep_their_order(frames):
    autoencoder = make().eval()
    clip = frames.unflatten(0, (2, 4))
    latents = encode_clip(autoencoder, clip)
    assert latents.shape == (2, 4, 6, 6, 8)
    assert torch.allclose(latents[1, 2], autoencoder.encode(frames[6:7])[0], atol=1e-4)
    made = decode_clip(autoencoder, latents)
    assert made.shape == clip.shape and made.dtype == torch.uint8
    assert (made[0, 1].int() - autoencoder.decode(latents[0, 1:2])[0].int()).abs().max() <= 1


def test_latent_noise_is_part_of_the_loss(frames):
    autoencoder = make().train()
    loss = [autoencoder(frames[:4])[0].item() for _ in range(2)]
    assert loss[0] != loss[1]
    autoencoder.latent_noise = 0.0
    assert autoencoder(frames[:4])[0].item() == autoencoder(frames[:4])[0].item()


def test_it_needs_four_widths():
    with pytest.raises((ValueError, UserError), match="4"):
        make(AutoencoderConfig(channels=6, widths=[8, 12, 16]))
