"""PatchDiscriminator: true pictures told from decoded ones, patch by patch, beside the blurred picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Scores patches of pictures, each beside what a decoder without it makes of the same latents (Isola et
    al., 2017): it asks whether this detail suits this blurred picture, and not whether it is there.

    Its weights are kept spectrally normal (Miyato et al., 2018), which is all that keeps it from running
    away.
    """

    def __init__(self, width: int):
        super().__init__()
        sizes = [
            (6, width, 4, 2),
            (width, 2 * width, 4, 2),
            (2 * width, 4 * width, 3, 1),
            (4 * width, 1, 3, 1),
        ]
        self.layers = nn.ModuleList(spectral_norm(nn.Conv2d(a, b, k, s, 1)) for a, b, k, s in sizes)

    def forward(self, pictures: Tensor, blurred: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Two of (n, 3, h, w), about in [-1, 1] → scores (n, 1, h/4, w/4), higher for true, and what the
        layers before say, by which pictures are compared.
        """
        x = torch.cat([pictures, blurred], 1).contiguous(memory_format=torch.channels_last)
        features = []
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.layers[-1](x).float(), features
