"""The numbers of a world's state, their units and ranges, and the features that condition the generator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import UserError
from ..worlds.base import STATE_KINDS

PICTURED = ("health", "ammo")  # scalars that keys do not decide
OCTAVES = 7  # of a position's Fourier features: the finest wave is a 32nd of the map
HARMONICS = 8  # Fourier features of an angle
STEP_HARMONICS = 2  # Fourier features of the step between two frames


@dataclass(frozen=True)
class StateSpec:
    """The numbers of a state in order, and the kind of each (worlds/base.py).

    Positions are on a fixed map. The first two, and the first two velocities, are in the plane in which the
    first angle is the heading: degrees, from the first axis towards the second. `pictured`: scalars that
    keys do not decide (health), which are read off frames; all other numbers are predicted from keys.
    Raises UserError for an unknown kind, names that repeat, and a pictured number that is no scalar.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    pictured: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.names) != len(self.kinds) or len(set(self.names)) != len(self.names):
            raise UserError("A state needs one kind for each of its names, and each name once.")
        if unknown := set(self.kinds) - set(STATE_KINDS):
            raise UserError(
                f"A state's kinds are {', '.join(STATE_KINDS)}, not {', '.join(sorted(unknown))}."
            )
        scalars = {name for name, kind in zip(self.names, self.kinds, strict=True) if kind == "scalar"}
        if wrong := set(self.pictured) - scalars:
            raise UserError(f"Only scalars are read off pictures, not {', '.join(sorted(wrong))}.")

    def __len__(self) -> int:
        return len(self.names)

    def indices(self, kind: str) -> list[int]:
        """Indices of the numbers of one kind, without pictured ones."""
        pairs = enumerate(zip(self.names, self.kinds, strict=True))
        return [i for i, (name, its) in pairs if its == kind and name not in self.pictured]

    @property
    def pictured_indices(self) -> list[int]:
        """Indices of the pictured scalars."""
        """Indices of the pictured scalars."""
        return [self.names.index(name) for name in self.pictured]

    def to_dict(self) -> dict[str, Any]:
        """As plain lists, for JSON and for StateConfig."""
        """As plain lists, for JSON and for StateConfig."""
        return {key: list(value) for key, value in asdict(self).items()}

    @classmethod
    def of(cls, kinds: Mapping[str, str], pictured: Sequence[str] = PICTURED) -> StateSpec:
        """From the `state_kinds` of a recording or world (name → kind); `pictured`: names read off frames."""
        scalars = [name for name, kind in kinds.items() if kind == "scalar" and name in pictured]
        return cls(tuple(kinds), tuple(kinds.values()), tuple(scalars))

    @classmethod
    def from_dict(cls, plain: dict[str, Sequence[str]]) -> StateSpec:
        """The reverse of `to_dict`; UserError as above."""
        """The reverse of `to_dict`; UserError as above."""
        return cls(**{key: tuple(value) for key, value in plain.items()})


class StateScales(nn.Module):
    """Units and ranges of a world's state, as buffers, saved with the weights; `fit` sets them.

    `offset`, `scale` (S,): (state - offset) / scale is about in [-1, 1]; `low`, `high` (S,): range of the
    data; `step` (S,): the large step, the 99th percentile of changes within a frame. Positions share one
    scale and one step, and so do velocities.
    """

    def __init__(self, spec: StateSpec) -> None:
        super().__init__()
        self.spec = spec
        for name in ("offset", "low"):
            self.register_buffer(name, torch.zeros(len(spec)))
        for name in ("scale", "high", "step"):
            self.register_buffer(name, torch.ones(len(spec)))

    @torch.no_grad()
    def fit(self, states: Tensor, resets: Tensor) -> None:
        """Measures states (n, S), raw units, in order; resets (n,) bool: True where an episode starts.

        Raises UserError where no episode has two frames, or a number is not finite.
        """
        follows = ~resets[1:].bool()
        if len(states) < 2 or not follows.any() or not torch.isfinite(states).all():
            raise UserError("The recordings hold no usable states: some are missing or not finite.")
        change = difference(self.spec, states[1:], states[:-1])[follows].abs()  # (n, S)
        self.low.copy_(states.amin(0))
        self.high.copy_(states.amax(0))
        self.offset.copy_((self.low + self.high) / 2)
        self.scale.copy_((self.high - self.low) / 2)
        self.step.copy_(_percentile(change, 0.99))
        angles = self.spec.indices("angle")
        self.offset[angles], self.scale[angles], self.low[angles], self.high[angles] = 0.0, 180.0, 0.0, 360.0
        for kind in ("position", "velocity"):
            places = self.spec.indices(kind)
            if places:  # one scale for both axes, so that rotations keep lengths
                self.scale[places] = self.scale[places].max()
                self.step[places] = self.step[places].max()
        self.offset[self.spec.indices("velocity")] = 0.0
        self.scale[self.scale < 1e-6] = 1.0
        self.step.copy_(torch.where(self.step < 1e-4 * self.scale, self.scale, self.step))

    def normalise(self, state: Tensor) -> Tensor:
        """States (..., S), raw units → (..., S), about in [-1, 1]."""
        return (state - self.offset) / self.scale


