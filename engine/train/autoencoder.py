"""Stage `autoencoder`: frames ↔ latents, each frame alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..data.dataset import load_frames, true_recordings
from ..data.picture import grid
from ..device import autocast
from ..model.autoencoder import Autoencoder
from ..model.checkpoint import Checkpoint, save_checkpoint
from .stage import LICENCE


class AutoencoderStage:
    """Trains the autoencoder on a spread-out sample of all recorded frames."""

    trains = True

    def __init__(
        self, config: TrainConfig, device: torch.device, dtype: torch.dtype | None, rank: int, ranks: int
    ):
        self.config, self.device, self.dtype = config, device, dtype
        pace = config.pace()
        train, held_out = true_recordings(config.data, config.world)
        self.frames = load_frames(train, pace.frames, config.seed)  # (n, 3, h, w) uint8
        self.shown = load_frames(held_out or train, 256, config.seed)
        self.size, self.seed = pace.batch, (config.seed * 1009 + rank) * 1_000_003
        self.module = Autoencoder(config.model.autoencoder)
        if config.weights:
            Checkpoint(config.weights).load_into("autoencoder", self.module)

    def batch(self, step: int) -> Tensor:
        """The frames of iteration `step`: a pure function of seed and step, so that a resumed run goes on
        exactly.
        """
        random = torch.Generator().manual_seed(self.seed + step)
        picked = torch.randint(len(self.frames), (self.size,), generator=random)
        return self._cropped(self.frames[picked], random).to(self.device, non_blocking=True)

    def _cropped(self, frames: Tensor, random: torch.Generator) -> Tensor:
        """Parts of frames (n, 3, h, w), a `crop` of each side, somewhere in each frame: small things are all
        that convolutions see, and many small parts teach more than a few whole frames.
        """
        share, (rows, columns) = self.config.pace().crop, frames.shape[2:]
        height, width = (max(16, round(side * share / 16) * 16) for side in (rows, columns))
        if (height, width) == (rows, columns):
            return frames
        top = torch.randint(rows - height + 1, (len(frames),), generator=random).tolist()
        left = torch.randint(columns - width + 1, (len(frames),), generator=random).tolist()
        places = zip(frames, top, left, strict=True)
        return torch.stack([x[:, y : y + height, z : z + width] for x, y, z in places])

    @torch.no_grad()
    def reconstruct(self, module: Autoencoder) -> tuple[Tensor, Tensor]:
        """Held-out frames and their reconstructions, both uint8 (n, 3, h, w)."""
        module.eval()
        with autocast(self.device, self.dtype):
            parts = [module.decode(module.encode(part)) for part in self.shown.to(self.device).split(64)]
        return self.shown, torch.cat(parts).cpu()

    def picture(self, module: Autoencoder) -> np.ndarray:
        """Held-out frames above their reconstructions."""
        both = (x[:32].permute(0, 2, 3, 1).split(8) for x in self.reconstruct(module))
        return grid([row.numpy() for pair in zip(*both, strict=True) for row in pair])

    def validate(self, module: Autoencoder) -> dict[str, float]:
        """PSNR of held-out frames."""
        true, made = self.reconstruct(module)
        error = (true.float() - made.float()).square().mean((1, 2, 3))
        return {"psnr_held_out": float((10 * torch.log10(255**2 / error)).mean())}

    def save(self, path: Path, module: nn.Module, about: dict[str, Any]) -> None:
        modules = {"autoencoder": module}
        config = self.config
        save_checkpoint(path, modules, config.model, config.world, licence=LICENCE, **about)

    def saved(self) -> None:
        """Nothing is under way that a save does not hold."""
