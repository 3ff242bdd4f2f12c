"""What each training stage trains: its networks, its n-th batch, its picture and its checkpoint. The loop is
train.py.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from .autoencoder import Autoencoder, decode_clip
from .checkpoint import Checkpoint, save_checkpoint, weights_digest
from .config import DenoiserConfig, ModelConfig, TrainConfig, UserError
from .dataset import Batches, Segments, load_frames, split
from .denoiser import Denoiser, make_motion
from .device import autocast
from .distillation import DistillLoss, shortened
from .latents import LatentsCache
from .losses import MotionLoss, PlainLoss, RolloutLoss, compute_dtype
from .picture import grid
from .recording import find_recordings
from .rollout import Rollout

SOURCES = {
    "motion": "autoencoder",
    "denoiser": "motion",
    "rollout": "denoiser",
    "distill": "rollout",
}  # whose networks a stage reads
LICENCE = "Weights and start frames derive from ViZDoom (MIT) with Freedoom art (BSD-3-Clause); see NOTICE."


class AutoencoderStage:
    """Trains the autoencoder on a spread-out sample of all recorded frames."""

    def __init__(
        self, config: TrainConfig, device: torch.device, dtype: torch.dtype | None, rank: int, ranks: int
    ):
        self.config, self.device, self.dtype = config, device, dtype
        pace = config.pace()
        train, held_out = split(find_recordings(config.data))
        self.frames = load_frames(train, pace.frames, config.seed)  # (n, 3, h, w) uint8
        self.shown = load_frames(held_out or train, 256, config.seed)
        self.size, self.seed = pace.batch, (config.seed * 1009 + rank) * 1_000_003
        self.module = Autoencoder(config.model.autoencoder)
        if config.weights:
            Checkpoint(config.weights).load_into("autoencoder", self.module)

    def batch(self, step: int) -> Tensor:
        """The frames of iteration `step`: a pure function of seed and step, so that a resumed run goes on
        exactly.
        """
        random = torch.Generator().manual_seed(self.seed + step)
        picked = torch.randint(len(self.frames), (self.size,), generator=random)
        return self.frames[picked].to(self.device, non_blocking=True)

    @torch.no_grad()
    def reconstruct(self, module: Autoencoder) -> tuple[Tensor, Tensor]:
        """Held-out frames and their reconstructions, both uint8 (n, 3, h, w)."""
        module.eval()
        with autocast(self.device, self.dtype):
            parts = [module.decode(module.encode(part)) for part in self.shown.to(self.device).split(64)]
        return self.shown, torch.cat(parts).cpu()

    def picture(self, module: Autoencoder) -> np.ndarray:
        true, made = (
            rearrange(x[:32], "(r n) c h w -> r n h w c", n=8).numpy() for x in self.reconstruct(module)
        )
        return grid([row for pair in zip(true, made, strict=True) for row in pair])

    def save(self, path: Path, module: nn.Module, about: dict) -> None:
        true, made = self.reconstruct(module)
        error = (true.float() - made.float()).square().mean((1, 2, 3))
        scores = {"psnr_held_out": round((10 * torch.log10(255**2 / error)).mean().item(), 2)}
        config = self.config
        save_checkpoint(
            path,
            {"autoencoder": module},
            config.model,
            config.world,
            seed=config.seed,
            licence=LICENCE,
            scores=scores,
            **about,
        )


class LatentsStage(ABC):
    """What the stages on latents share: the networks of the stage before, the latents cache, its batches."""

    def __init__(
        self, config: TrainConfig, device: torch.device, dtype: torch.dtype | None, rank: int, ranks: int
    ):
        self.config, self.device, self.dtype = config, device, dtype
        self.names = tuple(config.world.keys)
        before = Path(config.out) / f"{SOURCES[config.stage]}.safetensors"
        if config.stage == "distill" and not before.exists():  # own history is no must
            before = Path(config.out) / f"{SOURCES['rollout']}.safetensors"
        own = config.stage in ("rollout", "distill")  # history, so all networks are there
        self.before = Checkpoint(config.weights if config.weights and own else before)
        if list(self.before.world.keys) != list(config.world.keys):
            said = f"{self.before.path} was trained for {self.before.world.name}"
            said = f"{said}, whose keys {config.world.name} has not"
            raise UserError(f"{said}; give another out=DIR, or world={self.before.world.name}.")
        made, denoiser = self.before.model, config.model.denoiser
        if own:  # how the weights that are there are used may change
            window = denoiser.window if config.stage == "distill" else made.denoiser.window
            changes = {"window": window, "ladder": denoiser.ladder, "correction": denoiser.correction}
            denoiser = replace(made.denoiser, **changes)
        self.model = ModelConfig(made.autoencoder, denoiser)
        self.autoencoder = Autoencoder(self.model.autoencoder).to(device).eval().requires_grad_(False)
        self.before.load_into("autoencoder", self.autoencoder)
        self.caches = self._open_caches(rank, ranks)
        length, tail = self.segment()
        near = device if device.type == "cuda" else None
        segments = Segments(self.caches[0], length, self.names, near)
        self.batches = Batches(segments, config.pace().batch, config.seed, rank, ranks, tail=tail)

    @abstractmethod
    def segment(self) -> tuple[int, int]:
        """Frames of a training segment, and how many of them at its end are to be predicted."""

    def _open_caches(self, rank: int, ranks: int) -> list[LatentsCache]:
        """Latents of the recordings to train on and of those held out; what is missing is encoded first."""
        train, held_out = split(find_recordings(self.config.data))
        key = weights_digest(self.autoencoder)
        path = Path(self.config.data) / f"latents-{key}"
        if mine := (train + held_out)[rank::ranks]:
            # a CPU has its hands full encoding
            readers = (os.cpu_count() or 0) if self.device.type == "cuda" else 0
            LatentsCache.build(mine, self._encode, path, key, batch=64, workers=readers)
        if ranks > 1:
            torch.distributed.barrier()  # each process has encoded its share
        return [LatentsCache(path, key, part) for part in (train, held_out or train)]

    @torch.inference_mode()
    def _encode(self, frames: Tensor) -> Tensor:
        with autocast(self.device, self.dtype):
            return self.autoencoder.encode(frames.to(self.device)).cpu()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        self.batches.position = step
        latents, actions = next(self.batches)
        return latents.to(self.device, non_blocking=True), actions.to(self.device, non_blocking=True)

    def save(self, path: Path, module: nn.Module, about: dict) -> None:
        config = self.config
        modules = {"autoencoder": self.autoencoder} | self.trained(module)
        save_checkpoint(path, modules, self.model, config.world, seed=config.seed, licence=LICENCE, **about)

    @abstractmethod
    def trained(self, module: nn.Module) -> dict[str, nn.Module]:
        """The networks of the module in training by the names under which checkpoints know them."""


class MotionStage(LatentsStage):
    """Trains the network of the first guess: pictures moved as the keys say."""

    def __init__(self, *given):
        super().__init__(*given)
        channels, _, _ = self.model.autoencoder.latent_shape(self.config.world)
        motion = make_motion(self.model.denoiser, len(self.names), channels, self.autoencoder)
        if self.config.weights:
            start = Checkpoint(self.config.weights)
            start.load_into("motion" if "motion" in start.modules else "denoiser.motion", motion)
        self.module = MotionLoss(motion, self.model.denoiser.commit_position)
        self.shown = Batches(Segments(self.caches[1], self.segment()[0], self.names), 6, 0)

    def segment(self) -> tuple[int, int]:
        return self.model.denoiser.momentum + self.model.denoiser.window, self.model.denoiser.window

    @torch.no_grad()
    def picture(self, module: MotionLoss) -> np.ndarray:
        """Held-out clips: the last picture and the true coming ones, above where it was moved to."""
        module.eval()
        batch = (x.to(self.device) for x in self.shown.segments.batch(self.shown.indices(0)))
        with autocast(self.device, self.dtype):
            last, held, actions, true = module.clip(*batch)
            made = module.motion(last, held, actions).mean
            rows = [torch.cat([last[:, 1:], x], 1) for x in (true, made)]
            rows = [decode_clip(self.autoencoder, x).permute(0, 1, 3, 4, 2).cpu().numpy() for x in rows]
        return grid([row for pair in zip(*rows, strict=True) for row in pair])

    def trained(self, module: MotionLoss) -> dict[str, nn.Module]:
        return {"motion": module.motion}


class DenoiserStage(LatentsStage):
    """Trains the denoiser on cached latents; `stage=rollout` goes on from it with the model's own history."""

    def __init__(self, *given):
        super().__init__(*given)
        self.shown = Batches(Segments(self.caches[1], min(64, self.caches[1].longest()), self.names), 6, 0)
        self.module = self.loss()

    def loss(self) -> nn.Module:
        """The networks and what they minimise."""
        config, denoiser = self.config, self.fresh(self.model.denoiser)
        if config.stage == "rollout":
            self.before.load_into("denoiser", denoiser)
            return RolloutLoss(denoiser, config.pace())
        if config.weights:
            Checkpoint(config.weights).load_into("denoiser", denoiser)
        self.before.load_into("motion", denoiser.motion)
        return PlainLoss(denoiser, config.pace())

    def fresh(self, config: DenoiserConfig) -> Denoiser:
        """A denoiser for this world that knows nothing yet."""
        shape = self.model.autoencoder.latent_shape(self.config.world)
        return Denoiser(config, len(self.names), *shape, self.autoencoder)

    def segment(self) -> tuple[int, int]:
        pace, sizes, stage = self.config.pace(), self.model.denoiser, self.config.stage
        unrolled = {"rollout": pace.lead + pace.unroll - 1, "distill": pace.unroll - 1}.get(stage, 0)
        length = max(shortest(sizes) + unrolled, pace.clip)
        return length, length - sizes.sink - sizes.recent

    def trained(self, module: PlainLoss | DistillLoss) -> dict[str, nn.Module]:
        return {"denoiser": module.denoiser}

    @torch.no_grad()
    def picture(self, module: PlainLoss | DistillLoss) -> np.ndarray:
        """Held-out games: every third true frame above the one that the model makes of the same start and
        keys.
        """
        module.eval()
        latents, actions = (x.to(self.device) for x in self.shown.segments.batch(self.shown.indices(0)))
        with autocast(self.device, self.dtype):
            denoiser = self.trained(module)["denoiser"]
            rollout = Rollout(denoiser, len(latents), compute_dtype(self.device))
            start = rollout.start_frames
            rollout.reset(
                latents[:, :start], actions[:, :start], torch.arange(len(latents), device=self.device)
            )
            made = torch.stack([rollout.step(action) for action in actions[:, start:].unbind(1)], 1)
            both = [decode_clip(self.autoencoder, x[:, ::5].float()) for x in (latents[:, start:], made)]
        rows = [rearrange(x, "b t c h w -> b t h w c").cpu().numpy() for x in both]
        return grid([row for pair in zip(*rows, strict=True) for row in pair])


