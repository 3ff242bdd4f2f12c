"""Noise as pure functions: counter-based Gaussian noise, adding it, and the levels that training shows.

Flow matching: x = (1 - sigma) * clean + sigma * noise. The preconditioning is that of Karras et al. (2022),
Table 1, derived anew for this interpolation and unit-variance latents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(b, t, c, y, x) clean and noise, sigma (b, t) → noisy latents of the same shape."""
    sigma = sigma[..., None, None, None]
    return torch.lerp(clean, noise, sigma)


def scalings(sigma: Tensor, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """sigma (b, t), standard deviation of the clean data → (skip, out, in), each (b, t): clean = skip * x +
    out * network(in * x).

    They keep the network's input and target at unit variance for every sigma, so one loss weight fits all
    levels.
    """
    total = ((spread * (1 - sigma)).square() + sigma.square()).sqrt()
    return spread**2 * (1 - sigma) / total.square(), spread * sigma / total, 1 / total


def counter_noise(seed: Tensor, frame: Tensor | int, level: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Gaussian noise as a function of (seed, frame index, level), the same on every device.

    seed (b,) int64, frame index () of the first of t frames, level (t,) int64, shape of one frame's latents →
    (b, t, *shape). A 32-bit integer hash (the finaliser of MurmurHash3) of the counter gives two uniforms for
    the Box-Muller transform.
    """
    device, count = seed.device, math.prod(shape)
    frames = frame + torch.arange(len(level), device=device)
    seed = seed ^ _hash(seed >> 32)  # all 64 bits of a seed count
    key = _hash(seed[:, None] * 0x9E3779B1 + _hash(frames * 0x85EBCA77 + level * 0xC2B2AE3D))  # (b, t)
    half = (count + 1) // 2
    counter = torch.arange(2 * half, device=device) * 0x27D4EB2F
    bits = _hash(_hash(key[..., None] ^ counter) + key[..., None])  # (b, t, 2 half) in [0, 2^32)
    uniform = (bits.float() + 0.5) * 2**-32
    radius = (-2 * uniform[..., :half].clamp_min(1e-9).log()).sqrt_()
    angle = 2 * math.pi * uniform[..., half:]
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], -1)[..., :count]
    return normal.unflatten(-1, shape)


def _hash(x: Tensor) -> Tensor:
    """Mixes the low 32 bits of int64 counters."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def ramp(ladder: Tensor, filled: int) -> Tensor:
    """The window's levels (w,) while it is being filled: position k has gone through at most `filled` passes
    before.

    With `filled` = 0 all positions are pure noise, with `filled` ≥ w - 1 they are the ladder.
    """
    positions = torch.arange(len(ladder), device=ladder.device)
    return ladder[
        torch.maximum(positions, torch.tensor(len(ladder) - 1 - filled, device=ladder.device).clamp_min(0))
    ]


def jittered(ladder: Tensor, most: float) -> Tensor:
    """Levels (b, w), each a random share of at most `most` lower, but for the last, which stays pure noise:
    what is trained at a ladder's very levels alone is at a loss where others are wanted.
    """
    share = most * torch.rand(ladder.shape, device=ladder.device)
    share[:, -1] = 0
    return ladder * (1 - share)


def training_sigma(ladder: Tensor, batch: int) -> Tensor:
    """Noise levels (batch, w) that a denoiser is trained at.

    Half of the rows are the ladder, lightly jittered, with a third of them raised from some position on
    (ramp-up and frames sent back after a key change); the other half has an independent uniform level for
    every frame.
    """
    window, device = len(ladder), ladder.device
    rungs = torch.arange(window, device=device).expand(batch, window)
    raised = torch.randint(window, (batch, 1), device=device)
    raised = torch.where(torch.rand(batch, 1, device=device) < 0.33, raised, 0)
    stair = ladder[torch.maximum(rungs, raised)] * (1 - 0.1 * torch.rand(batch, window, device=device))
    stair = torch.where(
        torch.rand(batch, window, device=device) < 0.7, ladder[torch.maximum(rungs, raised)], stair
    )
    free = torch.rand(batch, window, device=device)
    return torch.where(torch.rand(batch, 1, device=device) < 0.5, stair, free)
