"""SceneModel: a frame's state → what is to be seen from there, as far as the state tells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

COARSE = 64  # channels of the small picture that is enlarged


class SceneModel(nn.Module):
    """Where one is and which way one looks → the mean of all latents that belong there.

    It is the map: learned from single frames, which costs a hundredth of what a step of the denoiser does,
    and then told to the denoiser, which so need not learn from games what stands where. What the state does
    not tell (what was picked up, how each blade of grass stands) it leaves out.
    """

    def __init__(self, columns: Sequence[int], channels: int, rows: int, across: int, width: int):
        """`columns`: those of a state's features that it goes by (state_spec.py); latents (channels, rows,
        across).
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
        """Features of states (..., f) → latents (..., c, y, x)."""
        known = features.index_select(-1, self.columns).flatten(0, -2)
        made = self.enlarge(self.place(known).unflatten(-1, self.coarse))
        return made.unflatten(0, features.shape[:-1])
