"""PatchDiscriminator: tells true pictures from decoded ones, patch by patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Scores patches of pictures, conditioned on a blurred picture (Isola et al., 2017): the one that the
    decoder made of the same latents before it was trained against a discriminator. So it asks whether detail
    fits this blurred picture, and not only whether there is detail.

    Spectral normalisation (Miyato et al., 2018) keeps its scores bounded; nothing else regularises it.
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
        """pictures and blurred (n, 3, h, w), about in [-1, 1] → scores (n, 1, h/4, w/4), higher for true
        pictures, and the features of all layers but the last, for feature matching.
        """
        x = torch.cat([pictures, blurred], 1).contiguous(memory_format=torch.channels_last)
        features = []
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.layers[-1](x).float(), features