class DistillStage(DenoiserStage):
    """Goes on from the weights of either with a teacher and a critic, both of which are at first the teacher
    checkpoint's; only the student is saved.

    It may keep a share of the weights that it began with (Wortsman et al., 2022, WiSE-FT): what it has learnt
    in an hour is then taken in part, with less of what it unlearnt.
    """

    def loss(self) -> DistillLoss:
        made = self.fresh(self.before.model.denoiser)
        self.before.load_into("denoiser", made)
        student = shortened(made, self.fresh(self.model.denoiser))
        self.begun = {name: x.detach().clone() for name, x in student.state_dict().items()}
        source = self._teacher()
        teacher, critic = (self.fresh(source.model.denoiser) for _ in range(2))
        for network in (teacher, critic):
            source.load_into("denoiser", network)
        return DistillLoss(student, teacher, critic, self.config.pace())

    def trained(self, module: DistillLoss) -> dict[str, nn.Module]:
        student = copy.deepcopy(module.denoiser)
        for name, value in student.state_dict().items():  # these are views, so it is the student that changes
            if value.is_floating_point():
                value.lerp_(self.begun[name].to(value), self.config.pace().kept)
        return {"denoiser": student}

    def _teacher(self) -> Checkpoint:
        """Its checkpoint, whose latents and history must be the student's."""
        own = Path(self.config.out) / "denoiser.safetensors"
        before = self.before.path if self.config.weights or not own.exists() else own
        source = Checkpoint(self.config.teacher or before)
        autoencoder = Autoencoder(source.model.autoencoder)
        source.load_into("autoencoder", autoencoder)
        mine, its = self.model.denoiser, source.model.denoiser
        same = weights_digest(autoencoder) == weights_digest(self.autoencoder)
        if not same or (mine.sink, mine.recent) != (its.sink, its.recent) or its.window < mine.window:
            said = (
                f"{source.path} cannot teach {self.before.path}, as its autoencoder, sink, recent or window"
            )
            raise UserError(f"{said} is another; give teacher=FILE, trained in the same out=DIR.")
        return source


def shortest(config: DenoiserConfig) -> int:
    """Frames of the shortest segment that holds a window and all that it looks at."""
    return config.sink + config.recent + config.window


def make_stage(config: TrainConfig, device: torch.device, dtype: torch.dtype | None, rank: int, ranks: int):
    """The stage that `config.stage` names, with its data open."""
    kinds = {"autoencoder": AutoencoderStage, "motion": MotionStage, "distill": DistillStage}
    return kinds.get(config.stage, DenoiserStage)(config, device, dtype, rank, ranks)
