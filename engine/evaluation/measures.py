"""Figures of pictures, uint8 (n, h, w, 3): similarity, sharpness, energy by octave, motion, and horizontal
shift.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce

# side in pixels of the squares that views are averaged over before they are compared, to remove grain
POOL = 4
EQUAL = 78.0  # decibels, for equal pictures: a mean squared error of a thousandth
REACH = 16  # largest shift in pixels that is tried


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in decibels; EQUAL for equal pictures."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    each = peak_signal_noise_ratio(_pixels(a), _pixels(b), 255.0, reduction="none", dim=(1, 2, 3))
    return float(each.clamp_max(EQUAL).mean())


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over pictures of the structural similarity (Wang et al., 2004), 1 where they are equal."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(structural_similarity_index_measure(_pixels(a), _pixels(b), data_range=255.0))


def _pixels(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()


def sharpness(frames: np.ndarray) -> float:
    """Mean absolute difference of neighbouring pixels, in grey levels."""
    pixels = frames.astype(np.float32)
    return float(np.abs(np.diff(pixels, axis=1)).mean() + np.abs(np.diff(pixels, axis=2)).mean())


OCTAVES = 4  # how many have a figure, the finest first
HIGH = 2  # octaves in the high-pass part


def octaves(frames: np.ndarray) -> np.ndarray:
    """Mean energy of the grey picture's octaves (OCTAVES,), squared grey levels, the finest first: what is
    lost when the resolution is halved, step by step.
    """
    grey, energies = _pixels(frames).mean(1, keepdim=True), []
    for _ in range(OCTAVES):
        half = F.avg_pool2d(grey, 2)
        energies.append(float((grey - _enlarged(half, 2)).square().mean()))
        grey = half
    return np.array(energies)


def highpass_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over pictures of the correlation between the `HIGH` finest octaves of the grey pictures; 1 if they
    are equal. Sharp detail in the wrong place does not raise it.
    """
    a, b = (_highpass(x) for x in (a, b))
    return float(((a * b).mean(1) / (a.square().mean(1) * b.square().mean(1)).sqrt().clamp_min(1e-6)).mean())


def _highpass(frames: np.ndarray) -> torch.Tensor:
    """uint8 (n, h, w, 3) → (n, h * w), of zero mean."""
    grey = _pixels(frames).mean(1, keepdim=True)
    fine = (grey - _enlarged(F.avg_pool2d(grey, 2**HIGH), 2**HIGH)).flatten(1)
    return fine - fine.mean(1, keepdim=True)


def _enlarged(pixels: torch.Tensor, factor: int) -> torch.Tensor:
    return F.interpolate(pixels, scale_factor=factor, mode="bilinear")


def motion(frames: np.ndarray) -> float:
    """Mean absolute difference of consecutive frames, in grey levels; 0 for one frame."""
    if len(frames) < 2:
        return 0.0
    return float(np.abs(np.diff(frames.astype(np.float32), axis=0)).mean())


def coarse(frames: np.ndarray) -> np.ndarray:
    """(..., h, w, 3) → averaged over squares of `POOL` pixels, float32 (..., h', w', 3)."""
    shape = frames.shape
    small = reduce(
        frames.reshape(-1, *shape[-3:]).astype(np.float32),
        "n (h p) (w q) c -> n h w c",
        "mean",
        p=POOL,
        q=POOL,
    )
    return small.reshape(*shape[:-3], *small.shape[1:])


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean absolute difference of coarse pictures, in grey levels: (..., h, w, 3) twice → (...)."""
    return np.abs(coarse(a) - coarse(b)).mean((-3, -2, -1))


def flat(frames: np.ndarray) -> np.ndarray:
    """Coarse pictures as vectors: (..., h, w, 3) → (..., d)."""
    return rearrange(coarse(frames), "... h w c -> ... (h w c)")


def horizontal_flow(a: np.ndarray, b: np.ndarray) -> float:
    """The shift to the right, in pixels, that best maps picture a to b, both uint8 (h, w, 3); 0 for blank
    pictures.

    Turning shifts the whole picture sideways, so that one global shift is enough.
    """
    a, b = (x.astype(np.float32).mean(-1) for x in (a, b))  # (h, w)
    width = a.shape[1]
    costs = [
        np.abs(a[:, max(0, -d) : width - max(0, d)] - b[:, max(0, d) : width + min(0, d)]).mean()
        for d in range(-REACH, REACH + 1)
    ]
    best = int(np.argmin(costs))
    return float(best - REACH) if costs[best] < 0.9 * costs[REACH] else 0.0


def flows(frames: np.ndarray) -> np.ndarray:
    """Horizontal flow between consecutive frames (n, h, w, 3) → (n - 1,), pixels."""
    return np.array([horizontal_flow(a, b) for a, b in zip(frames, frames[1:], strict=False)])
