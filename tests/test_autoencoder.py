"""The autoencoder on real frames: shapes and types, unit latents, learning, each frame alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import AutoencoderConfig, ModelConfig, TrainConfig, WorldConfig
from engine.data.recording import Recorder
from engine.model.autoencoder import Autoencoder, decode_clip, to_float
from engine.stage_config import AutoencoderStageConfig
from engine.train.autoencoder import AutoencoderLoss, AutoencoderStage, random_crops, zoom

TINY = AutoencoderConfig(channels=6, widths=[8, 12, 16], depth=2)  # a factor of 8


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


def learned(autoencoder: Autoencoder, **changes) -> AutoencoderLoss:
    """The loss by which it is trained."""
    return AutoencoderLoss(autoencoder, AutoencoderStageConfig(**changes)).train()


def train(autoencoder: Autoencoder, batch: Callable[[], Tensor], steps: int) -> list[float]:
    learning = learned(autoencoder)
    optimiser = torch.optim.AdamW(learning.parameters(), lr=4e-3)
    losses = []
    for _ in range(steps):
        loss, _ = learning(batch())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def psnr(frames: Tensor, made: Tensor) -> float:
    return 10 * torch.log10(255**2 / (frames.float() - made.float()).square().mean()).item()


@pytest.mark.parametrize("widths, factor", [([8, 12], 4), ([8, 12, 16], 8), ([8, 12, 16, 24], 16)])
def test_shapes_and_types(widths, factor):
    """Every width halves the resolution."""
    config = AutoencoderConfig(channels=6, widths=widths, depth=2)
    autoencoder, pixels = make(config).eval(), torch.randint(256, (3, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        latents = autoencoder.encode(pixels)
        frames = autoencoder.decode(latents)
    assert latents.shape == (3, 6, 64 // factor, 96 // factor) and latents.dtype == torch.float32
    assert latents.shape[1:] == config.latent_shape(WorldConfig(height=64, width=96))
    assert frames.shape == pixels.shape and frames.dtype == torch.uint8
    loss, logs = learned(autoencoder)(pixels)
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


@pytest.mark.slow
def test_it_learns_real_frames(frames):
    autoencoder = make()
    losses = train(autoencoder, lambda: frames, 60)
    first, last = losses[0], sum(losses[-5:]) / 5
    assert last < 0.7 * first, f"loss {first:.3f} → {last:.3f}"
    with torch.no_grad():
        autoencoder.standard.momentum = None  # a plain mean: 60 steps are too few for the moving one
        autoencoder.standard.reset_running_stats()
        trained = autoencoder.encode(frames)
        assert trained.mean().abs() < 1e-3 and (trained.var() - 1).abs() < 0.01
        autoencoder.eval()
        assert (trained - autoencoder.encode(frames)).abs().max() < 0.02, "play sees the latents of training"
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
    latents = autoencoder.encode(frames).unflatten(0, (2, 4))
    assert latents.shape == (2, 4, 6, 12, 16)
    made = decode_clip(autoencoder, latents)
    assert made.shape == clip.shape and made.dtype == torch.uint8
    assert (made[0, 1].int() - autoencoder.decode(latents[0, 1:2])[0].int()).abs().max() <= 1


def test_latents_are_trained_with_noise_on_them(frames, monkeypatch):
    still = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    monkeypatch.setattr("engine.train.autoencoder.random_crops", lambda count: still.expand(count, -1, -1))
    rough, exact = (learned(make(), latent_noise=noise) for noise in (0.2, 0.0))
    assert rough(frames[:2])[0].item() != rough(frames[:2])[0].item()
    assert exact(frames[:2])[0].item() == exact(frames[:2])[0].item()


def test_a_batch_of_one_frame_can_be_trained(frames):
    loss, logs = learned(make())(frames[:1])
    assert loss.isfinite() and logs["psnr"].isfinite()


def test_zoom_shows_the_crop():
    """Crops lie within the picture; a crop of a plane is that plane, seen from nearer."""
    crops = random_crops(500)
    size, middle = crops.diagonal(dim1=1, dim2=2), crops[:, :, 2]
    assert 0.74 < size.min() and size.max() <= 1 and (size + middle.abs()).max() < 1 + 1e-6
    assert middle.std() > 0.03 and (crops[:, 0, 1] == 0).all() and (crops[:, 1, 0] == 0).all()
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij")
    plane = torch.stack([x, y])[None]
    identity = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    assert torch.allclose(zoom(plane, identity), plane, atol=1e-4)
    left_upper = torch.tensor([[[0.75, 0, -0.25], [0, 0.75, -0.25]]])
    made = zoom(plane, left_upper)[0]
    assert torch.allclose(made[0, 6, 1:], 0.75 * (x[6, 1:] + 0.5) - 0.5, atol=1e-4)
    assert torch.allclose(made[1, 1:, 6], 0.75 * (y[1:, 6] + 0.5) - 0.5, atol=1e-4)


def test_half_of_the_frames_are_moved_with_their_latents(frames, monkeypatch):
    """An autoencoder whose latents are its pixels makes no error, wherever it is shown; errors of any frame,
    moved or not, count in the figure that is shown.
    """
    autoencoder, seen = make(), []

    def watched(x: Tensor, crops: Tensor) -> Tensor:
        seen.append((x.shape, crops))
        return zoom(x, crops)

    monkeypatch.setattr("engine.train.autoencoder.zoom", watched)
    monkeypatch.setattr(autoencoder, "encode", to_float)
    autoencoder.encoder, autoencoder.decoder = torch.nn.Identity(), torch.nn.Identity()
    learning = learned(autoencoder, latent_noise=0.0)
    loss, _ = learning(frames[:5])
    assert loss.item() < 1e-6
    assert [shape for shape, _ in seen[:2]] == [(3, 3, 96, 128)] * 2 and seen[0][1] is seen[1][1]
    for wrong in (0, 4):
        off = 0.5 * (torch.arange(5) == wrong)[:, None, None, None]
        monkeypatch.setattr(autoencoder.decoder, "forward", lambda latents, off=off: latents + off)
        _, logs = learning(frames[:5])
        assert abs(logs["psnr"].item() - 10 * math.log10(4 / (0.5**2 / 5))) < 1e-3, f"frame {wrong}"


@pytest.mark.parametrize("count, columns", [(3, 3), (11, 8), (40, 8)])
def test_any_number_of_held_out_frames_makes_a_picture(count, columns, tmp_path):
    """Rows of eight at most, each above its reconstruction."""
    world = WorldConfig("hall", height=32, width=32, keys={"go": ["W"]})
    with Recorder(tmp_path / "data" / "r", world, "true", 0) as recorder:
        for i in range(count):
            recorder.add(np.full((32, 32, 3), 6 * i, np.uint8), [0], reset=i == 0, t_ns=i)
    config = TrainConfig("autoencoder", world=world, model=ModelConfig(TINY), data=str(tmp_path / "data"))
    stage = AutoencoderStage(config, torch.device("cpu"), None, 0, 1)
    rows = 2 * -(-min(count, 32) // 8)
    assert stage.picture(stage.module).shape == (34 * rows - 2, 34 * columns - 2, 3)