def _percentile(values: Tensor, share: float) -> Tensor:
    """The quantile `share` of each column: (n, S) → (S,). torch.quantile refuses large inputs."""
    return values.sort(0).values[round(share * (len(values) - 1))]


def pick(values: Tensor, places: Sequence[int]) -> Tensor:
    """values[..., places]: (..., S) → (..., len(places)), without an index tensor, since copying one to the
    GPU cannot be captured in a CUDA graph.
    """
    first, count = (places[0] if places else 0), len(places)
    if list(places) == list(range(first, first + count)):
        return values[..., first : first + count]
    return torch.stack([values[..., i] for i in places], -1)


def difference(spec: StateSpec, state: Tensor, previous: Tensor) -> Tensor:
    """state - previous (..., S), angles the short way round, in [-180, 180)."""
    change = state - previous
    for i in spec.indices("angle"):
        change[..., i] = (change[..., i] + 180) % 360 - 180
    return change


def turned(plane: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Vectors (..., n), their first two numbers rotated by the angle of cos, sin (...,); unchanged if n
    < 2.
    """
    if plane.shape[-1] < 2:
        return plane
    x, y = plane[..., 0], plane[..., 1]
    both = torch.stack([x * cos - y * sin, x * sin + y * cos], -1)
    return torch.cat([both, plane[..., 2:]], -1)


def heading(spec: StateSpec, state: Tensor) -> tuple[Tensor, Tensor]:
    """States (..., S) → cos and sin (...,) of the heading, the first angle; of 0 without one."""
    angles = spec.indices("angle")
    radians = torch.deg2rad(state[..., angles[0]]) if angles else torch.zeros_like(state[..., 0])
    return radians.cos(), radians.sin()


def waves(x: Tensor, frequencies: Tensor) -> Tensor:
    """(..., n) → sines, then cosines, at every frequency (..., 2 · n · len(frequencies))."""
    phase = (x[..., None] * frequencies).flatten(-2)
    return torch.cat([phase.sin(), phase.cos()], -1)


def octaves(x: Tensor) -> Tensor:
    """Normalised positions (..., n) → Fourier features (..., 2 · n · OCTAVES); the longest wave spans the
    map.
    """
    return waves(x, 2.0 ** torch.arange(OCTAVES, device=x.device) * (math.pi / 2))


def state_features(scales: StateScales, state: Tensor, previous: Tensor) -> Tensor:
    """A state and that of an earlier frame (..., S), raw units → features for the generator (..., F).

    They are, in order: the position and its octaves; harmonics of the angles; all other numbers, normalised;
    the step from `previous` along and across its heading, and the turn, with sines and cosines of these.
    """
    spec = scales.spec
    position, angle = spec.indices("position"), spec.indices("angle")
    plain = [i for i in range(len(spec)) if i not in position + angle]
    where = scales.normalise(state)
    cos, sin = heading(spec, previous)
    change = difference(spec, state, previous) / scales.step
    moved = torch.cat([turned(pick(change, position), cos, -sin), pick(change, angle)], -1)
    parts = [pick(where, position), octaves(pick(where, position))]
    harmonics = torch.arange(1, HARMONICS + 1, device=state.device)
    parts += [waves(torch.deg2rad(pick(state, angle)), harmonics), pick(where, plain)]
    slow = math.pi * torch.arange(1, STEP_HARMONICS + 1, device=state.device)
    parts += [moved, waves(moved.clamp(-4, 4), slow)]
    return torch.cat(parts, -1)


def features_width(spec: StateSpec) -> int:
    """How many features `state_features` gives."""
    position, angle = len(spec.indices("position")), len(spec.indices("angle"))
    moved = (position + angle) * (1 + 2 * STEP_HARMONICS)
    return position * (1 + 2 * OCTAVES) + 2 * HARMONICS * angle + len(spec) - position - angle + moved


def scene_columns(spec: StateSpec) -> list[int]:
    """Indices, in `state_features`, of the numbers that determine what is seen: all but velocities and
    steps.
    """
    position, angle = len(spec.indices("position")), len(spec.indices("angle"))
    turn = position * (1 + 2 * OCTAVES) + 2 * HARMONICS * angle
    plain = [kind for kind in spec.kinds if kind not in ("position", "angle")]
    return list(range(turn)) + [turn + i for i, kind in enumerate(plain) if kind != "velocity"]
