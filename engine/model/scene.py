"""SceneModel: a frame's state → the mean latents of frames with that state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

COARSE = 64  # channels of the small feature map that is enlarged


class SceneModel(nn.Module):
    """Position and heading → the mean of all latents seen from there: a map of the world.

    It is trained on single frames, at a hundredth of the cost of a step of the denoiser, and its output is an
    input of the denoiser, which then need not learn where things are. What the state does not determine
    (what was picked up, how each blade of grass stands) is averaged out.
    """

    def __init__(self, columns: Sequence[int], channels: int, rows: int, across: int, width: int):
        """`columns`: indices of the features to use (state_spec.scene_columns); latents are (channels, rows,
        across); `width`: of the hidden layers.
        """
        super().__init__()
        self.shape = channels, rows, across
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.int64), persistent=False)
        enlarge: list[nn.Module] = []
        while len(enlarge) < 6 and rows % 2 == across % 2 == 0:  # twice at most
            enlarge += [nn.Conv2d(COARSE, 4 * COARSE, 1), nn.PixelShuffle(2), nn.SiLU()]
            rows, across = rows // 2, across // 2
        self.coarse = COARSE, rows, across
        sizes = [len(columns), width, width, width]
        layers: list[nn.Module] = []
        for inputs, outputs in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(inputs, outputs), nn.SiLU()]
        self.place = nn.Sequential(*layers, nn.Linear(width, COARSE * rows * across))
        self.enlarge = nn.Sequential(*enlarge, nn.Conv2d(COARSE, channels, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        """State features (..., f) → latents (..., c, y, x)."""
        known = features.index_select(-1, self.columns).flatten(0, -2)
        made = self.enlarge(self.place(known).unflatten(-1, self.coarse))
        return made.unflatten(0, features.shape[:-1])
