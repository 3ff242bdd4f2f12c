"""Features of pictures by fixed filters, and the Fréchet distance between two sets of pictures.

No network is involved and nothing is fitted, so that figures can be compared between autoencoders, worlds and
years. Four octaves of a grey pyramid are filtered by wave packets of four orientations (Gabor, 1946). Even
and odd responses together give an energy that does not depend on small shifts; with its logarithm, halving
the strength of a texture counts the same at every contrast. Colours are means over a coarse grid.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

OCTAVES, ORIENTATIONS = 4, 4
SIDE, WAVELENGTH, SPREAD = 7, 3.2, 1.6  # of a filter, in pixels: side, wavelength and standard deviation
FLOOR = 2.0  # grey levels: weaker texture counts as none
TEXTURE_GRID, COLOUR_GRID = (2, 2), (3, 4)  # rows and columns of the parts of the picture
COLOUR = 32.0  # a difference of so many grey levels counts like a factor e in texture
BATCH = 64  # pictures at once
COUNT = OCTAVES * ORIENTATIONS * math.prod(TEXTURE_GRID) + 3 * math.prod(COLOUR_GRID)


def wave_packets() -> Tensor:
    """The filters (2 * ORIENTATIONS, 1, SIDE, SIDE): even and odd by turns, of zero mean and equal norm."""
    at = torch.arange(SIDE, dtype=torch.float32) - SIDE // 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    hull = torch.exp(-(x.square() + y.square()) / (2 * SPREAD**2))
    filters = []
    for number in range(ORIENTATIONS):
        angle = math.pi * number / ORIENTATIONS
        phase = 2 * math.pi / WAVELENGTH * (x * math.cos(angle) + y * math.sin(angle))
        for wave in (phase.cos(), phase.sin()):
            packet = hull * wave
            packet = packet - hull * packet.sum() / hull.sum()
            filters.append(packet / packet.norm())
    return torch.stack(filters)[:, None]


def features(frames: np.ndarray) -> Tensor:
    """uint8 (n, h, w, 3) → (n, COUNT), float64: log energies by octave, orientation and part of the picture,
    then brightness, red against green and blue against yellow by part.
    """
    parts = [_features(frames[at : at + BATCH]) for at in range(0, len(frames), BATCH)]
    return torch.cat(parts) if parts else torch.zeros(0, COUNT, dtype=torch.float64)


@torch.inference_mode()
def _features(frames: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    red, green, blue = pixels.unbind(1)
    grey = pixels.mean(1, keepdim=True)  # (n, 1, h, w)
    colours = torch.stack([grey[:, 0], red - green, blue - (red + green) / 2], 1)
    columns, packets = [], wave_packets()
    for _ in range(OCTAVES):
        edge = SIDE // 2
        even, odd = F.conv2d(F.pad(grey, [edge] * 4, "replicate"), packets).unflatten(1, (-1, 2)).unbind(2)
        energy = F.adaptive_avg_pool2d(even.square() + odd.square(), TEXTURE_GRID)
        columns.append((1 + energy / FLOOR**2).log().flatten(1) / 2)
        grey = F.avg_pool2d(grey, 2)
    columns.append(F.adaptive_avg_pool2d(colours, COLOUR_GRID).flatten(1) / COLOUR)
    return torch.cat(columns, 1).double()


class Reference:
    """Features of true frames, with which generated frames are compared."""

    def __init__(self, frames: np.ndarray):
        self.points = features(frames)

    def nearest(self, points: Tensor) -> Tensor:
        """Features (n, COUNT) → the distance of each to the nearest true ones (n,). A good picture has true
        ones near it, whatever it shows.
        """
        return torch.cdist(points, self.points).amin(1)

    def nearest_distance(self, points: Tensor) -> float:
        """The median of `nearest`."""
        return float(self.nearest(points).median())


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance between the features of two sets of pictures, uint8 (n, h, w, 3) each."""
    return frechet(features(a), features(b))


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
