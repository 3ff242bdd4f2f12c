"""Reads a state off finished latents: for starts without one, and for what keys do not decide."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..device import exact
from .state import StateModel
from .state_spec import StateScales, StateSpec, pick

SEEN = 0.3  # share of a number's variance that must be read off unseen pictures for play to go by it
LOG_STD = -4.0, 2.0  # bounds of the logarithm of a guess's standard deviation, in units of the data


class StateReader(nn.Module):
    """One frame's latents → its state. Velocities are not to be seen in one frame: it tells their mean.

    Rooms look alike from several places, and the mean of these is none of them. So where and which way
    (positions and angles together) is a mixture of some guesses, each with its weight and its deviation, of
    which the likeliest is told; all other numbers are plain.

    `share` (S,): which part of each number's variance it read off pictures that it had not seen (R2; 0: it
    knows nothing), measured once when it was trained.
    """

    def __init__(
        self, channels: int, rows: int, columns: int, spec: StateSpec, width: int = 64, guesses: int = 8
    ) -> None:
        super().__init__()
        self.spec, self.scales, self.guesses = spec, StateScales(spec), guesses
        self.places, self.angles = spec.indices("position"), spec.indices("angle")
        self.plain = [i for i in range(len(spec)) if i not in self.places + self.angles]
        every = self.places + self.angles + self.plain
        self.back = [every.index(i) for i in range(len(spec))]
        self.pose = len(self.places) + 2 * len(self.angles)  # numbers of a guess
        layers = [nn.Conv2d(channels, width, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(width, width, 3, 2, 1), nn.SiLU(), nn.Conv2d(width, width, 3, 2, 1), nn.SiLU()]
        left = -(-rows // 4) * -(-columns // 4) * width
        layers += [nn.Flatten(), nn.Linear(left, 4 * width), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.out = nn.Linear(4 * width, guesses * (self.pose + 2) + len(self.plain))
        self.register_buffer("share", torch.zeros(len(spec)))

    def fit(self, states: Tensor, resets: Tensor) -> None:
        """Sets units and ranges from the data; see StateScales.fit."""
        self.scales.fit(states, resets)

    @property
    def seen(self) -> list[int]:
        """Places of the numbers that only pictures tell and that it does read off them."""
        share = self.share.tolist()
        return [i for i in self.spec.pictured_indices if share[i] >= SEEN]

    @torch.no_grad()
    def measured(self, latents: Tensor, states: Tensor) -> Tensor:
        """Latents (n, c, y, x) and their states (n, S) → the share of each number's variance that is read; of
        an angle, as if it did not go round.
        """
        missed = (self(latents) - states).square().mean(0)
        return (1 - missed / states.var(0, unbiased=False).clamp_min(1e-12)).clamp_min(0)

    @exact
    def forward(self, latents: Tensor) -> Tensor:
        """(n, c, y, x) → (n, S) in raw units, inside the range of the data, angles in [0, 360)."""
        weight, guess, log_std, plain = self._read(latents.float())
        height = weight - self.pose * log_std  # of each guess's peak, as logarithm
        best = height.argmax(1)[:, None, None].expand(-1, 1, self.pose)
        place, cos, sin = self._parts(guess.gather(1, best)[:, 0])
        scales, numbers = self.scales, self.places + self.plain
        made = torch.cat([place, plain], 1) * pick(scales.scale, numbers) + pick(scales.offset, numbers)
        made = torch.minimum(torch.maximum(made, pick(scales.low, numbers)), pick(scales.high, numbers))
        place, plain = made.split([len(self.places), len(self.plain)], 1)
        angle = torch.rad2deg(torch.atan2(sin, cos)) % 360
        return pick(torch.cat([place, angle * (angle < 360), plain], 1), self.back)

    def loss(self, latents: Tensor, states: Tensor) -> Tensor:
        """How unlikely the states (n, S) are after latents (n, c, y, x): of positions and angles the negative
        log likelihood, of other numbers how far it is off, in units of the data.
        """
        weight, guess, log_std, plain = self._read(latents)
        radians, known = torch.deg2rad(pick(states, self.angles)), self.scales.normalise(states)
        pose = torch.cat([pick(known, self.places), radians.cos(), radians.sin()], 1)
        off = (guess - pose[:, None]).square().sum(2)  # (n, guesses)
        fits = weight - 0.5 * off * torch.exp(-2 * log_std) - self.pose * log_std
        off = plain - pick(known, self.plain)
        plain = F.huber_loss(off, torch.zeros_like(off), delta=0.2, reduction="none").sum(1) / 0.2
        return (plain - fits.logsumexp(1)).mean()

    def _read(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """→ of each guess the logarithm of its weight (n, g), its numbers (n, g, pose), and the logarithm of
        its standard deviation (n, g); the plain numbers, normalised (n, ..).
        """
        guesses, plain = self.out(self.trunk(latents)).tensor_split([self.guesses * (self.pose + 2)], 1)
        weight, log_std, guess = guesses.unflatten(1, (self.guesses, -1)).split([1, 1, self.pose], 2)
        return weight[..., 0].log_softmax(1), guess, log_std[..., 0].clamp(*LOG_STD), plain

    def _parts(self, guess: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, pose) → normalised positions, and the angles' cosines and sines, (n, ..) each."""
        return guess.split([len(self.places), len(self.angles), len(self.angles)], 1)


@torch.no_grad()
def completed(
    model: StateModel, reader: StateReader, latents: Tensor, actions: Tensor, states: Tensor
) -> Tensor:
    """The states of a start's frames (b, t, S), NaN where nothing is known, without gaps. Latents (b, t, c,
    y, x), actions (b, t, k).

    What of the first frame is not known is read off it, a body at rest; from there on the state follows the
    keys, and what is known stays as it is. What keys do not decide is read off each frame.
    """
    known, spec = torch.isfinite(states), model.spec
    read = reader(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
    velocities = spec.indices("velocity")
    columns = [torch.zeros_like(x) if i in velocities else x for i, x in enumerate(read.unbind(-1))]
    read = torch.stack(columns, -1)
    first = torch.where(known, states, read)[:, :1]
    rest = actions[:, 1:]
    moved = model.unroll(model.begin(first, actions[:, :1]), rest) if rest.shape[1] else first[:, :0]
    made = list(torch.cat([first, moved], 1).unbind(-1))
    for i in spec.pictured_indices:
        made[i] = read[..., i]
    return torch.where(known, states, torch.stack(made, -1))
