"""Autoencoder: frames ↔ latents, an eighth of the size on each side, each frame on its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import AutoencoderConfig


class ResidualLayer(nn.Module):
    """x + convolutions(x), of shape (n, width, y, x). Initially the identity, so that deep stacks need no
    normalisation.
    """

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
    """Convolutional autoencoder with few channels at high resolution: decoding takes a few milliseconds on a
    CPU.

    Latents have zero mean and unit variance over all channels together. Training adds noise to them, so that
    what matters most in a frame takes most of their variance. Crops of latents must decode to the same crops
    of the frame (Kouzelis et al., 2025, EQ-VAE), so that motion in the world is motion in the latents.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        w = list(config.widths)
        encoder: list[nn.Module] = [
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, w[0], 3, padding=1),
            ResidualLayer(w[0]),
        ]
        for fine, coarse in zip(w, w[1:], strict=False):
            encoder += [_down(fine, coarse), ResidualLayer(coarse)]
        encoder += [ResidualLayer(w[-1]) for _ in range(config.depth - 1)]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(w[-1], config.channels, 1))
        self.standard = nn.BatchNorm2d(1, affine=False, momentum=0.01)
        decoder: list[nn.Module] = [nn.Conv2d(config.channels, w[-1], 3, padding=1)]
        decoder += [ResidualLayer(w[-1]) for _ in range(config.depth)]
        for coarse, fine in zip(w[::-1], w[-2::-1], strict=False):
            decoder += [_up(coarse, fine), ResidualLayer(fine)]
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(w[0], 12, 3, padding=1), nn.PixelShuffle(2))
        self.to(memory_format=torch.channels_last)

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 frames (n, 3, h, w) → latents (n, c, h/8, w/8)."""
        return self.encode_pixels(to_float(frames))

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Float pixels in [-1, 1] (n, 3, h, w) → latents (n, c, h/8, w/8), float32."""
        latents = self._raw(pixels)
        return self.standard(latents.flatten(1)[:, None, None]).view_as(latents)

    def _raw(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels.contiguous(memory_format=torch.channels_last)).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, c, y, x) → uint8 frames (n, 3, 8 y, 8 x)."""
        return to_bytes(self.decode_pixels(latents))

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Latents (n, c, y, x) → float pixels, about in [-1, 1], (n, 3, 8 y, 8 x), float32."""
        return self.decoder(latents.contiguous(memory_format=torch.channels_last)).float()


def to_float(frames: Tensor) -> Tensor:
    """uint8 [0, 255] → float [-1, 1], any shape."""
    return frames.float() / 127.5 - 1


def to_bytes(pixels: Tensor) -> Tensor:
    """Float, about in [-1, 1] → uint8 [0, 255], any shape."""
    return ((pixels + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)


def decode_clip(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Latents (b, t, c, y, x) → uint8 frames (b, t, 3, h, w)."""
    frames = autoencoder.decode(rearrange(latents, "b t c y x -> (b t) c y x"))
    return rearrange(frames, "(b t) c h w -> b t c h w", b=latents.shape[0])
