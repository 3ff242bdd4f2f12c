"""LatentsStage, the base of all stages on latents: earlier networks, the latents cache, batches, saving."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig, TrainConfig, UserError, WorldConfig
from ..data.cache import cache_place, drop_old
from ..data.dataset import true_recordings
from ..data.latents import LatentsCache
from ..data.segments import Batches, Clip, Segments
from ..device import autocast
from ..model.autoencoder import Autoencoder
from ..model.checkpoint import Checkpoint, apply_overrides, save_checkpoint, weights_digest
from ..model.networks import load_autoencoder
from ..model.world_model import WorldModel
from ..stage_config import TRAINED
from .stop import hold

FREE = ("ladder", "correction")  # fields of the denoiser that no weight depends on: free to change later
DECODER = ("decoder",)  # left out of digests of autoencoders: it does not change the latents
LICENCE = "Weights and start frames derive from ViZDoom (MIT) with Freedoom art (BSD-3-Clause); see NOTICE."


def open_caches(
    config: TrainConfig,
    autoencoder: Autoencoder,
    device: torch.device,
    dtype: torch.dtype | None,
    place: tuple[int, int] = (0, 1),
) -> list[LatentsCache]:
    """Latents of the recordings to train on, and of those held out (the former where none are). Missing ones
    are encoded first; of `place` = (rank, ranks), each process encodes its share.
    """

    @torch.inference_mode()
    def encode(frames: Tensor) -> Tensor:
        hold(Path(config.out))
        with autocast(device, dtype):
            return autoencoder.encode(frames.to(device)).cpu()

    rank, ranks = place
    train, held_out = true_recordings(config.data, config.world)
    key = weights_digest(autoencoder, DECODER)
    path = cache_place(config.data, config.out, key, train + held_out)
    if rank == 0:
        drop_old(path, config.data, config.out, train + held_out)
    if mine := (train + held_out)[rank::ranks]:
        # on a CPU the encoder itself uses all cores
        readers = (os.cpu_count() or 0) if device.type == "cuda" else 0
        LatentsCache.build(mine, encode, path, key, batch=64, workers=readers)
    if ranks > 1:
        torch.distributed.barrier()  # each process has encoded its share
    return [LatentsCache(path, key, part) for part in (train, held_out or train)]


def check_world(before: Checkpoint, world: WorldConfig) -> None:
    """Raises UserError where a checkpoint's world has another name, keys, frame size or rate than `world`."""
    made = before.world
    for one, other, what in (
        ((made.name, made.id), (world.name, world.id), "world"),
        (list(made.keys), list(world.keys), "keys"),
        ((made.width, made.height), (world.width, world.height), "frame size"),
        ((made.fps, made.tics), (world.fps, world.tics), "frame rate"),
    ):
        if one != other:
            said = f"{before.path} was trained for {made.id or made.name}, which has another {what}"
            raise UserError(f"{said} than {world.id or world.name}; give another out=DIR, or world=.")


class LatentsStage(ABC):
    """A stage whose batches are segments of latents, keys and states. `module`: networks and loss, as the
    loop trains them.
    """

    module: nn.Module
    trains = True  # whether there is anything to train

    def __init__(
        self, config: TrainConfig, device: torch.device, dtype: torch.dtype | None, rank: int, ranks: int
    ):
        self.config, self.device, self.dtype, self.rank, self.ranks = config, device, dtype, rank, ranks
        self.names = tuple(config.world.keys)
        self.before = Checkpoint(config.weights or self._source())
        check_world(self.before, config.world)
        self.model = self._model()
        self.autoencoder: Autoencoder = self.frozen(load_autoencoder(self.before))
        self.caches = open_caches(config, self.autoencoder, device, dtype, (rank, ranks))
        length, tail = self.segment()
        near = device if device.type == "cuda" else None
        segments = self.segments(self.caches[0], length, near)
        self.batches = Batches(segments, config.stage_config().batch, config.seed, rank, ranks, tail=tail)

    def _model(self) -> ModelConfig:
        """The model's config: parts that this stage makes as configured, the others as in the checkpoint it
        starts from, except for fields in FREE that the command line gave.
        """
        wanted, made = self.config.model, self.before.model
        changes = {name: getattr(wanted, name) for name in TRAINED[self.config.stage].makes}
        for name in {field.name for field in fields(made)} - changes.keys():
            own = getattr(made, name), getattr(wanted, name)
            changes[name] = apply_overrides(*own, self.config.given, f"model.{name}", FREE)
        return replace(made, **changes)

    def _source(self) -> Path:
        """The checkpoint of the stage before."""
        return Path(self.config.out) / f"{TRAINED[self.config.stage].reads[-1]}.safetensors"

    def frozen(self, module: nn.Module) -> nn.Module:
        """The module on this stage's device, in evaluation mode, without gradients."""
        return module.to(self.device).eval().requires_grad_(False)

    @abstractmethod
    def segment(self) -> tuple[int, int]:
        """Frames of a training segment, and how many of these, at its end, are predicted."""

    def segments(self, cache: LatentsCache, length: int, near: torch.device | None = None) -> Segments:
        """Segments of `length` frames, with the keys of `action_history` frames for each, and the states that
        the model knows; `near`: a device on which to hold the latents.
        """
        states = self.model.state.names
        before = self.model.denoiser.action_history - 1
        return Segments(cache, length, self.names, states, before, near)

    def batch(self, step: int) -> Clip:
        """The segments of iteration `step`: a pure function of seed and step."""
        self.batches.position = step
        return next(self.batches).to(self.device)

    def save(self, path: Path, module: nn.Module, about: dict[str, Any]) -> None:
        """Writes a checkpoint with all networks needed for play; `about`: its provenance."""
        save_checkpoint(
            path, self.world_model(module).parts(), self.model, self.config.world, licence=LICENCE, **about
        )

    def resume_state(self) -> list:
        """What an exact continuation needs beside weights and random states, such as games that are being
        played: plain values and tensors of this process.
        """
        return []

    def load_resume_state(self, saved: list) -> None:  # noqa: B027 (most stages have nothing to do)
        """Takes back what `resume_state` gave."""

    @abstractmethod
    def world_model(self, module: nn.Module) -> WorldModel:
        """All networks needed for play, with those that `module` trains."""
