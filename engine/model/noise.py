"""Counter-based Gaussian noise, adding noise, and noise levels at the start of a game and in training.

Flow matching: x = (1 - sigma) * clean + sigma * noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """clean and noise (b, t, c, y, x), sigma (b, t) → noisy latents (b, t, c, y, x)."""
    sigma = sigma[..., None, None, None]
    return torch.lerp(clean, noise, sigma)


def counter_noise(seed: Tensor, frame: Tensor | int, count: int, shape: tuple[int, ...]) -> Tensor:
    """Gaussian noise as a function of (seed, frame index), the same on every device.

    seed (b,) int64, index () of the first of `count` frames, shape of one frame's latents → (b, count,
    *shape). A 32-bit integer hash (the finaliser of MurmurHash3) of the counter gives two uniforms for
    the Box-Muller transform.
    """
    device, size = seed.device, math.prod(shape)
    frames = frame + torch.arange(count, device=device)
    seed = seed ^ _hash(seed >> 32)  # all 64 bits of a seed count
    key = _hash(seed[:, None] * 0x9E3779B1 + _hash(frames * 0x85EBCA77))  # (b, t)
    half = (size + 1) // 2
    counter = torch.arange(2 * half, device=device) * 0x27D4EB2F
    bits = _hash(_hash(key[..., None] ^ counter) + key[..., None])  # (b, t, 2 half) in [0, 2^32)
    uniform = (bits.float() + 0.5) * 2**-32
    radius = (-2 * uniform[..., :half].clamp_min(1e-9).log()).sqrt_()
    angle = 2 * math.pi * uniform[..., half:]
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], -1)[..., :size]
    return normal.unflatten(-1, shape)


def _hash(x: Tensor) -> Tensor:
    """Mixes the low 32 bits of int64 counters."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def ramp(ladder: Tensor, filled: int) -> Tensor:
    """Noise levels (w,) of the window while a game begins, after `filled` passes: with 0 all are pure noise,
    with w - 1 or more they are the ladder.
    """
    positions = torch.arange(len(ladder), device=ladder.device)
    return ladder[positions.clamp_min(len(ladder) - 1 - filled)]


def jittered(ladder: Tensor, most: float) -> Tensor:
    """Levels (b, w) → the same, each lowered by a random share of at most `most`; the last stays pure noise.
    A network trained at exact levels only could not be used at any other.
    """
    share = most * torch.rand(ladder.shape, device=ladder.device)
    share[:, -1] = 0
    return ladder * (1 - share)


def training_sigma(ladder: Tensor, batch: int, jitter: float, lowest: float) -> Tensor:
    """Noise levels (batch, w) for training: the ladder's, each lowered by a random share of at most `jitter`.

    In a third of the rows the first levels are raised to that of a later position, as while a window is being
    filled and when frames are sent back. Another third is scaled by a random factor between `lowest` and 1:
    as a teacher (stage `distill`) the network must know low levels, too.
    """
    window, device = len(ladder), ladder.device
    rungs = torch.arange(window, device=device).expand(batch, window)
    raised = torch.randint(window, (batch, 1), device=device)
    kind = torch.rand(batch, 1, device=device)
    raised = torch.where(kind < 0.33, raised, 0)
    share = torch.where(kind > 0.67, lowest + (1 - lowest) * torch.rand(batch, 1, device=device), 1)
    return share * jittered(ladder[torch.maximum(rungs, raised)], jitter)
