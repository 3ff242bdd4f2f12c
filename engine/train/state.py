"""Stage `state`: trains the network that predicts a world's state from keys, on recorded states alone; and,
on single frames, the reader (frame → state) and the scene (state → frame).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import StateConfig, TrainConfig
from ..data.dataset import true_recordings
from ..data.latents import LatentsCache
from ..data.recording import Recording
from ..data.state_logs import WARM, StateBatch, StateLogs, StatePictures
from ..model.checkpoint import Checkpoint, save_checkpoint
from ..model.networks import (
    load_autoencoder,
    load_reader,
    load_scene,
    load_states,
    make_reader,
    make_scene,
    make_states,
)
from ..model.scene import SceneModel
from ..model.state import StateModel
from ..model.state_reader import StateReader
from ..model.state_spec import StateSpec, difference, heading, pick, state_features, turned
from ..stage_config import StateStageConfig
from .latents_stage import LICENCE, check_world, open_caches

MEASURED = 1000  # held-out frames that are measured


class Given(NamedTuple):
    """What an iteration learns from: games, and single frames of other games."""

    games: StateBatch
    pictures: StatePictures


class StateLoss(nn.Module):
    """Three networks and the sum of their losses: the state network, on states that it predicts in a row; the
    reader (latents → state) and the scene (state → latents), on single frames.
    """

    def __init__(
        self, model: StateModel, reader: StateReader, scene: SceneModel, stage: StateStageConfig
    ) -> None:
        super().__init__()
        self.model, self.reader, self.scene, self.stage = model, reader, scene, stage

    def forward(self, given: Given, turn: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """→ the sum of the losses (), and its parts to log."""
        games, parts = self.predict(given.games)
        few = StatePictures(*(part[: len(part) // self.stage.read_share] for part in given.pictures))
        read, seen = self.reader.loss(*few), self.scene_error(given.pictures)
        loss = games + self.stage.read_weight * (read + seen)
        return loss, parts | {"read": read.detach(), "scene": seen.detach()}

    def scene_error(self, pictures: StatePictures) -> Tensor:
        """Mean squared error () of the latents that the scene draws for the frames' states."""
        features = state_features(self.model.scales, pictures.states, pictures.states)
        return (self.scene(features) - pictures.latents).square().mean()

    def predict(self, batch: StateBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """→ the state network's loss: the error of the states (place) and of their changes from frame to
        frame (pace).

        With `batch.warm` frames given, the rest is predicted in a row, each frame from the predicted one
        before it. With warm 0 every frame is predicted from the recorded ones, and only its change counts.
        """
        model, warm = self.model, batch.warm
        if not warm:
            made = model.next_states(batch.states, batch.actions)
            error = self._error(made, batch.states[:, 1:], batch.states[:, 1:])
            pace = _huber(error, self.stage.huber / 4)
            return pace, {"pace": pace.detach()}
        true = batch.states[:, warm:]
        carry = model.begin(batch.states[:, :warm], batch.actions[:, :warm])
        carry = carry._replace(state=self._beside(carry.state))
        made = model.unroll(carry, batch.actions[:, warm:])
        made_change = difference(model.spec, made, torch.cat([carry.state[:, None], made[:, :-1]], 1))
        true_change = difference(model.spec, true, batch.states[:, warm - 1 : -1])
        place = _huber(self._error(made, true, true), self.stage.huber)
        pace = _huber(self._error(made_change, true_change, true), self.stage.huber / 4)
        return place + pace, {"place": place.detach(), "pace": pace.detach()}

    def _error(self, made: Tensor, true: Tensor, seen_from: Tensor) -> Tensor:
        """States (b, t, S), three times → their error (b, t, n) without numbers that are read off frames: in
        large steps, angles the short way round, positions along and across the heading of `seen_from`.
        """
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
        """States (b, S) with noise on the positions of a share of the games (`noise_share`)."""
        spec, scales = self.model.spec, self.model.scales
        some = (torch.rand(len(state), 1, device=state.device) < self.stage.noise_share).float()
        moved = self.stage.noise * some * torch.randn_like(state) * scales.step
        columns = [i in spec.indices("position") for i in range(len(spec))]
        return state + moved * torch.tensor(columns, device=state.device)


def _huber(error: Tensor, delta: float) -> Tensor:
    return F.huber_loss(error, torch.zeros_like(error), delta=delta) / delta


class StateStage:
    """Trains the networks of the state on recordings of the true world that have one. If none has, nothing is
    trained, and play does without.
    """

    def __init__(
        self, config: TrainConfig, device: torch.device, dtype: torch.dtype | None, rank: int, ranks: int
    ):
        self.config, self.device, self.dtype = config, device, dtype
        self.seed = (config.seed * 1009 + rank) * 1_000_003
        before = Checkpoint(config.weights or Path(config.out) / "autoencoder.safetensors")
        check_world(before, config.world)
        self.autoencoder = load_autoencoder(before).to(device).eval().requires_grad_(False)
        parts = [_with_states(part) for part in true_recordings(config.data, config.world)]
        spec = common_spec(parts[0])
        keys = tuple(config.world.keys)
        self.logs = StateLogs.read(parts[0], spec.names, keys) if spec else None
        self.trains = self.logs is not None
        state = StateConfig(**spec.to_dict()) if self.trains else StateConfig()
        self.model = replace(before.model, state=state)
        if not self.trains:
            self.module = nn.Linear(1, 1)  # a placeholder: there is nothing to train
            return
        self.held_out = StateLogs.read(parts[1], spec.names, keys) or self.logs
        caches = open_caches(config, self.autoencoder, device, dtype, (rank, ranks))
        known, new = (_only(cache, part) for cache, part in zip(caches, parts, strict=True))
        limit = max(1, config.stage_config().frames // ranks)
        self.pictures = StatePictures.read(known, spec.names, limit, config.seed + rank)
        unseen = StatePictures.read(new, spec.names, MEASURED, config.seed) if new else None
        self.unseen = unseen or self.pictures.batch(0, MEASURED)
        states, reader, scene = self._networks(before)
        self.module = StateLoss(states, reader, scene, config.stage_config())

    def _networks(self, before: Checkpoint) -> tuple[StateModel, StateReader, SceneModel]:
        """The networks, with the weights of `before` if it has the same state; else fresh ones with units
        measured from the recordings.
        """
        if before.model.state == self.model.state:
            return load_states(before), load_reader(before), load_scene(before)
        made = (make(self.model, self.config.world) for make in (make_states, make_reader, make_scene))
        states, reader, scene = made
        states.fit(self.logs.states, self.logs.actions, self.logs.resets)
        reader.fit(self.logs.states, self.logs.resets)
        return states, reader, scene

    def batch(self, step: int) -> Given:
        """What iteration `step` learns from: a pure function of seed and step."""
        seed, stage = self.seed + step, self.config.stage_config()
        pictures = self.pictures.batch(seed, max(stage.read_share, stage.batch // 2))
        return Given(self.logs.batch(seed, stage).to(self.device), pictures.to(self.device))

    @torch.no_grad()
    def unrolled(self, module: StateLoss, frames: int) -> tuple[Tensor, Tensor]:
        """True and predicted states of `frames` frames of held-out games, (b, frames, S) each; b may be 0."""
        starts = torch.nonzero(self.held_out.left >= WARM + frames)[:, 0]
        starts = starts[:: max(1, len(starts) // 256)]
        batch = self.held_out.cut(starts, WARM + frames, WARM).to(self.device)
        carry = module.model.begin(batch.states[:, :WARM], batch.actions[:, :WARM])
        return batch.states[:, WARM:], module.model.unroll(carry, batch.actions[:, WARM:])

    @torch.no_grad()
    def validate(self, module: StateLoss) -> dict[str, float]:
        """Median and 95th percentile, in raw units, of errors on held-out data: of states predicted over 8
        and 64 frames, and of states read off frames; R2 of numbers that can only be read off frames;
        `scene_missed`, the mean squared error of the scene.
        """
        if not self.trains:
            return {}
        spec, scores = module.model.spec, {}
        true, made = self.unrolled(module, 64)
        pictures = self.unseen.to(self.device)
        pictures = pictures._replace(latents=pictures.latents.float())
        read = module.reader(pictures.latents)
        for frame in (8, 64) if len(true) else ():
            scores |= _sizes(spec, difference(spec, made, true)[:, frame - 1], str(frame))
        scores |= _sizes(spec, difference(spec, read, pictures.states), "read")
        scores["scene_missed"] = float(module.scene_error(pictures))
        shares = module.reader.measured(pictures.latents, pictures.states)
        return scores | {f"{spec.names[i]}_r2": float(shares[i]) for i in spec.pictured_indices}

    def picture(self, module: StateLoss) -> np.ndarray:
        """Paths of held-out games seen from above: true ones grey, predicted ones red."""
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
        modules: dict[str, nn.Module] = {"autoencoder": self.autoencoder}
        if self.trains:
            reader = copy.deepcopy(module.reader)  # `share` is set in the copy alone
            pictures = self.unseen.to(self.device)
            reader.share.copy_(reader.measured(pictures.latents.float(), pictures.states))
            modules |= {"states": module.model, "reader": reader, "scene": module.scene}
        world = self.config.world
        save_checkpoint(path, modules, self.model, world, licence=LICENCE, **about)

    def resume_state(self) -> list:
        """Empty: a stage without games (see LatentsStage.resume_state)."""
        return []

    def load_resume_state(self, saved: list) -> None:
        """Nothing to load."""


def _sizes(spec: StateSpec, error: Tensor, after: str) -> dict[str, float]:
    """Errors (n, S) → median and 95th percentile of the sizes of those of positions and of angles."""
    scores = {}
    for kind in ("angle", "position"):
        if spec.indices(kind):
            size = pick(error, spec.indices(kind)).norm(dim=-1)
            scores |= {f"{kind}_{after}": float(size.median())}
            scores |= {f"{kind}_{after}_p95": float(size.quantile(0.95))}
    return scores


def _with_states(paths: list[Path]) -> list[Recording]:
    """Those recordings that hold their world's state."""
    return [one for one in map(Recording, paths) if one.state_kinds]


def _only(cache: LatentsCache, recordings: list[Recording]) -> LatentsCache | None:
    """The part of a cache that belongs to these recordings; None where there are none."""
    directories = [Path(recording.directory) for recording in recordings]
    return LatentsCache(cache.path, cache.key, directories) if directories else None


def common_spec(recordings: list[Recording]) -> StateSpec | None:
    """The state's numbers that all recordings have; None where there are none."""
    kinds = [recording.state_kinds for recording in recordings]
    names = [name for name in kinds[0] if all(name in other for other in kinds)] if kinds else []
    return StateSpec.of({name: kinds[0][name] for name in names}) if names else None
