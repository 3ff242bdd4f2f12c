"""Error of the predicted state under the true keys, and how often it leaves the rooms:
python -m engine.evaluation.state CHECKPOINT DATA
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..config import UserError
from ..data.dataset import true_recordings
from ..data.recording import Recording
from ..data.state_logs import StateLogs
from ..errors import run_program
from ..model.checkpoint import Checkpoint
from ..model.networks import load_states
from ..model.state import StateModel
from ..model.state_spec import difference, pick

CELL = 1.0  # side, in large steps, of the cells in which visited places are counted
BATCH = 256
GAMES = 8  # games in which escapes are counted
REST = 64  # frames until a body is at rest


def state_of(checkpoint: str | Path, data: str | Path, minutes: float = 10.0) -> dict[str, float]:
    """Figures of a checkpoint's state network on the held-out recordings in `data`. Raises UserError where
    either has no state.
    """
    made = Checkpoint(checkpoint)
    model = load_states(made)
    if model is None:
        raise UserError(f"{checkpoint} was trained on a world that tells no state; there is none to measure.")
    known, unseen = ([Recording(path) for path in part] for part in true_recordings(str(data), made.world))
    names, keys = model.spec.names, tuple(made.world.keys)
    visited = StateLogs.read(known + unseen, names, keys)
    if visited is None:
        raise UserError(f"No recording in {data} tells its world's state; collect new ones.")
    logs = StateLogs.read(unseen, names, keys) or visited
    return evaluate_state(model, logs, visited, fps=made.world.fps, minutes=minutes)


@torch.no_grad()
def evaluate_state(
    model: StateModel,
    logs: StateLogs,
    visited: StateLogs,
    horizons: Sequence[int] = (8, 64, 1000),
    warm: int = 16,
    fps: float = 17.5,
    minutes: float = 10.0,
) -> dict[str, float]:
    """Median and 95th percentile of the error after each horizon, and escapes, on held-out logs.

    Each game begins with `warm` recorded frames; after these the network has only keys. Horizons longer than
    all episodes are left out. Positions and `idle_drift` are in map units, angles in degrees, all else in raw
    units. `visited`: logs of all places; see `escapes`.
    """
    figures: dict[str, float] = {}
    model.eval()
    for horizon in horizons:
        starts = (logs.left >= warm + horizon).nonzero()[:, 0]
        starts = starts[:: max(1, min(horizon, len(starts) // 400))]
        if not len(starts):
            continue
        errors = [_errors(model, logs, part, warm, horizon) for part in starts.split(BATCH)]
        figures[f"stretches_{horizon}"] = len(starts)
        for name in errors[0]:
            error = torch.cat([part[name] for part in errors])
            figures[f"{name}_{horizon}_median"] = round(error.median().item(), 3)
            figures[f"{name}_{horizon}_p95"] = round(error.quantile(0.95).item(), 3)
    if model.spec.indices("position"):
        figures |= escapes(model, logs, visited, warm, fps, minutes)
        figures["idle_drift"] = idle_drift(model, logs, warm, round(12 * minutes * fps))
    return figures


def _errors(model: StateModel, logs: StateLogs, starts: Tensor, warm: int, horizon: int) -> dict[str, Tensor]:
    """Errors after `horizon` frames (n,), by kind or by a scalar's name."""
    batch, spec = logs.cut(starts, warm + horizon, warm), model.spec
    carry = model.begin(batch.states[:, :warm], batch.actions[:, :warm])
    for action in batch.actions[:, warm:].unbind(1):
        carry = model.step(carry, action)
    off = difference(spec, carry.state, batch.states[:, -1])
    errors = {}
    for kind in ("position", "angle", "velocity"):
        if spec.indices(kind):
            errors[kind] = pick(off, spec.indices(kind)).norm(dim=-1)
    return errors | {spec.names[i]: off[:, i].abs() for i in spec.indices("scalar")}


