"""StateReader: latents of a frame → its state, for starts without one and for numbers keys do not decide."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..device import exact
from .state import StateModel
from .state_spec import StateScales, StateSpec, pick

SEEN = 0.3  # play uses a number only if the reader's R2 for it, on held-out frames, is at least this
LOG_STD = -4.0, 2.0  # bounds of a component's logarithm of standard deviation, in normalised units


class StateReader(nn.Module):
    """One frame's latents → its state. One frame does not show velocities: the reader gives their mean.

    A view may fit several places, and the mean of these is none of them. So the pose (positions and angles
    together) is a mixture of Gaussians, each with a weight and a standard deviation, of which the likeliest
    mean is returned. All other numbers are regressed.

    `share` (S,): R2 of each number on held-out frames (0: nothing is read), measured once after training.
    """

    def __init__(
        self, channels: int, rows: int, columns: int, spec: StateSpec, width: int = 64, guesses: int = 8
    ) -> None:
        super().__init__()
        self.spec, self.scales, self.guesses = spec, StateScales(spec), guesses
        self.places, self.angles = spec.indices("position"), spec.indices("angle")
        self.plain = [i for i in range(len(spec)) if i not in self.places + self.angles]
        every = self.places + self.angles + self.plain
        self.inverse_order = [every.index(i) for i in range(len(spec))]
        self.pose = len(self.places) + 2 * len(self.angles)  # numbers of a guess
        layers = [nn.Conv2d(channels, width, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(width, width, 3, 2, 1), nn.SiLU(), nn.Conv2d(width, width, 3, 2, 1), nn.SiLU()]
        left = -(-rows // 4) * -(-columns // 4) * width
        layers += [nn.Flatten(), nn.Linear(left, 4 * width), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.out = nn.Linear(4 * width, guesses * (self.pose + 2) + len(self.plain))
        self.register_buffer("share", torch.zeros(len(spec)))

    def fit(self, states: Tensor, resets: Tensor) -> None:
        """Measures units and ranges, as StateScales.fit does."""
        self.scales.fit(states, resets)

    @property
    def seen(self) -> list[int]:
        """Indices of the pictured numbers (StateSpec) that the reader reads well enough for play."""
        share = self.share.tolist()
        return [i for i in self.spec.pictured_indices if share[i] >= SEEN]

    @torch.no_grad()
    def measured(self, latents: Tensor, states: Tensor) -> Tensor:
        """Latents (n, c, y, x) and their states (n, S) → R2 of each number (S,), at least 0. Angles are taken
        as plain numbers, from 0 to 360.
        """
        missed = (self(latents) - states).square().mean(0)
        return (1 - missed / states.var(0, unbiased=False).clamp_min(1e-12)).clamp_min(0)

    @exact
    def forward(self, latents: Tensor) -> Tensor:
        """Latents (n, c, y, x) → states (n, S), raw units, within the data's range, angles in [0, 360)."""
        weight, guess, log_std, plain = self._read(latents.float())
        height = weight - self.pose * log_std  # logarithm of each component's peak density
        best = height.argmax(1)[:, None, None].expand(-1, 1, self.pose)
        place, cos, sin = self._parts(guess.gather(1, best)[:, 0])
        scales, numbers = self.scales, self.places + self.plain
        made = torch.cat([place, plain], 1) * pick(scales.scale, numbers) + pick(scales.offset, numbers)
        made = torch.minimum(torch.maximum(made, pick(scales.low, numbers)), pick(scales.high, numbers))
        place, plain = made.split([len(self.places), len(self.plain)], 1)
        angle = torch.rad2deg(torch.atan2(sin, cos)) % 360
        return pick(torch.cat([place, angle * (angle < 360), plain], 1), self.inverse_order)

    def loss(self, latents: Tensor, states: Tensor) -> Tensor:
        """Latents (n, c, y, x) and their states (n, S) → the loss (): negative log likelihood of positions
        and angles, plus the Huber error of all other numbers, in normalised units.
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
        """Latents (n, c, y, x) → of each component of the mixture: logarithm of weight (n, g), mean (n, g,
        pose) and logarithm of standard deviation (n, g); then the other numbers, normalised (n, plain).
        """
        guesses, plain = self.out(self.trunk(latents)).tensor_split([self.guesses * (self.pose + 2)], 1)
        weight, log_std, guess = guesses.unflatten(1, (self.guesses, -1)).split([1, 1, self.pose], 2)
        return weight[..., 0].log_softmax(1), guess, log_std[..., 0].clamp(*LOG_STD), plain

    def _parts(self, guess: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A pose (n, pose) → normalised positions (n, p), and cosines and sines of the angles (n, a)."""
        return guess.split([len(self.places), len(self.angles), len(self.angles)], 1)


@torch.no_grad()
def completed(
    model: StateModel, reader: StateReader, latents: Tensor, actions: Tensor, states: Tensor
) -> Tensor:
    """Fills in the states (b, t, S) of a start's frames, NaN where unknown, from latents (b, t, c, y, x) and
    actions (b, t, k).

    The first frame's missing numbers are read off its latents, with velocity zero; those of later frames are
    predicted from the keys, and pictured numbers are read off each frame. Known numbers stay.
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
