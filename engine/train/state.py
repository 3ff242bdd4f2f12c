"""Trains the network that predicts states from keys, on logs alone: no picture is read."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import UserError
from ..model.state import StateModel
from ..model.state_spec import StateSpec, difference, heading, pick, turned


@dataclass
class StateTraining:
    """How the state network is trained. Lengths are frames."""

    max_minutes: float = 10.0
    steps: int = 100_000
    batch: int = 128  # games at the shortest unroll; as many frames, so fewer games, at longer ones
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    grad_clip: float = 1.0
    ema: float = 0.998
    warm: int = 16  # at most so many recorded frames before those that are predicted
    unroll: int = 8  # frames that it predicts on its own states at first
    longest: int = 64  # and in the last part of the run
    apart_share: float = 0.5  # of the run, at its start, in which frames are predicted from recorded ones
    apart: int = 24  # frames of a game in this part
    reset_share: float = 0.15  # of games that begin where an episode does
    noise_share: float = 0.2  # of games that begin a little beside the truth, so that it learns to return
    noise: float = 0.3  # standard deviation of that, in large steps
    huber: float = 0.2  # errors beyond so many large steps count linearly
    seed: int = 0

    def unroll_at(self, progress: float) -> int:
        """Frames to unroll at this share of the run: none, then doubling, the longest in the last quarter."""
        if progress < self.apart_share:
            return 0
        done = (progress - self.apart_share) / max(1e-9, 0.75 - self.apart_share)
        doublings = int(np.log2(self.longest / self.unroll) * min(1.0, done) + 1e-9)
        return min(self.unroll * 2**doublings, self.longest)


class StateBatch(NamedTuple):
    """Recorded states (b, warm + t, S), the actions (b, warm + t, k) that caused them, and `warm`."""

    states: Tensor
    actions: Tensor
    warm: int


class StateLogs:
    """States, actions and resets of many recordings, one after the other, and games cut from them."""

    def __init__(self, states: Tensor, actions: Tensor, resets: Tensor) -> None:
        """(n, S) float32 raw units, (n, k) float32, (n,) bool: true where an episode or recording starts."""
        self.states, self.actions, self.resets = states.float(), actions.float(), resets.bool()
        first = torch.arange(len(resets))
        borders = torch.cat([first[self.resets], torch.tensor([len(resets)])])
        place = torch.searchsorted(borders, first, right=True).clamp_max(len(borders) - 1)
        self.left = borders[place] - first  # frames of the same episode from here on

    @classmethod
    def read(cls, recordings: Iterable, spec: StateSpec, keys: tuple[str, ...]) -> StateLogs:
        """Opened recordings (`names`, `states`, `actions`, `resets`) → logs, keys laid out as `keys`.

        Frames without state are left out, as are recordings without any; a number of `spec` that a
        recording lacks raises UserError.
        """
        parts = []
        for recording in recordings:
            rows = [i for i, state in enumerate(recording.states) if state]
            if not rows:
                continue
            if missing := set(spec.names) - recording.states[rows[0]].keys():
                said = f"{recording.directory} does not record {', '.join(sorted(missing))}"
                raise UserError(f"{said}; collect it again, or train without that recording.")
            states = np.array([[recording.states[i][name] for name in spec.names] for i in rows], np.float32)
            actions = np.zeros((len(rows), len(keys)), np.float32)
            for column, name in enumerate(recording.names):
                if name in keys:
                    actions[:, keys.index(name)] = recording.actions[rows, column]
            resets = recording.resets[rows] | (np.diff(rows, prepend=-2) != 1)
            parts.append([torch.from_numpy(part) for part in (states, actions, resets)])
        if not parts:
            raise UserError("No recording there holds states; the state network needs some.")
        return cls(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def __len__(self) -> int:
        return len(self.states)

    def to(self, device: torch.device) -> StateLogs:
        """The same with states and actions in the memory of `device`; games are still drawn on the CPU."""
        moved = copy.copy(self)
        moved.states, moved.actions = self.states.to(device), self.actions.to(device)
        return moved

    def cut(self, starts: Tensor, length: int, warm: int) -> StateBatch:
        """Games that begin at the frames `starts` (b,) and are `length` frames long."""
        rows = starts[:, None] + torch.arange(length)
        return StateBatch(self.states[rows], self.actions[rows], warm)

    def batch(self, step: int, progress: float, config: StateTraining) -> StateBatch:
        """The games of iteration `step`: a pure function of seed, step and the length that is due."""
        random = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        unroll = config.unroll_at(progress)
        warm = int(torch.randint(1, config.warm + 1, (), generator=random)) if unroll else 0
        length = warm + (unroll or config.apart)
        fits = self.left >= length
        anywhere, begun = fits.nonzero()[:, 0], (fits & self.resets).nonzero()[:, 0]
        if not len(anywhere):
            raise UserError(f"No recorded episode has {length} frames; collect longer ones.")
        count = max(config.batch // 4, config.batch * config.unroll // unroll) if unroll else config.batch
        starts = anywhere[torch.randint(len(anywhere), (count,), generator=random)]
        if len(begun):
            early = begun[torch.randint(len(begun), (count,), generator=random)]
            starts = torch.where(torch.rand(count, generator=random) < config.reset_share, early, starts)
        return self.cut(starts, length, warm)


class StateLoss(nn.Module):
    """A state network and its loss on its own unrolled states."""

    def __init__(self, model: StateModel, config: StateTraining) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: StateBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """→ loss, and its parts: where the state is, and how it changed since the frame before.

        Where nothing is to be unrolled (warm 0), each frame is predicted from the recorded ones before it.
        """
        model, warm = self.model, batch.warm
        if not warm:
            made = model.next_states(batch.states, batch.actions)
            error = self._error(made, batch.states[:, 1:], batch.states[:, 1:])
            pace = _huber(error, self.config.huber / 4)
            return pace, {"pace": pace.detach()}
        true = batch.states[:, warm:]
        carry = model.begin(batch.states[:, :warm], batch.actions[:, :warm])
        carry = carry._replace(state=self._beside(carry.state))
        made = model.unroll(carry, batch.actions[:, warm:])
        made_change = difference(model.spec, made, torch.cat([carry.state[:, None], made[:, :-1]], 1))
        true_change = difference(model.spec, true, batch.states[:, warm - 1 : -1])
        place = _huber(self._error(made, true, true), self.config.huber)
        pace = _huber(self._error(made_change, true_change, true), self.config.huber / 4)
        return place + pace, {"place": place.detach(), "pace": pace.detach()}

    def _error(self, made: Tensor, true: Tensor, seen_from: Tensor) -> Tensor:
        """(b, t, follows) in large steps, angles the short way round, positions in the true body's axes."""
        spec, scales = self.model.spec, self.model.scales
        error = difference(spec, made, true) / scales.step
        places = spec.indices("position")
        cos, sin = heading(spec, seen_from)
        body = turned(pick(error, places), cos, -sin)
        columns = list(error.unbind(-1))
        for column, place in enumerate(places):
            columns[place] = body[..., column]
        follows = [i for i, name in enumerate(spec.names) if name not in spec.pictured]
        return torch.stack([columns[i] for i in follows], -1)

    def _beside(self, state: Tensor) -> Tensor:
        """Some of the games begin a little beside the truth."""
        spec, scales = self.model.spec, self.model.scales
        some = (torch.rand(len(state), 1, device=state.device) < self.config.noise_share).float()
        moved = self.config.noise * some * torch.randn_like(state) * scales.step
        columns = [i in spec.indices("position") for i in range(len(spec))]
        return state + moved * torch.tensor(columns, device=state.device)


