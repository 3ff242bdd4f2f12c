"""Reads a state off finished latents: for starts without one, and for what keys do not decide."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .state_spec import StateScales, StateSpec, pick


class StateReader(nn.Module):
    """One frame's latents → its state. Velocities are not to be seen in one frame: it tells their mean."""

    def __init__(self, channels: int, rows: int, columns: int, spec: StateSpec, width: int = 64) -> None:
        super().__init__()
        self.spec, self.scales = spec, StateScales(spec)
        self.angles = spec.indices("angle")
        self.plain = [i for i in range(len(spec)) if i not in self.angles]
        every = self.plain + self.angles
        self.back = [every.index(i) for i in range(len(spec))]
        layers = [nn.Conv2d(channels, width, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(width, width, 3, 2, 1), nn.SiLU(), nn.Conv2d(width, width, 3, 2, 1), nn.SiLU()]
        left = -(-rows // 4) * -(-columns // 4) * width
        layers += [nn.Flatten(), nn.Linear(left, 4 * width), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(4 * width, len(self.plain) + 2 * len(self.angles))

    def fit(self, states: Tensor, resets: Tensor) -> None:
        """Sets units and ranges from the data; see StateScales.fit."""
        self.scales.fit(states, resets)

    def forward(self, latents: Tensor) -> Tensor:
        """(n, c, y, x) → (n, S) in raw units, inside the range of the data, angles in [0, 360)."""
        plain, cos, sin = self._read(latents)
        scales = self.scales
        plain = plain * pick(scales.scale, self.plain) + pick(scales.offset, self.plain)
        plain = torch.minimum(
            torch.maximum(plain, pick(scales.low, self.plain)), pick(scales.high, self.plain)
        )
        angle = torch.rad2deg(torch.atan2(sin, cos)) % 360
        return pick(torch.cat([plain, angle], 1), self.back)

    def loss(self, latents: Tensor, states: Tensor) -> Tensor:
        """How far what it reads off latents (n, c, y, x) is from the states (n, S), in units of the data."""
        plain, cos, sin = self._read(latents)
        radians = torch.deg2rad(pick(states, self.angles))
        made = torch.cat([plain, cos, sin], 1)
        true = torch.cat([pick(self.scales.normalise(states), self.plain), radians.cos(), radians.sin()], 1)
        return F.huber_loss(made, true, delta=0.2) / 0.2

    def _read(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """→ normalised numbers but angles, and the angles' cosines and sines, (n, ..) each."""
        count = len(self.angles)
        return self.out(self.layers(latents)).split([len(self.plain), count, count], 1)
