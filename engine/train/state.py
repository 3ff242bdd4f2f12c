"""Stage `state`: the network that predicts a world's state from keys, on logs alone, and beside it the one
that reads a state off a picture.
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

MEASURED = 1000  # held-out pictures that are read


class Given(NamedTuple):
    """An iteration's games, and pictures that belong to other frames."""

    games: StateBatch
    pictures: StatePictures


class StateLoss(nn.Module):
    """A state network and its loss on its own unrolled states; a reader (picture → state) and a scene (state
    → picture) and their losses on single pictures.
    """

    def __init__(
        self, model: StateModel, reader: StateReader, scene: SceneModel, stage: StateStageConfig
    ) -> None:
        super().__init__()
        self.model, self.reader, self.scene, self.stage = model, reader, scene, stage

    def forward(self, given: Given, turn: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """→ the sum of the losses, and their parts."""
        games, parts = self.predict(given.games)
        few = StatePictures(*(part[: len(part) // self.stage.read_share] for part in given.pictures))
        read, seen = self.reader.loss(*few), self.scene_error(given.pictures)
        loss = games + self.stage.read_weight * (read + seen)
        return loss, parts | {"read": read.detach(), "scene": seen.detach()}

    def scene_error(self, pictures: StatePictures) -> Tensor:
        """Variance of the latents that the scene of their state has not."""
        features = state_features(self.model.scales, pictures.states, pictures.states)
        return (self.scene(features) - pictures.latents).square().mean()

    def predict(self, batch: StateBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """→ the state network's loss: where the state is, and how it changed since the frame before.

        Where nothing is to be unrolled (warm 0), each frame is predicted from the recorded ones before it.
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
        some = (torch.rand(len(state), 1, device=state.device) < self.stage.noise_share).float()
        moved = self.stage.noise * some * torch.randn_like(state) * scales.step
        columns = [i in spec.indices("position") for i in range(len(spec))]
        return state + moved * torch.tensor(columns, device=state.device)


def _huber(error: Tensor, delta: float) -> Tensor:
    return F.huber_loss(error, torch.zeros_like(error), delta=delta) / delta


class StateStage:
    """Trains the predictor and the reader of the state that the true recordings tell; where they tell none,
    there is nothing to train, and play does without.
    """

    def __init__(
        self, config: TrainConfig, device: torch.device, dtype: torch.dtype | None, rank: int, ranks: int
    ):
        self.config, self.device, self.dtype = config, device, dtype
        self.seed = (config.seed * 1009 + rank) * 1_000_003
        before = Checkpoint(config.weights or Path(config.out) / "autoencoder.safetensors")
        check_world(before, config.world)
        self.autoencoder = load_autoencoder(before).to(device).eval().requires_grad_(False)
        parts = [_told(part) for part in true_recordings(config.data, config.world)]
        spec = common_spec(parts[0])
        keys = tuple(config.world.keys)
        self.logs = StateLogs.read(parts[0], spec.names, keys) if spec else None
        self.trains = self.logs is not None
        state = StateConfig(**spec.to_dict()) if self.trains else StateConfig()
        self.model = replace(before.model, state=state)
        if not self.trains:
            self.module = nn.Linear(1, 1)  # stands in for what there is nothing to train of
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
        """With the weights of `before` where it knows the same of its world; else fresh ones."""
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
        """Held-out games → true states and the network's own (b, frames, S); b may be 0."""
        starts = torch.nonzero(self.held_out.left >= WARM + frames)[:, 0]
        starts = starts[:: max(1, len(starts) // 256)]
        batch = self.held_out.cut(starts, WARM + frames, WARM).to(self.device)
        carry = module.model.begin(batch.states[:, :WARM], batch.actions[:, :WARM])
        return batch.states[:, WARM:], module.model.unroll(carry, batch.actions[:, WARM:])

    @torch.no_grad()
    def validate(self, module: StateLoss) -> dict[str, float]:
        """Median and 95th percentile, raw units, of the errors of held-out games after some frames, and of
        what is read off held-out pictures; of numbers that only pictures tell, the share that is read (R2);
        the variance of latents that the scene misses.
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
        modules: dict[str, nn.Module] = {"autoencoder": self.autoencoder}
        if self.trains:
            reader = copy.deepcopy(module.reader)  # what is measured here is no part of the training
            pictures = self.unseen.to(self.device)
            reader.share.copy_(reader.measured(pictures.latents.float(), pictures.states))
            modules |= {"states": module.model, "reader": reader, "scene": module.scene}
        world = self.config.world
        save_checkpoint(path, modules, self.model, world, licence=LICENCE, **about)

    def resume_state(self) -> list:
        """Nothing is under way that a save does not hold."""
        return []

    def load_resume_state(self, under_way: list) -> None:
        """Nothing to take up."""


def _sizes(spec: StateSpec, error: Tensor, after: str) -> dict[str, float]:
    """Median and 95th percentile of errors (n, S) of positions and angles."""
    scores = {}
    for kind in ("angle", "position"):
        if spec.indices(kind):
            size = pick(error, spec.indices(kind)).norm(dim=-1)
            scores |= {f"{kind}_{after}": float(size.median())}
            scores |= {f"{kind}_{after}_p95": float(size.quantile(0.95))}
    return scores


def _told(paths: list[Path]) -> list[Recording]:
    """Recordings that tell what their world said of itself."""
    return [one for one in map(Recording, paths) if one.state_kinds]


def _only(cache: LatentsCache, recordings: list[Recording]) -> LatentsCache | None:
    """The part of a cache that is of these recordings; None where there are none."""
    directories = [Path(recording.directory) for recording in recordings]
    return LatentsCache(cache.path, cache.key, directories) if directories else None


def common_spec(recordings: list[Recording]) -> StateSpec | None:
    """What all recordings tell of their world; None where they have nothing in common."""
    kinds = [recording.state_kinds for recording in recordings]
    names = [name for name in kinds[0] if all(name in other for other in kinds)] if kinds else []
    return StateSpec.of({name: kinds[0][name] for name in names}) if names else None
