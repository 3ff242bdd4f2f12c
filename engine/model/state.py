"""StateModel: a small recurrent network that predicts a world's state from keys.

A frame's motion is computed in two parts. How the body would move in the open (steps along and across its
heading, turn, new velocity) depends on keys, velocity and memory, but not on the place, so that it is learned
once for all places. Then walls change that motion, depending on where the step begins and where it would end.
Both parts are learned from recorded states. Numbers that keys do not decide (health) are not predicted.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device import exact
from .state_spec import OCTAVES, StateScales, StateSpec, pick, turned, waves

PERIODS = range(3, 21)  # of the clocks, in frames: for swings of fixed period, such as a walker's bob
AGEING = 0.25  # a held key's age moves towards 1 by this share a frame: many games turn slowly at first
DEAD_ZONE = 0.02  # changes below this share of a large step become zero, so that standing still is exact
LARGEST = 3.0  # large steps: limit of the change within a frame
EDGE = 4.0  # large steps: up to this distance, the walls' network sees how far the map's edge is
SOLVED_FRAMES = 50_000  # most frames in the least squares problem of free motion
UNBOUNDED = 1e6  # limit of angles, which no angle reaches; infinity would not survive a moving average
UNTOUCHED = 2.0  # bias against walls: before training they have little influence


class StateCarry(NamedTuple):
    """What is carried from frame to frame: hidden (b, H), and the last frame's state (b, S) in raw units."""

    hidden: Tensor
    state: Tensor


