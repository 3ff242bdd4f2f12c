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

from ..device import exact
from .state_spec import OCTAVES, StateScales, StateSpec, pick, turned, waves

PERIODS = range(3, 21)  # frames; what swings with a fixed period (a walker's bob) follows one of these clocks
AGEING = 0.25  # share by which a held key's age comes nearer to 1 in a frame: many turn slowly at first
DEAD_ZONE = 0.02  # changes below this share of a large one become nothing, so that standing is standing
LARGEST = 3.0  # large steps: no change within a frame is beyond
EDGE = 4.0  # large steps from the edge of the known map within which the walls' part is told of it
SOLVED_FRAMES = 50_000  # at most so many tell how a free body moves
UNBOUNDED = 1e6  # beyond any angle; infinity would not survive a moving average
UNTOUCHED = 2.0  # by which a wall is unlikely to matter at first


class StateCarry(NamedTuple):
    """Between two frames: hidden (b, H) and the last frame's state (b, S) in raw units."""

    hidden: Tensor
    state: Tensor


class StateModel(nn.Module):
    """Keys → next state. Pictured scalars are left as they are: whoever reads pictures writes them in.

    Inside, a state is (b, M) without the pictured scalars and in normalised units: positions, angles (in
    half turns, not wrapped), scalars, velocities. `hidden` is memory, clocks, ages of held keys, and the last
    turn (where no velocity is known, also the last step).
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
        self.back = [every.index(i) for i in range(len(spec))]
        self.added = len(self.order) - self.velocities  # numbers that a frame adds to; velocities are set
        self.moved = self.positions + self.angles
        self.known = self.positions if self.velocities else 0  # of a step: velocity tells as much
        told = keys + self.velocities + self.scalars + self.moved - self.known
        self.kept = width + 2 * len(PERIODS) + keys  # memory, clocks, and how long each key is held
        self.remember = nn.Linear(told + self.kept, 2 * width + 3 * len(PERIODS))
        self.clock_start = nn.Parameter(0.1 * torch.randn(2 * len(PERIODS)))
        self.free = nn.Linear(told + self.kept, len(self.order))  # a free body's motion is nearly linear
        self.free_rest = _mlp(told + self.kept, 2 * width, len(self.order), layers=2)
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
        """Sets units, ranges and the linear part of free motion from the data (n, S), (n, k), (n,).

        The linear part is solved for, not trained: least squares over frames that begin away from the edge of
        the known map, if there are any. See StateScales.fit for what is refused.
        """
        scales, n = self.scales, self.positions
        scales.fit(states, resets)
        self.low.copy_(self._inner(scales.low))
        self.high.copy_(self._inner(scales.high))
        self.low[n : self.moved], self.high[n : self.moved] = -UNBOUNDED, UNBOUNDED  # angles go round
        self.unit.copy_(pick(scales.step / scales.scale, self.order))
        self.unit[self.added :] = 1.0  # velocities are set, not added to
        place = self._inner(states[1:-1])[:, :n]
        edge = (EDGE * self.unit[:n]).clamp_max(0.5)
        open_ = ((place - self.low[:n] > edge) & (self.high[:n] - place > edge)).all(1)
        runs = ~(resets[1:-1] | resets[2:]).bool()  # the frames around it are of its episode
        follows = ((runs & open_) if (runs & open_).any() else runs).nonzero()[:, 0]
        follows = follows[:: max(1, -(-len(follows) // SOLVED_FRAMES))]
        if not len(follows):
            return
        first, before, after = (
            self._inner(part)[follows] for part in (states[:-2], states[1:-1], states[2:])
        )
        cos, sin = self._heading(before)
        last = self._felt(first, before, *self._heading(first))
        told = self._told(last, before, actions[2:][follows], cos, sin)
        told = torch.cat([told, torch.ones_like(told[:, :1])], 1)  # (n, told + 1)
        change = [self._moved(before, after, cos, sin)]
        change += [((after - before) / self.unit)[:, self.moved : self.added]]
        change = torch.cat([*change, turned(after[:, self.added :], cos, -sin)], 1)
        told, change = told.double(), change.double()
        ridge = 1e-7 * len(told) * torch.eye(told.shape[1], dtype=told.dtype, device=told.device)
        solved = torch.linalg.solve(told.T @ told + ridge, told.T @ change).float()
        self.free.weight.zero_()
        self.free.weight[:, : told.shape[1] - 1] = solved[:-1].T
        self.free.bias.copy_(solved[-1])

    @exact
    def begin(self, states: Tensor, actions: Tensor) -> StateCarry:
        """Recorded states (b, t, S) and the actions (b, t, k) that caused them, t >= 1 → carry."""
        inner = self._inner(states)
        previous = torch.cat([inner[:, :1], inner[:, :-1]], 1)
        hidden, _ = self._recall(self._start(len(states)), previous, inner, actions)
        return StateCarry(hidden, states[:, -1])

    @exact
    def next_states(self, states: Tensor, actions: Tensor) -> Tensor:
        """Recorded states (b, t + 1, S) and actions (b, t + 1, k) → what each of the last t frames would be,
        predicted from the recorded ones before it (b, t, S). All frames at once: cheap to learn from.
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
        """Carry, actions (b, t, k) → states (b, t, S)."""
        if not actions.shape[1]:
            return carry.state[:, None].expand(-1, 0, -1)
        hidden, inner, rows = carry.hidden, self._inner(carry.state), []
        for action in actions.unbind(1):
            hidden, inner = self._advance(hidden, inner, action)
            rows.append(inner)
        return self._outer(torch.stack(rows, 1), carry.state[:, None].expand(-1, len(rows), -1))

    def _inner(self, state: Tensor) -> Tensor:
        """(..., S) → (..., M)."""
        return pick(self.scales.normalise(state), self.order)

    def _outer(self, inner: Tensor, last: Tensor) -> Tensor:
        """(..., M) and a state (..., S) whose pictured scalars stay → (..., S)."""
        scales, n, a = self.scales, self.positions, self.angles
        state = inner * pick(scales.scale, self.order) + pick(scales.offset, self.order)
        wrapped = state[..., n : n + a] % 360
        wrapped = wrapped * (wrapped < 360)  # of a tiny negative angle the remainder is 360 itself
        parts = [state[..., :n], wrapped, state[..., n + a :], pick(last, self.spec.pictured_indices)]
        return pick(torch.cat(parts, -1), self.back)

    def _start(self, games: int) -> Tensor:
        """Hidden (b, H) before the first frame."""
        return F.pad(self.clock_start, (self.width, self.keys + self.moved - self.known)).expand(games, -1)

    def _recall(
        self, hidden: Tensor, previous: Tensor, inner: Tensor, actions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hidden (b, H) before a run of given inner states (b, t, M), the states before each of them, and
        actions (b, t, k) → hidden after them, and what was known when each was due (b, t, ..).
        """
        cos, sin = self._heading(previous)
        moved = self._felt(previous, inner, cos, sin)
        last = torch.cat([hidden[:, None, self.kept :], moved[:, :-1]], 1)
        told = self._told(last, previous, actions, cos, sin)
        kept, rows = hidden[:, : self.kept], []
        for now in told.unbind(1):
            kept = self._remember(kept, now)
            rows.append(kept)
        return torch.cat([kept, moved[:, -1]], 1), torch.cat([told, torch.stack(rows, 1)], 2)

    def _advance(self, hidden: Tensor, inner: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """One frame: hidden (b, H), inner (b, M), action (b, k) → the next hidden and inner."""
        cos, sin = self._heading(inner)
        told = self._told(hidden[:, self.kept :], inner, action, cos, sin)
        kept = self._remember(hidden[:, : self.kept], told)
        new = self._move(inner, torch.cat([told, kept], 1), cos, sin)
        return torch.cat([kept, self._felt(inner, new, cos, sin)], 1), new

    def _move(self, inner: Tensor, known: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Inner (b, M), all that is known (b, ..), cos and sin (b,) of the heading → the next inner."""
        out = self.free(known) + self.free_rest(known)
        n = self.positions
        step, velocity = turned(out[:, :n], cos, sin), turned(out[:, self.added :], cos, sin)
        if n:
            step, velocity = self._against_walls(inner[:, :n], step, velocity)
        change = torch.cat([step, out[:, n : self.added], velocity], 1).clamp(-LARGEST, LARGEST)
        change = _still(change) * self.unit
        new = torch.cat([inner[:, : self.added] + change[:, : self.added], change[:, self.added :]], 1)
        return torch.minimum(torch.maximum(new, self.low), self.high)  # nothing runs away

    def _heading(self, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Inner (..., M) → cos and sin (...,)."""
        angle = inner[..., self.positions] * math.pi if self.angles else torch.zeros_like(inner[..., 0])
        return angle.cos(), angle.sin()

    def _told(self, last: Tensor, inner: Tensor, action: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What memory and free motion know (..., n): keys, velocity as the body feels it, scalars, last."""
        velocity = turned(inner[..., self.added :], cos, -sin)
        return torch.cat([action, velocity, inner[..., self.moved : self.added], last], -1)

    def _moved(self, inner: Tensor, new: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Step in the body's axes and turn (..., moved) from one inner state to the next, in large steps."""
        change = (new - inner)[..., : self.moved]
        n = self.positions
        turn = (change[..., n:] + 1) % 2 - 1
        return torch.cat([turned(change[..., :n], cos, -sin), turn], -1) / self.unit[: self.moved]

    def _felt(self, inner: Tensor, new: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What the body remembers of a move: `_moved` without what its velocity tells."""
        return self._moved(inner, new, cos, sin)[..., self.known :]

    def _remember(self, kept: Tensor, told: Tensor) -> Tensor:
        """Memory, clocks and ages of held keys (b, kept), told → the same one frame on."""
        width, count = self.width, len(PERIODS)
        memory, clock, age = kept.split([width, 2 * count, self.keys], 1)
        out = self.remember(torch.cat([told, kept], 1))
        gate, fresh, clock_gate, clock_fresh = out.split([width, width, count, 2 * count], 1)
        memory = memory + gate.sigmoid() * (fresh.tanh() - memory)
        x, y = clock.chunk(2, 1)
        clock = clock * self.clock_turn[0] + torch.cat([-y, x], 1) * self.clock_turn[1]
        clock = clock + (clock_gate - 4).sigmoid().repeat(1, 2) * (clock_fresh.tanh() - clock)
        age = told[:, : self.keys] * (age + AGEING * (1 - age))  # a key let go is young again
        return torch.cat([memory, clock, age], 1)

    def _against_walls(self, here: Tensor, step: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised position (b, n), step and velocity in the open along the map's axes, in large steps and
        scales → what walls leave of them.
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
    """A matrix (b, n n) times vector (b, n) plus an offset (b, n); `bend` holds both."""
    n = vector.shape[1]
    return (bend[:, : n * n].unflatten(1, (n, n)) * vector[:, None]).sum(2) + bend[:, n * n :]


def _still(x: Tensor) -> Tensor:
    """Values as they are, but those below DEAD_ZONE vanish, with some of their gradient kept alive."""
    return x - x * DEAD_ZONE**4 / (x**4 + DEAD_ZONE**4)


def _mlp(inputs: int, width: int, outputs: int, layers: int) -> nn.Sequential:
    """A perceptron that says nothing before it is trained."""
    sizes = [inputs] + [width] * layers
    parts = [p for a, b in zip(sizes, sizes[1:], strict=False) for p in (nn.Linear(a, b), nn.SiLU())]
    last = nn.Linear(width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*parts, last)
