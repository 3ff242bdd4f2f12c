"""Frames ↔ latents at a spatial factor of 16, each frame alone: no look-ahead, no temporal delay."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import AutoencoderConfig

FACTOR = 16


class ResidualLayer(nn.Module):
    """x + convolutions(x); starts as the identity, so the deep stack needs no normalisation."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))  # (n, width, y, x)


def _down(width: int, wider: int) -> nn.Module:
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * width, wider, 1))


def _up(wide: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(wide, 4 * width, 1), nn.PixelShuffle(2))


class Autoencoder(nn.Module):
    """Convolutional autoencoder, narrow where pixels are many, so that decoding is a few milliseconds on a
    CPU.

    Latents have zero mean and unit variance in every channel (a batch norm without parameters), so the
    denoiser needs no scale, and are trained with a little noise on them, so that near latents decode to near
    pictures.
    """

    latent_noise = 0.05

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        w = list(config.widths)
        if len(w) != 4:
            raise ValueError(f"the autoencoder needs 4 widths for a factor of {FACTOR}, not {w}")
        encoder: list[nn.Module] = [
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, w[0], 3, padding=1),
            ResidualLayer(w[0]),
        ]
        for fine, coarse in zip(w, w[1:], strict=False):
            encoder += [_down(fine, coarse), ResidualLayer(coarse)]
        encoder += [ResidualLayer(w[-1]) for _ in range(config.depth - 1)]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(w[-1], config.channels, 1))
        self.standard = nn.BatchNorm2d(config.channels, affine=False, momentum=0.01)
        decoder: list[nn.Module] = [nn.Conv2d(config.channels, w[-1], 3, padding=1)]
        decoder += [ResidualLayer(w[-1]) for _ in range(config.depth)]
        for coarse, fine in zip(w[::-1], w[-2::-1], strict=False):
            decoder += [_up(coarse, fine), ResidualLayer(fine)]
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(w[0], 12, 3, padding=1), nn.PixelShuffle(2))
        self.to(memory_format=torch.channels_last)

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 frames (n, 3, h, w) → latents (n, c, h/16, w/16)."""
        pixels = to_float(frames).contiguous(memory_format=torch.channels_last)
        return self.standard(self.encoder(pixels).float())

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, c, y, x) → uint8 frames (n, 3, 16 y, 16 x)."""
        pixels = self.decoder(latents.contiguous(memory_format=torch.channels_last)).float()
        return ((pixels + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)

    def loss(self, frames: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction loss of uint8 frames (n, 3, h, w): absolute and squared error, and that of the
        gradients.

        The gradient term keeps texture and small things (enemies, medkits) that squared error alone averages
        away.
        """
        latents = self.encode(frames)
        noisy = latents + self.latent_noise * torch.randn_like(latents)
        pixels = self.decoder(noisy.contiguous(memory_format=torch.channels_last)).float()
        error = pixels - to_float(frames)  # (n, 3, h, w)
        squared = error.square().mean()
        edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (
            error[..., 1:, :] - error[..., :-1, :]
        ).abs().mean()
        loss = error.abs().mean() + 4 * squared + 0.5 * edges
        return loss, {"psnr": 10 * torch.log10(4 / squared.detach())}

    def forward(self, frames: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(frames)


def to_float(frames: Tensor) -> Tensor:
    """uint8 [0, 255] → float [-1, 1], any shape."""
    return frames.float() / 127.5 - 1


def encode_clip(autoencoder: Autoencoder, frames: Tensor) -> Tensor:
    """uint8 frames (b, t, 3, h, w) → latents (b, t, c, y, x)."""
    latents = autoencoder.encode(rearrange(frames, "b t c h w -> (b t) c h w"))
    return rearrange(latents, "(b t) c y x -> b t c y x", b=frames.shape[0])


def decode_clip(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Latents (b, t, c, y, x) → uint8 frames (b, t, 3, h, w)."""
    frames = autoencoder.decode(rearrange(latents, "b t c y x -> (b t) c y x"))
    return rearrange(frames, "(b t) c h w -> b t c h w", b=latents.shape[0])