@torch.no_grad()
def escapes(
    model: StateModel,
    logs: StateLogs,
    visited: StateLogs,
    warm: int = 16,
    fps: float = 17.5,
    minutes: float = 10.0,
) -> dict[str, float]:
    """How often and for how long games of `minutes` under the keys of `logs` leave the rooms.

    The rooms are all places within a large step of one that was visited. An escape is any stay outside.
    `never_returned` counts games that end outside or stay outside for ten seconds.
    """
    frames = round(60 * minutes * fps)
    begun = (logs.left >= warm).nonzero()[:, 0]
    if not len(begun):
        raise UserError(f"No held-out episode has {warm} frames; give longer ones.")
    starts = begun[torch.linspace(0, len(begun) - 1, GAMES).long()]
    first = logs.cut(starts, warm, warm)
    carry = model.begin(first.states, first.actions)
    rows = (starts[:, None] + warm + torch.arange(frames)) % len(logs)
    rooms = Rooms(model, visited)
    outside = torch.zeros(GAMES, frames, dtype=torch.bool)
    for frame, at in enumerate(rows.T):
        carry = model.step(carry, logs.actions[at])
        outside[:, frame] = rooms.outside(carry.state)
    left = outside & ~torch.cat([torch.zeros_like(outside[:, :1]), outside[:, :-1]], 1)
    stay = longest = torch.zeros(GAMES)
    for out in outside.T:
        stay = (stay + 1) * out
        longest = torch.maximum(longest, stay)
    never = outside[:, -1] | (longest > 10 * fps)
    return {
        "escapes_per_ten_minutes": round(left.sum().item() / GAMES * 10 / minutes, 3),
        "longest_escape_seconds": round(longest.max().item() / fps, 2),
        "never_returned": int(never.sum()),
    }


@torch.no_grad()
def idle_drift(model: StateModel, logs: StateLogs, warm: int, frames: int) -> float:
    """Median distance, in map units, that a body at rest moves in `frames` frames without keys."""
    begun = (logs.left >= warm).nonzero()[:, 0]
    starts = begun[torch.linspace(0, len(begun) - 1, 32).long()]
    first = logs.cut(starts, warm, warm)
    carry = model.begin(first.states, first.actions)
    still = torch.zeros_like(first.actions[:, 0])
    for frame in range(REST + frames):
        carry = model.step(carry, still)
        if frame == REST - 1:
            rested = carry.state
    off = pick(carry.state - rested, model.spec.indices("position"))
    return round(off.norm(dim=-1).median().item(), 3)


class Rooms:
    """Where a player can be: cells that were visited, and their neighbours."""

    def __init__(self, model: StateModel, visited: StateLogs) -> None:
        self.places = model.spec.indices("position")
        self.cell = CELL * pick(model.scales.step, self.places).max()
        self.corner = pick(visited.states, self.places).amin(0) - 2 * self.cell
        cells = self._cells(visited.states)
        self.free = torch.zeros(*(cells.amax(0) + 3).tolist(), dtype=torch.bool)
        self.free[tuple(cells.T)] = True
        pool = {1: torch.nn.functional.max_pool1d, 2: torch.nn.functional.max_pool2d}
        pool[3] = torch.nn.functional.max_pool3d
        grown = pool[len(self.places)](self.free[None, None].float(), 3, 1, 1)
        self.free = grown[0, 0] > 0

    def _cells(self, states: Tensor) -> Tensor:
        """States (n, S) → indices of their cells (n, positions)."""
        return ((pick(states, self.places) - self.corner) / self.cell).floor().long()

    def outside(self, states: Tensor) -> Tensor:
        """States (b, S) → bool (b,): whether each is outside of all rooms."""
        cells = self._cells(states)
        top = torch.tensor(self.free.shape)
        beyond = ((cells < 0) | (cells >= top)).any(1)
        return beyond | ~self.free[tuple(torch.minimum(cells.clamp_min(0), top - 1).T)]


def main(arguments: list[str]) -> int:
    """The program → its exit code."""
    if len(arguments) != 2:
        raise UserError("Give a checkpoint and recordings: python -m engine.evaluation.state CHECKPOINT DATA")
    print(json.dumps(state_of(*arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(run_program("state", lambda: main(sys.argv[1:])))
