"""Features of pictures as the autoencoder sees them, and the Fréchet distance between two crowds of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..autoencoder import to_float
from ..device import autocast
from ..session import Player

COMPONENTS = 32  # principal components of true frames; more would make a few seconds' estimate noisy
BATCH = 64  # pictures that are encoded at once


class Features:
    """Means over the picture of the encoder's last hidden layer, on the leading principal components of true
    frames, uint8 (n, h, w, 3).
    """

    def __init__(self, player: Player, true: np.ndarray, components: int = COMPONENTS):
        self.player = player
        self.hidden = player.autoencoder.encoder[:-1]
        seen = self._hidden(true)
        self.mean = seen.mean(0)
        variances, axes = torch.linalg.eigh(torch.cov((seen - self.mean).T))  # ascending
        self.axes = axes.flip(1)[:, :components]
        self.explained = float(variances.flip(0)[:components].sum() / variances.sum().clamp_min(1e-12))
        self.true = (seen - self.mean) @ self.axes

    def of(self, frames: np.ndarray) -> Tensor:
        """uint8 (n, h, w, 3) → (n, d), float64."""
        return (self._hidden(frames) - self.mean) @ self.axes

    def distance(self, frames: np.ndarray) -> float:
        """Fréchet distance of the frames, uint8 (n, h, w, 3), to the true ones."""
        return frechet(self.of(frames), self.true)

    def stray(self, points: Tensor) -> float:
        """Median distance of pictures' features (n, d) to the true ones nearest to each: whatever the view, a
        sound picture has true ones near it.
        """
        return float(torch.cdist(points, self.true).amin(1).median())

    @torch.inference_mode()
    def _hidden(self, frames: np.ndarray) -> Tensor:
        parts = []
        for start in range(0, len(frames), BATCH):
            part = np.ascontiguousarray(frames[start : start + BATCH])
            pixels = to_float(torch.from_numpy(part).permute(0, 3, 1, 2).to(self.player.device))
            with autocast(self.player.device, self.player.dtype):
                hidden = self.hidden(pixels.contiguous(memory_format=torch.channels_last))
            parts.append(hidden.double().mean((2, 3)).cpu())
        return torch.cat(parts)  # (n, c)


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to a (n, d) and b (m, d): |ma - mb|² + tr(A + B - 2 (A B)^½)
    (Dowson and Landau, 1982). The root's trace is that of the symmetric A^½ B A^½, by eigenvalues in float64.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(apart + cov_a.trace() + cov_b.trace() - 2 * shared))
