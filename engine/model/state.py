"""The kinematic half of a world's state, predicted from keys: a small recurrent network, and what it carries.

A frame's step is made in two parts. What the body would do in the open (steps along and across its heading,
turn, new velocity) depends on keys, velocity and memory alone, so that it is learned once for every place;
then walls change it, which depends on where the step begins and would end. Both are learned from logs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .state_spec import StateScales, StateSpec, difference, heading, octaves, pick, turned

PERIODS = range(3, 21)  # frames; what swings with a fixed period (a walker's bob) follows one of these clocks
STILL = 0.02  # changes far below this share of a large one become nothing, so that standing is standing
EDGE = 4.0  # large steps from the edge of the known map within which the walls' part is told of it


class StateCarry(NamedTuple):
    """Between two frames: hidden (b, H) and the last frame's state (b, S) in raw units."""

    hidden: Tensor
    state: Tensor


class StateModel(nn.Module):
    """Keys → next state. Pictured scalars are left as they are: whoever reads pictures writes them in."""

    def __init__(self, spec: StateSpec, keys: int, width: int = 64, wall_width: int = 128) -> None:
        super().__init__()
        self.spec, self.keys, self.width = spec, keys, width
        self.scales = StateScales(spec)
        self.position, self.angle = spec.indices("position"), spec.indices("angle")
        self.velocity, self.scalar = spec.indices("velocity"), spec.indices("scalar")
        # places of a predicted state's numbers as `step` lists them
        self.order = self.position + self.angle + self.velocity + self.scalar + spec.pictured_indices
        self.back = [self.order.index(i) for i in range(len(spec))]
        moving = len(spec) - len(spec.pictured)
        told = keys + len(self.velocity) + len(self.scalar) + moving
        clocks = len(PERIODS)
        self.memory = nn.GRUCell(told, width)
        self.clock_gate = nn.Linear(width, clocks)
        self.clock_input = nn.Linear(told + width, 2 * clocks)
        self.clock_start = nn.Parameter(0.1 * torch.randn(2 * clocks))
        known = told + width + 2 * clocks
        self.free = nn.Linear(known, moving)  # much of a free body's motion is linear
        self.free_rest = _mlp(known, 2 * width, moving)
        near = len(self.position) * (2 * (2 * 7 + 2) + 1) + len(self.velocity)
        self.changes = len(self.position) ** 2 + len(self.position)
        self.changes_velocity = len(self.velocity) ** 2 + len(self.velocity)
        self.walls = _mlp(near, wall_width, self.changes + self.changes_velocity + 1, layers=3)
        nn.init.constant_(self.clock_gate.bias, -4.0)
        turn = 2 * math.pi / torch.tensor(list(PERIODS))
        self.register_buffer("clock_turn", torch.stack([turn.cos(), turn.sin()]), persistent=False)

    @property
    def hidden_width(self) -> int:
        return self.width + 2 * len(PERIODS) + len(self.order) - len(self.spec.pictured)

    def empty_carry(self, batch: int, device: torch.device) -> StateCarry:
        """Room for the carry of games side by side."""
        hidden = torch.zeros(batch, self.hidden_width, device=device)
        return StateCarry(hidden, torch.zeros(batch, len(self.spec), device=device))

    def fit(self, states: Tensor, resets: Tensor) -> None:
        """Sets units and ranges from the data; see StateScales.fit."""
        self.scales.fit(states, resets)

    def begin(self, states: Tensor, actions: Tensor) -> StateCarry:
        """Recorded states (b, t, S) and the actions (b, t, k) that caused them, t >= 1 → carry."""
        hidden = states.new_zeros(len(states), self.hidden_width)
        hidden = hidden + F.pad(self.clock_start, (self.width, hidden.shape[1] - self.width - len(self.clock_start)))
        previous = states[:, 0]
        for state, action in zip(states.unbind(1), actions.unbind(1), strict=True):
            told = self._told(hidden, previous, action)
            memory, clock = self._remember(hidden, told)
            change = pick(difference(self.spec, state, previous) / self.scales.step, self.order)
            hidden = torch.cat([memory, clock, change[:, : self.free.out_features]], 1)
            previous = state
        return StateCarry(hidden, previous)

    def step(self, carry: StateCarry, action: Tensor) -> StateCarry:
        """Carry and the action (b, k) that causes the next frame → the next frame's carry."""
        hidden, state = carry
        told = self._told(hidden, state, action)
        memory, clock = self._remember(hidden, told)
        known = torch.cat([told, memory, clock], 1)
        sizes = [len(self.position), len(self.angle), len(self.velocity), len(self.scalar)]
        step, turn, velocity, change = (self.free(known) + self.free_rest(known)).split(sizes, 1)
        cos, sin = heading(self.spec, state)
        step, velocity = turned(step, cos, sin), turned(velocity, cos, sin)
        if self.position:
            step, velocity = self._against_walls(state, step, velocity)
        scales = self.scales
        place = pick(state, self.position) + _still(step) * pick(scales.step, self.position)
        angle = (pick(state, self.angle) + _still(turn) * pick(scales.step, self.angle)) % 360
        velocity = _still(velocity) * pick(scales.scale, self.velocity)
        scalar = pick(state, self.scalar) + _still(change) * pick(scales.step, self.scalar)
        parts = [place, angle, velocity, scalar, pick(state, self.spec.pictured_indices)]
        new = pick(torch.cat(parts, 1), self.back)
        new = torch.minimum(torch.maximum(new, scales.low), scales.high)
        moved = pick(difference(self.spec, new, state) / scales.step, self.order)[:, : self.free.out_features]
        return StateCarry(torch.cat([memory, clock, moved], 1), new)

    def unroll(self, carry: StateCarry, actions: Tensor) -> Tensor:
        """Carry, actions (b, t, k) → states (b, t, S)."""
        states = []
        for action in actions.unbind(1):
            carry = self.step(carry, action)
            states.append(carry.state)
        return torch.stack(states, 1)

    def _told(self, hidden: Tensor, state: Tensor, action: Tensor) -> Tensor:
        """What memory and free motion know: keys, velocity and last change in the body's axes, scalars."""
        cos, sin = heading(self.spec, state)
        plain = self.scales.normalise(state)
        changed = hidden[:, hidden.shape[1] - self.free.out_features :]
        n, a, v = len(self.position), len(self.angle), len(self.velocity)
        parts = [action, turned(pick(plain, self.velocity), cos, -sin), pick(plain, self.scalar)]
        parts += [turned(changed[:, :n], cos, -sin), changed[:, n : n + a]]
        parts += [turned(changed[:, n + a : n + a + v], cos, -sin), changed[:, n + a + v :]]
        return torch.cat(parts, 1)

    def _remember(self, hidden: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden (b, H), told → memory (b, width) and clocks (b, 2 c), one frame on."""
        clocks = len(PERIODS)
        memory = self.memory(told, hidden[:, : self.width])
        cos, sin = self.clock_turn
        x, y = hidden[:, self.width : self.width + 2 * clocks].chunk(2, 1)
        on = torch.cat([x * cos - y * sin, x * sin + y * cos], 1)
        gate = self.clock_gate(memory).sigmoid().repeat(1, 2)
        return memory, on + gate * (self.clock_input(torch.cat([told, memory], 1)) - on)

    def _against_walls(self, state: Tensor, step: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """Step and velocity in the open (b, 2) in large steps and scales, map axes → what walls leave."""
        scales, places = self.scales, self.position
        here = pick(state, places)
        there = here + step * pick(scales.step, places)
        parts = [step, velocity]
        for place in (here, there):
            inside = torch.stack([place - pick(scales.low, places), pick(scales.high, places) - place], 1)
            inside = (inside / pick(scales.step, places)).clamp(-EDGE, EDGE).flatten(1) / 2
            parts += [inside, octaves((place - pick(scales.offset, places)) / pick(scales.scale, places))]
        out = self.walls(torch.cat(parts, 1))
        touch = torch.sigmoid(out[:, -1:] - 2)
        change, change_velocity, _ = out.split([self.changes, self.changes_velocity, 1], 1)
        return step + touch * _bent(change, step), velocity + touch * _bent(change_velocity, velocity)


def _bent(change: Tensor, vector: Tensor) -> Tensor:
    """A learned matrix (b, n n) times vector (b, n) plus a learned offset (b, n), all in `change`."""
    n = vector.shape[1]
    matrix, offset = change.split([n * n, n], 1)
    return (matrix.unflatten(1, (n, n)) * vector[:, None]).sum(2) + offset


def _still(x: Tensor) -> Tensor:
    """Values as they are, but those far below STILL vanish, with their gradient kept alive."""
    square = x.square()
    return x * square / (square + STILL**2)


def _mlp(inputs: int, width: int, outputs: int, layers: int = 2) -> nn.Sequential:
    sizes = [inputs] + [width] * layers
    parts = [p for a, b in zip(sizes, sizes[1:], strict=False) for p in (nn.Linear(a, b), nn.SiLU())]
    last = nn.Linear(width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*parts, last)