class StateModel(nn.Module):
    """Carry and keys → the next frame's carry. Pictured scalars (StateSpec) stay as they are: the caller
    reads them off frames and writes them into the state.

    Inner states (b, M) have no pictured scalars, normalised units and a fixed order: positions, angles (in
    half turns, not wrapped), scalars, velocities. `hidden` (b, H) holds memory, clocks, ages of held keys,
    and the last turn; in worlds without velocity also the last step.
    """

    def __init__(self, spec: StateSpec, keys: int, width: int = 48, wall_width: int = 128) -> None:
        super().__init__()
        self.spec, self.keys, self.width = spec, keys, width
        self.scales = StateScales(spec)
        kinds = ("position", "angle", "scalar", "velocity")
        self.positions, self.angles, self.scalars, self.velocities = (
            len(spec.indices(kind)) for kind in kinds
        )
        self.order = [i for kind in kinds for i in spec.indices(kind)]
        every = self.order + spec.pictured_indices
        self.inverse_order = [every.index(i) for i in range(len(spec))]
        # numbers to which a change is added; velocities are set
        self.added = len(self.order) - self.velocities
        self.moved = self.positions + self.angles
        # numbers of the last step that are not remembered, as velocity says the same
        self.implied = self.positions if self.velocities else 0
        self.recurrent_size = width + 2 * len(PERIODS) + keys  # memory, clocks, ages of held keys
        known = self.recurrent_size + keys + self.velocities + self.scalars + self.moved - self.implied
        self.remember = nn.Linear(known, 2 * width + 3 * len(PERIODS))
        self.clock_start = nn.Parameter(0.1 * torch.randn(2 * len(PERIODS)))
        self.free = nn.Linear(known, len(self.order))  # a free body's motion is nearly linear
        self.free_rest = _mlp(known, 2 * width, len(self.order), layers=2)
        near = 2 * self.positions * (2 * OCTAVES + 2) + self.positions + self.velocities
        self.bends = [n * n + n for n in (self.positions, self.velocities)]
        self.walls = _mlp(near, wall_width, sum(self.bends) + 1, layers=2)
        for name in ("low", "high", "unit"):  # range of the data and large steps, as inner numbers
            self.register_buffer(name, torch.ones(len(self.order)))
        turn = 2 * math.pi / torch.tensor(list(PERIODS)).repeat(2)
        self.register_buffer("clock_turn", torch.stack([turn.cos(), turn.sin()]), persistent=False)
        waves_of_map = 2.0 ** torch.arange(OCTAVES) * (math.pi / 2)
        self.register_buffer("frequencies", waves_of_map, persistent=False)

    @torch.no_grad()
    def fit(self, states: Tensor, actions: Tensor, resets: Tensor) -> None:
        """Measures units and ranges, and solves for the linear part of free motion by least squares, on
        recorded states (n, S), actions (n, k) and resets (n,), in order; the latter on frames that begin away
        from the edge of the map, if there are any. Raises UserError as StateScales.fit does.
        """
        scales, n = self.scales, self.positions
        scales.fit(states, resets)
        self.low.copy_(self._inner(scales.low))
        self.high.copy_(self._inner(scales.high))
        self.low[n : self.moved], self.high[n : self.moved] = -UNBOUNDED, UNBOUNDED  # angles have no limits
        self.unit.copy_(pick(scales.step / scales.scale, self.order))
        self.unit[self.added :] = 1.0  # velocities are set, not added to
        place = self._inner(states[1:-1])[:, :n]
        edge = (EDGE * self.unit[:n]).clamp_max(0.5)
        open_ = ((place - self.low[:n] > edge) & (self.high[:n] - place > edge)).all(1)
        runs = ~(
            resets[1:-1] | resets[2:]
        ).bool()  # the frame before and the one after are of the same episode
        follows = ((runs & open_) if (runs & open_).any() else runs).nonzero()[:, 0]
        follows = follows[:: max(1, -(-len(follows) // SOLVED_FRAMES))]
        if not len(follows):
            return
        first, before, after = (
            self._inner(part)[follows] for part in (states[:-2], states[1:-1], states[2:])
        )
        cos, sin = self._heading(before)
        last = self._last_move(first, before, *self._heading(first))
        inputs = self._inputs(last, before, actions[2:][follows], cos, sin)
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)  # (n, inputs + 1)
        change = [self._moved(before, after, cos, sin)]
        change += [((after - before) / self.unit)[:, self.moved : self.added]]
        change = torch.cat([*change, turned(after[:, self.added :], cos, -sin)], 1)
        inputs, change = inputs.double(), change.double()
        ridge = 1e-7 * len(inputs) * torch.eye(inputs.shape[1], dtype=inputs.dtype, device=inputs.device)
        solved = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ change).float()
        self.free.weight.zero_()
        self.free.weight[:, : inputs.shape[1] - 1] = solved[:-1].T
        self.free.bias.copy_(solved[-1])

    @exact
    def begin(self, states: Tensor, actions: Tensor) -> StateCarry:
        """Recorded states (b, t, S) and the actions (b, t, k) that caused them, t >= 1 → the carry after
        them.
        """
        inner = self._inner(states)
        previous = torch.cat([inner[:, :1], inner[:, :-1]], 1)
        hidden, _ = self._recall(self._start(len(states)), previous, inner, actions)
        return StateCarry(hidden, states[:, -1])

    @exact
    def next_states(self, states: Tensor, actions: Tensor) -> Tensor:
        """Recorded states (b, t + 1, S) and actions (b, t + 1, k) → each of the last t states, predicted from
        the recorded ones before it (b, t, S). Faster than `unroll`, as frames do not wait for each other.
        """
        inner = self._inner(states)
        previous = torch.cat([inner[:, :1], inner[:, :-1]], 1)
        _, known = self._recall(self._start(len(states)), previous, inner, actions)
        before = inner[:, :-1].flatten(0, 1)
        made = self._move(before, known[:, 1:].flatten(0, 1), *self._heading(before))
        return self._outer(made.unflatten(0, (len(states), -1)), states[:, 1:])

    @exact
    def step(self, carry: StateCarry, action: Tensor) -> StateCarry:
        """Carry and the action (b, k) that causes the next frame → the next frame's carry."""
        hidden, inner = self._advance(carry.hidden, self._inner(carry.state), action)
        return StateCarry(hidden, self._outer(inner, carry.state))

    @exact
    def unroll(self, carry: StateCarry, actions: Tensor) -> Tensor:
        """Carry and actions (b, t, k) → the next t states, each predicted from the one before (b, t, S)."""
        if not actions.shape[1]:
            return carry.state[:, None].expand(-1, 0, -1)
        hidden, inner, rows = carry.hidden, self._inner(carry.state), []
        for action in actions.unbind(1):
            hidden, inner = self._advance(hidden, inner, action)
            rows.append(inner)
        return self._outer(torch.stack(rows, 1), carry.state[:, None].expand(-1, len(rows), -1))

    def _inner(self, state: Tensor) -> Tensor:
        """A state (..., S) → inner state (..., M)."""
        return pick(self.scales.normalise(state), self.order)

    def _outer(self, inner: Tensor, last: Tensor) -> Tensor:
        """An inner state (..., M), and pictured scalars from the state `last` (..., S) → state (..., S)."""
        scales, n, a = self.scales, self.positions, self.angles
        state = inner * pick(scales.scale, self.order) + pick(scales.offset, self.order)
        wrapped = state[..., n : n + a] % 360
        wrapped = wrapped * (wrapped < 360)  # the remainder of a tiny negative angle is 360 itself
        parts = [state[..., :n], wrapped, state[..., n + a :], pick(last, self.spec.pictured_indices)]
        return pick(torch.cat(parts, -1), self.inverse_order)

    def _start(self, games: int) -> Tensor:
        """Hidden (b, H) at the beginning of a game."""
        return F.pad(self.clock_start, (self.width, self.keys + self.moved - self.implied)).expand(games, -1)

    def _recall(
        self, hidden: Tensor, previous: Tensor, inner: Tensor, actions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hidden (b, H), recorded inner states (b, t, M), the inner states before each of them (b, t, M), and
        actions (b, t, k) → hidden after the last one, and what was known before each of them (b, t, known):
        inputs and recurrent part, as `_move` takes them.
        """
        cos, sin = self._heading(previous)
        moved = self._last_move(previous, inner, cos, sin)
        last = torch.cat([hidden[:, None, self.recurrent_size :], moved[:, :-1]], 1)
        inputs = self._inputs(last, previous, actions, cos, sin)
        recurrent, rows = hidden[:, : self.recurrent_size], []
        for now in inputs.unbind(1):
            recurrent = self._remember(recurrent, now)
            rows.append(recurrent)
        return torch.cat([recurrent, moved[:, -1]], 1), torch.cat([inputs, torch.stack(rows, 1)], 2)

    def _advance(self, hidden: Tensor, inner: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """One frame: hidden (b, H), inner (b, M), action (b, k) → the next hidden and inner."""
        cos, sin = self._heading(inner)
        inputs = self._inputs(hidden[:, self.recurrent_size :], inner, action, cos, sin)
        recurrent = self._remember(hidden[:, : self.recurrent_size], inputs)
        new = self._move(inner, torch.cat([inputs, recurrent], 1), cos, sin)
        return torch.cat([recurrent, self._last_move(inner, new, cos, sin)], 1), new

    def _move(self, inner: Tensor, known: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Inner (b, M), inputs and recurrent part (b, known), cos and sin (b,) of the heading → the next
        inner.
        """
        out = self.free(known) + self.free_rest(known)
        n = self.positions
        step, velocity = turned(out[:, :n], cos, sin), turned(out[:, self.added :], cos, sin)
        if n:
            step, velocity = self._against_walls(inner[:, :n], step, velocity)
        change = torch.cat([step, out[:, n : self.added], velocity], 1).clamp(-LARGEST, LARGEST)
        change = _still(change) * self.unit
        new = torch.cat([inner[:, : self.added] + change[:, : self.added], change[:, self.added :]], 1)
        return torch.minimum(torch.maximum(new, self.low), self.high)  # states stay in the range of the data

    def _heading(self, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Inner (..., M) → cos and sin (...,) of the heading."""
        angle = inner[..., self.positions] * math.pi if self.angles else torch.zeros_like(inner[..., 0])
        return angle.cos(), angle.sin()

    def _inputs(self, last: Tensor, inner: Tensor, action: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keys, velocity along and across the heading, scalars, and the `last` move (..., n)."""
        velocity = turned(inner[..., self.added :], cos, -sin)
        return torch.cat([action, velocity, inner[..., self.moved : self.added], last], -1)

    def _moved(self, inner: Tensor, new: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Two inner states in a row → step along and across the heading, and turn (..., moved), in large
        steps.
        """
        change = (new - inner)[..., : self.moved]
        n = self.positions
        turn = (change[..., n:] + 1) % 2 - 1
        return torch.cat([turned(change[..., :n], cos, -sin), turn], -1) / self.unit[: self.moved]

    def _last_move(self, inner: Tensor, new: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`_moved`, without the step where velocity says the same: the part of `hidden` about the last
        move.
        """
        return self._moved(inner, new, cos, sin)[..., self.implied :]

    def _remember(self, recurrent: Tensor, inputs: Tensor) -> Tensor:
        """One recurrent step: memory, clocks and ages of held keys (b, recurrent_size), and the inputs of a
        frame (b, n) → (b, recurrent_size).
        """
        width, count = self.width, len(PERIODS)
        memory, clock, age = recurrent.split([width, 2 * count, self.keys], 1)
        out = self.remember(torch.cat([inputs, recurrent], 1))
        gate, fresh, clock_gate, clock_fresh = out.split([width, width, count, 2 * count], 1)
        memory = memory + gate.sigmoid() * (fresh.tanh() - memory)
        x, y = clock.chunk(2, 1)
        clock = clock * self.clock_turn[0] + torch.cat([-y, x], 1) * self.clock_turn[1]
        clock = clock + (clock_gate - 4).sigmoid().repeat(1, 2) * (clock_fresh.tanh() - clock)
        age = inputs[:, : self.keys] * (age + AGEING * (1 - age))  # a released key starts at age 0 again
        return torch.cat([memory, clock, age], 1)

    def _against_walls(self, here: Tensor, step: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised position (b, n), step (b, n) in large steps and velocity (b, v), both as in the open and
        along the map's axes → step and velocity as walls change them.
        """
        n = self.positions
        low, high, unit = self.low[:n], self.high[:n], self.unit[:n]
        both = torch.stack([here, here + step * unit], 1)  # (b, 2, n)
        inside = (torch.cat([both - low, high - both], 2) / unit.repeat(2)).clamp(-EDGE, EDGE) / 2
        near = torch.cat([inside, waves(both, self.frequencies)], 2).flatten(1)
        out = self.walls(torch.cat([near, step, velocity], 1))
        bend, bend_velocity, touch = out.split([*self.bends, 1], 1)
        touch = torch.sigmoid(touch - UNTOUCHED)
        return step + touch * _bent(bend, step), velocity + touch * _bent(bend_velocity, velocity)


def _bent(bend: Tensor, vector: Tensor) -> Tensor:
    """bend (b, n · n + n): a matrix and an offset; vector (b, n) → matrix · vector + offset (b, n)."""
    n = vector.shape[1]
    return (bend[:, : n * n].unflatten(1, (n, n)) * vector[:, None]).sum(2) + bend[:, n * n :]


def _still(x: Tensor) -> Tensor:
    """x, smoothly set to zero where it is small against DEAD_ZONE; gradients do not vanish at once."""
    return x - x * DEAD_ZONE**4 / (x**4 + DEAD_ZONE**4)


def _mlp(inputs: int, width: int, outputs: int, layers: int) -> nn.Sequential:
    """A multi-layer perceptron whose output is zero before training."""
    sizes = [inputs] + [width] * layers
    parts = [p for a, b in zip(sizes, sizes[1:], strict=False) for p in (nn.Linear(a, b), nn.SiLU())]
    last = nn.Linear(width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*parts, last)