def _huber(error: Tensor, delta: float) -> Tensor:
    return F.huber_loss(error, torch.zeros_like(error), delta=delta) / delta


def _follow(share: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A moving average that forgets its beginning: short at first, then as long as `share` says."""

    def average(mean: Tensor, value: Tensor, count: Tensor) -> Tensor:
        return mean + (value - mean) * max(1 - share, 9 / (9 + float(count)))

    return average


def train_state(
    model: StateModel, logs: StateLogs, config: StateTraining, tell: Callable[[dict], None] | None = None
) -> StateModel:
    """Fits the units of `model` to `logs`, trains it and returns the moving average of its weights."""
    device = next(model.parameters()).device
    logs = logs.to(device)
    model.fit(logs.states, logs.actions, logs.resets.to(device))
    loss = StateLoss(model, config)
    weights = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=_follow(config.ema))
    begun, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        rate = config.learning_rate * min(1.0, (step + 1) / 100) * min(1.0, 2 * (1 - progress)) ** 1.5
        for group in optimiser.param_groups:
            group["lr"] = rate
        value, parts = loss(logs.batch(step, progress, config))
        optimiser.zero_grad()
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        if torch.isfinite(norm):
            optimiser.step()
            average.update_parameters(model)
        step += 1
        minutes = (time.monotonic() - begun) / 60
        progress = max(step / config.steps, minutes / config.max_minutes)
        if tell:
            tell({"step": step, "minutes": minutes, "progress": progress, "grad": norm} | parts)
    return average.module
