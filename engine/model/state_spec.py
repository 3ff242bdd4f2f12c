"""What a world's state consists of, its units and ranges, and its features as conditioning."""

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
HARMONICS = 8  # of an angle
STEP_HARMONICS = 2  # of a step between two frames


@dataclass(frozen=True)
class StateSpec:
    """The numbers of a state in order, and of what kind each one is.

    Positions lie on a fixed map; the first two span the plane that the first angle (degrees, counted from
    the first axis to the second) is a heading in, and the first two velocities lie in it, too. `pictured`
    are scalars that keys do not decide (health): they are read off pictures; every other number follows keys.
    Raises UserError for an unknown kind, and for a pictured number that is no scalar.
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
        """Places of all numbers of one kind; of scalars, those that follow keys."""
        pairs = enumerate(zip(self.names, self.kinds, strict=True))
        return [i for i, (name, its) in pairs if its == kind and name not in self.pictured]

    @property
    def pictured_indices(self) -> list[int]:
        return [self.names.index(name) for name in self.pictured]

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) for key, value in asdict(self).items()}

    @classmethod
    def of(cls, kinds: Mapping[str, str], pictured: Sequence[str] = PICTURED) -> StateSpec:
        """From a recording's or world's `state_kinds`, in their order."""
        scalars = [name for name, kind in kinds.items() if kind == "scalar" and name in pictured]
        return cls(tuple(kinds), tuple(kinds.values()), tuple(scalars))

    @classmethod
    def from_dict(cls, plain: dict[str, Sequence[str]]) -> StateSpec:
        return cls(**{key: tuple(value) for key, value in plain.items()})


class StateScales(nn.Module):
    """Offsets, scales and ranges of a world's states, as buffers: set once by `fit`, kept with the weights.

    `offset`, `scale` (S,): (state - offset) / scale is about in [-1, 1]; `low`, `high` (S,): range of the
    data; `step` (S,): a large change within one frame. Positions share one scale, as do velocities.
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
        """Measures the data: states (n, S) in raw units, in order; resets (n,) bool, where an episode starts.

        Raises UserError where there are no two frames of one episode or a number is not finite.
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
            if places:  # one scale for both axes, so that turning the frame keeps lengths
                self.scale[places] = self.scale[places].max()
                self.step[places] = self.step[places].max()
        self.offset[self.spec.indices("velocity")] = 0.0
        self.scale[self.scale < 1e-6] = 1.0
        self.step.copy_(torch.where(self.step < 1e-4 * self.scale, self.scale, self.step))

    def normalise(self, state: Tensor) -> Tensor:
        """(..., S) raw → (..., S) about in [-1, 1]."""
        return (state - self.offset) / self.scale


def _percentile(values: Tensor, share: float) -> Tensor:
    """(n, S) → (S,); torch.quantile refuses large inputs."""
    return values.sort(0).values[round(share * (len(values) - 1))]


def pick(values: Tensor, places: Sequence[int]) -> Tensor:
    """(..., S) → (..., len(places)), without an index tensor, whose copy to a GPU no graph can capture."""
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
    """Vectors (..., n) with their first two numbers turned by the angle of cos, sin (...,); n < 2: as is."""
    if plane.shape[-1] < 2:
        return plane
    x, y = plane[..., 0], plane[..., 1]
    both = torch.stack([x * cos - y * sin, x * sin + y * cos], -1)
    return torch.cat([both, plane[..., 2:]], -1)


def heading(spec: StateSpec, state: Tensor) -> tuple[Tensor, Tensor]:
    """(..., S) → cos and sin (...,) of the first angle; of 0 where there is none."""
    angles = spec.indices("angle")
    radians = torch.deg2rad(state[..., angles[0]]) if angles else torch.zeros_like(state[..., 0])
    return radians.cos(), radians.sin()


def waves(x: Tensor, frequencies: Tensor) -> Tensor:
    """(..., n) → sines and cosines of every frequency (..., 2 n len(frequencies))."""
    phase = (x[..., None] * frequencies).flatten(-2)
    return torch.cat([phase.sin(), phase.cos()], -1)


def octaves(x: Tensor) -> Tensor:
    """Normalised positions (..., n) → Fourier features (..., 2 n OCTAVES); the slowest wave spans the map."""
    return waves(x, 2.0 ** torch.arange(OCTAVES, device=x.device) * (math.pi / 2))


def state_features(scales: StateScales, state: Tensor, previous: Tensor) -> Tensor:
    """What a generator is told of a state: (..., S) and the state of an earlier frame, raw → (..., F).

    Where (octaves of the position), which way (harmonics of the angles), the step from `previous` to it in
    the earlier frame's own axes, with slow sines and cosines of it, and all but position and angle plain.
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
    """F of `state_features`."""
    position, angle = len(spec.indices("position")), len(spec.indices("angle"))
    moved = (position + angle) * (1 + 2 * STEP_HARMONICS)
    return position * (1 + 2 * OCTAVES) + 2 * HARMONICS * angle + len(spec) - position - angle + moved


def scene_columns(spec: StateSpec) -> list[int]:
    """Places in `state_features` of what a scene is known by: positions, angles, and all but velocities."""
    position, angle = len(spec.indices("position")), len(spec.indices("angle"))
    turn = position * (1 + 2 * OCTAVES) + 2 * HARMONICS * angle
    plain = [kind for kind in spec.kinds if kind not in ("position", "angle")]
    return list(range(turn)) + [turn + i for i, kind in enumerate(plain) if kind != "velocity"]
