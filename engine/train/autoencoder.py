"""Stage `autoencoder`: frames ↔ latents, each frame alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TrainConfig
from ..data.dataset import load_frames, true_recordings
from ..data.picture import grid
from ..device import autocast
from ..model.autoencoder import Autoencoder, to_float
from ..model.checkpoint import Checkpoint, save_checkpoint
from ..stage_config import AutoencoderStageConfig
from .latents_stage import LICENCE


class AutoencoderLoss(nn.Module):
    """An autoencoder and its reconstruction loss: absolute error, squared error, and the error of differences
    between neighbouring pixels. The last keeps texture and small things (enemies, medkits), which squared
    error alone averages away.
    """

    def __init__(self, autoencoder: Autoencoder, stage: AutoencoderStageConfig):
        super().__init__()
        self.autoencoder, self.stage = autoencoder, stage

    def forward(self, frames: Tensor, turn: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 frames (n, 3, h, w) → the loss (), and PSNR to log."""
        latents, pixels = self.autoencoder.encode(frames), to_float(frames)
        moved = (len(frames) + 1) // 2
        latents = torch.cat([zoom(latents[:moved], grid := random_crops(moved)), latents[moved:]])
        pixels = torch.cat([zoom(pixels[:moved], grid), pixels[moved:]])
        level = self.stage.latent_noise * torch.rand(len(latents), 1, 1, 1, device=latents.device)
        made = self.autoencoder.decode_pixels(latents + level * torch.randn_like(latents))
        error = made - pixels  # (n, 3, h, w)
        squared = error.square().mean()
        across = (error[..., 1:] - error[..., :-1]).abs().mean()
        edges = across + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        loss = error.abs().mean() + self.stage.squared_weight * squared + self.stage.edge_weight * edges
        return loss, {"psnr": 10 * torch.log10(4 / squared.detach())}


def random_crops(count: int) -> Tensor:
    """Affine maps (n, 2, 3) of random crops, whose sides are at least three quarters of the picture's."""
    size = 0.75 + 0.25 * torch.rand(count)
    middle = (2 * torch.rand(count, 2) - 1) * (1 - size)[:, None]
    return torch.cat([torch.diag_embed(size[:, None].expand(-1, 2)), middle[..., None]], -1)


def zoom(x: Tensor, crops: Tensor) -> Tensor:
    """The crops (n, 2, 3) of x (n, c, h, w), bilinearly enlarged to its size."""
    grid = F.affine_grid(crops.to(x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


class AutoencoderStage:
    """Trains the autoencoder on a spread-out sample of all recorded frames."""

    trains = True

    def __init__(
        self, config: TrainConfig, device: torch.device, dtype: torch.dtype | None, rank: int, ranks: int
    ):
        self.config, self.device, self.dtype = config, device, dtype
        stage = config.stage_config()
        train, held_out = true_recordings(config.data, config.world)
        self.frames = load_frames(train, stage.frames, config.seed)  # (n, 3, h, w) uint8
        self.shown = load_frames(held_out or train, 256, config.seed)
        self.size, self.seed = stage.batch, (config.seed * 1009 + rank) * 1_000_003
        autoencoder = Autoencoder(config.model.autoencoder)
        if config.weights:
            Checkpoint(config.weights).load_into("autoencoder", autoencoder)
        self.module = AutoencoderLoss(autoencoder, stage)

    def batch(self, step: int) -> Tensor:
        """Random crops of frames (n, 3, h, w), uint8, for iteration `step`: a pure function of seed and step,
        so that a resumed run sees what an uninterrupted one would have seen.
        """
        random = torch.Generator().manual_seed(self.seed + step)
        picked = torch.randint(len(self.frames), (self.size,), generator=random)
        return self._cropped(self.frames[picked], random).to(self.device, non_blocking=True)

    def _cropped(self, frames: Tensor, random: torch.Generator) -> Tensor:
        """A random crop of each frame (n, 3, h, w), its sides `crop` times the frame's, rounded to 16:
        convolutions see only small parts, and many small crops teach more than a few whole frames.
        """
        share, (rows, columns) = self.config.stage_config().crop, frames.shape[2:]
        height, width = (max(16, round(side * share / 16) * 16) for side in (rows, columns))
        if (height, width) == (rows, columns):
            return frames
        top = torch.randint(rows - height + 1, (len(frames),), generator=random).tolist()
        left = torch.randint(columns - width + 1, (len(frames),), generator=random).tolist()
        places = zip(frames, top, left, strict=True)
        return torch.stack([x[:, y : y + height, z : z + width] for x, y, z in places])

    @torch.no_grad()
    def reconstruct(self, module: AutoencoderLoss) -> tuple[Tensor, Tensor]:
        """Held-out frames and their reconstructions, both uint8 (n, 3, h, w)."""
        module.eval()
        with autocast(self.device, self.dtype):
            network = module.autoencoder
            parts = [network.decode(network.encode(part)) for part in self.shown.to(self.device).split(64)]
        return self.shown, torch.cat(parts).cpu()

    def picture(self, module: AutoencoderLoss) -> np.ndarray:
        """Held-out frames above their reconstructions."""
        both = (x[:32].permute(0, 2, 3, 1).split(8) for x in self.reconstruct(module))
        return grid([row.numpy() for pair in zip(*both, strict=True) for row in pair])

    def validate(self, module: AutoencoderLoss) -> dict[str, float]:
        """PSNR of held-out frames."""
        true, made = self.reconstruct(module)
        error = (true.float() - made.float()).square().mean((1, 2, 3))
        return {"psnr_held_out": float((10 * torch.log10(255**2 / error)).mean())}

    def save(self, path: Path, module: AutoencoderLoss, about: dict[str, Any]) -> None:
        modules = {"autoencoder": module.autoencoder}
        config = self.config
        save_checkpoint(path, modules, config.model, config.world, licence=LICENCE, **about)

    def resume_state(self) -> list:
        """Empty: a stage without games (see LatentsStage.resume_state)."""
        return []

    def load_resume_state(self, saved: list) -> None:
        """Nothing to load."""
