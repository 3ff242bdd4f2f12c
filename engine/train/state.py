"""Stage `state`: the network that predicts a world's state from keys, on logs alone: no picture is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import StageConfig, StateConfig, TrainConfig, UserError
from ..dataset import split
from ..model.checkpoint import Checkpoint, save_checkpoint
from ..model.networks import load_autoencoder, make_states
from ..model.state import StateModel
from ..model.state_spec import StateSpec, difference, heading, pick, turned
from ..recording import Recording, find_recordings
from .stage import LICENCE

WARM = 16  # at most so many recorded frames before those that are predicted
APART_SHARE = 0.4  # of the iterations, in which frames are predicted from recorded ones
APART = 24  # frames of a game in these
SHORTEST = 8  # frames that are unrolled
RESET_SHARE = 0.15  # of games that begin where an episode does
NOISE_SHARE = 0.2  # of games that begin a little beside the truth, so that it learns to return
NOISE = 0.3  # standard deviation of that, in large steps
HUBER = 0.2  # errors beyond so many large steps count linearly


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

    def cut(self, starts: Tensor, length: int, warm: int) -> StateBatch:
        """Games that begin at the frames `starts` (b,) and are `length` frames long."""
        rows = starts[:, None] + torch.arange(length)
        return StateBatch(self.states[rows], self.actions[rows], warm)

    def batch(self, seed: int, stage: StageConfig) -> StateBatch:
        """Games drawn by the seed: with nothing to unroll, or unrolled for as many frames as one of the
        lengths that double from SHORTEST up to `stage.unroll`, the fewer games the longer these are.
        """
        random = torch.Generator().manual_seed(seed)
        lengths = [min(SHORTEST, stage.unroll)]
        while lengths[-1] < stage.unroll:
            lengths.append(min(2 * lengths[-1], stage.unroll))
        unroll = lengths[int(torch.randint(len(lengths), (), generator=random))]
        if float(torch.rand((), generator=random)) < APART_SHARE:
            unroll = 0
        warm = int(torch.randint(1, WARM + 1, (), generator=random)) if unroll else 0
        length = warm + (unroll or APART)
        fits = self.left >= length
        anywhere, begun = fits.nonzero()[:, 0], (fits & self.resets).nonzero()[:, 0]
        if not len(anywhere):
            raise UserError(f"No recorded episode has {length} frames; collect longer ones.")
        count = max(stage.batch // 4, stage.batch * lengths[0] // unroll) if unroll else stage.batch
        starts = anywhere[torch.randint(len(anywhere), (count,), generator=random)]
        if len(begun):
            early = begun[torch.randint(len(begun), (count,), generator=random)]
            starts = torch.where(torch.rand(count, generator=random) < RESET_SHARE, early, starts)
        return self.cut(starts, length, warm)


class StateLoss(nn.Module):
    """A state network and its loss on its own unrolled states."""

    def __init__(self, model: StateModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: StateBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """→ loss, and its parts: where the state is, and how it changed since the frame before.

        Where nothing is to be unrolled (warm 0), each frame is predicted from the recorded ones before it.
        """
        model, warm = self.model, batch.warm
        if not warm:
            made = model.next_states(batch.states, batch.actions)
            error = self._error(made, batch.states[:, 1:], batch.states[:, 1:])
            pace = _huber(error, HUBER / 4)
            return pace, {"pace": pace.detach()}
        true = batch.states[:, warm:]
        carry = model.begin(batch.states[:, :warm], batch.actions[:, :warm])
        carry = carry._replace(state=self._beside(carry.state))
        made = model.unroll(carry, batch.actions[:, warm:])
        made_change = difference(model.spec, made, torch.cat([carry.state[:, None], made[:, :-1]], 1))
        true_change = difference(model.spec, true, batch.states[:, warm - 1 : -1])
        place = _huber(self._error(made, true, true), HUBER)
        pace = _huber(self._error(made_change, true_change, true), HUBER / 4)
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
        some = (torch.rand(len(state), 1, device=state.device) < NOISE_SHARE).float()
        moved = NOISE * some * torch.randn_like(state) * scales.step
        columns = [i in spec.indices("position") for i in range(len(spec))]
        return state + moved * torch.tensor(columns, device=state.device)


def _huber(error: Tensor, delta: float) -> Tensor:
    return F.huber_loss(error, torch.zeros_like(error), delta=delta) / delta


class StateStage:
    """Trains the predictor of the state that all recordings tell; where they tell none, there is nothing to
    train, and play does without.
    """

    def __init__(
        self, config: TrainConfig, device: torch.device, dtype: torch.dtype | None, rank: int, ranks: int
    ):
        self.config, self.device = config, device
        self.seed = (config.seed * 1009 + rank) * 1_000_003
        before = Checkpoint(config.weights or Path(config.out) / "autoencoder.safetensors")
        self.autoencoder = load_autoencoder(before)
        parts = [[Recording(path) for path in part] for part in split(find_recordings(config.data))]
        spec = common_spec(parts[0])
        self.model = replace(before.model, state=StateConfig(**spec.to_dict()) if spec else StateConfig())
        self.trains = spec is not None
        if spec is None:
            self.module = nn.Linear(1, 1)  # stands in for what there is nothing to train of
            return
        states = make_states(self.model, config.world)
        keys = tuple(config.world.keys)
        self.logs, self.held_out = (StateLogs.read(part or parts[0], spec, keys) for part in parts)
        states.fit(self.logs.states, self.logs.actions, self.logs.resets)
        self.module = StateLoss(states)

    def batch(self, step: int) -> StateBatch:
        """The games of iteration `step`: a pure function of seed and step."""
        batch = self.logs.batch(self.seed + step, self.config.pace())
        return StateBatch(batch.states.to(self.device), batch.actions.to(self.device), batch.warm)

    @torch.no_grad()
    def unrolled(self, module: StateLoss, frames: int) -> tuple[Tensor, Tensor]:
        """Held-out games → true states and the network's own (b, frames, S)."""
        starts = torch.nonzero(self.held_out.left >= WARM + frames)[:: max(1, frames // 2), 0][:256]
        batch = self.held_out.cut(starts, WARM + frames, WARM)
        states, actions = batch.states.to(self.device), batch.actions.to(self.device)
        carry = module.model.begin(states[:, :WARM], actions[:, :WARM])
        return states[:, WARM:], module.model.unroll(carry, actions[:, WARM:])

    def validate(self, module: StateLoss) -> dict[str, float]:
        """Median and 95th percentile of the errors of held-out games after some frames, raw units."""
        if not self.trains:
            return {}
        true, made = self.unrolled(module, 64)
        spec = module.model.spec
        error = difference(spec, made, true)
        sizes = {
            "angle": pick(error, spec.indices("angle")),
            "position": pick(error, spec.indices("position")),
        }
        scores = {}
        for name, values in sizes.items():
            for frame in (8, 64) if values.shape[-1] else ():
                size = values[:, frame - 1].norm(dim=-1)
                scores[f"{name}_{frame}"] = float(size.median())
                scores[f"{name}_{frame}_p95"] = float(size.quantile(0.95))
        return scores

    def picture(self, module: StateLoss) -> np.ndarray:
        """Paths of held-out games seen from above, true ones bright, own ones red."""
        picture = np.zeros((256, 256, 3), np.uint8)
        if not self.trains:
            return picture
        true, made = (x.cpu().numpy() for x in self.unrolled(module, 64))
        places = module.model.spec.indices("position")
        if len(places) >= 2:
            low, high = (
                x[places[:2]].cpu().numpy() for x in (module.model.scales.low, module.model.scales.high)
            )
            for states, colour in ((true, (220, 220, 220)), (made, (255, 60, 60))):
                at = (states[:64, :, places[:2]] - low) / np.maximum(high - low, 1e-6) * 255
                column, row = np.nan_to_num(at).reshape(-1, 2).clip(0, 255).astype(int).T
                picture[255 - row, column] = colour
        return picture

    def save(self, path: Path, module: StateLoss, about: dict[str, Any]) -> None:
        scores = {name: round(value, 2) for name, value in self.validate(module).items()}
        modules = {"autoencoder": self.autoencoder} | ({"states": module.model} if self.trains else {})
        world = self.config.world
        save_checkpoint(path, modules, self.model, world, licence=LICENCE, scores=scores, **about)


def common_spec(recordings: list[Recording]) -> StateSpec | None:
    """What all recordings tell of their world; None where they have nothing in common."""
    kinds = [recording.state_kinds for recording in recordings]
    names = [name for name in kinds[0] if all(name in other for other in kinds)]
    if not names:
        return None
    return StateSpec.of({name: kinds[0][name] for name in names})
