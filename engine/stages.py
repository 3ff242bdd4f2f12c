"""What each training stage trains: its networks, its n-th batch, its picture and its checkpoint. The loop is train.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from .autoencoder import Autoencoder
from .checkpoint import save_checkpoint
from .config import TrainConfig
from .dataset import load_frames, split
from .device import autocast
from .picture import grid
from .recording import find_recordings

LICENCE = "Weights and start frames derive from ViZDoom (MIT) with Freedoom art (BSD-3-Clause); see NOTICE."


class AutoencoderStage:
    """Trains the autoencoder on a spread-out sample of all recorded frames."""

    def __init__(self, config: TrainConfig, device: torch.device, dtype: torch.dtype | None, rank: int, ranks: int):
        self.config, self.device, self.dtype = config, device, dtype
        pace = config.pace()
        train, held_out = split(find_recordings(config.data))
        self.frames = load_frames(train, pace.frames, config.seed)  # (n, 3, h, w) uint8
        self.shown = load_frames(held_out or train, 256, config.seed)
        self.size, self.seed = pace.batch, (config.seed * 1009 + rank) * 1_000_003
        self.module = Autoencoder(config.model.autoencoder)

    def batch(self, step: int) -> Tensor:
        """The frames of iteration `step`: a pure function of seed and step, so that a resumed run goes on exactly."""
        random = torch.Generator().manual_seed(self.seed + step)
        picked = torch.randint(len(self.frames), (self.size,), generator=random)
        return self.frames[picked].to(self.device, non_blocking=True)

    @torch.no_grad()
    def reconstruct(self, module: Autoencoder) -> tuple[Tensor, Tensor]:
        """Held-out frames and their reconstructions, both uint8 (n, 3, h, w)."""
        module.eval()
        with autocast(self.device, self.dtype):
            parts = [module.decode(module.encode(part)) for part in self.shown.to(self.device).split(64)]
        return self.shown, torch.cat(parts).cpu()

    def picture(self, module: Autoencoder) -> np.ndarray:
        true, made = (rearrange(x[:32], "(r n) c h w -> r n h w c", n=8).numpy() for x in self.reconstruct(module))
        return grid([row for pair in zip(true, made, strict=True) for row in pair])

    def save(self, path: Path, module: nn.Module, about: dict) -> None:
        true, made = self.reconstruct(module)
        error = (true.float() - made.float()).square().mean((1, 2, 3))
        scores = {"psnr_held_out": round((10 * torch.log10(255**2 / error)).mean().item(), 2)}
        config = self.config
        save_checkpoint(
            path, {"autoencoder": module}, config.model, config.world, seed=config.seed, licence=LICENCE, scores=scores, **about
        )


def make_stage(config: TrainConfig, device: torch.device, dtype: torch.dtype | None, rank: int, ranks: int):
    """The stage that `config.stage` names, with its data open."""
    kinds = {"autoencoder": AutoencoderStage}
    return kinds[config.stage](config, device, dtype, rank, ranks)
