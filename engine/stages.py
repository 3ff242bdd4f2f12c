"""What each training stage trains: its networks, its n-th batch, its picture and its checkpoint. The loop is
train.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from .autoencoder import Autoencoder, decode_clip
from .checkpoint import Checkpoint, save_checkpoint, weights_digest
from .config import DenoiserConfig, ModelConfig, StageConfig, TrainConfig, UserError
from .dataset import Batches, LatentsCache, Segments, load_frames, split
from .denoiser import Denoiser, weighted_error
from .device import autocast
from .picture import grid
from .recording import find_recordings
from .rollout import Rollout

FITTED = 25_000  # clips from which the first guess is fitted
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


class PlainLoss(nn.Module):
    """Flow matching on true frames, as one module that data parallelism can wrap."""

    def __init__(self, denoiser: Denoiser, pace: StageConfig):
        super().__init__()
        self.denoiser, self.pace = denoiser, pace

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.denoiser.loss(*batch, self.pace.windows)


class RolloutLoss(PlainLoss):
    """Self-generated history: `Rollout` plays recorded actions, and at every step a window that stands on the
    model's own frames is held against the true ones.

    The history is the model's own, so that it learns to go on from its own faults. What is noised is the true
    frame, as a denoiser that is regressed on what it cannot know learns to paint the mean of all that could be:
    flat colour. Only where keys changed under the frames in flight is it, in half of the games, the model's own
    stale estimate: this is what makes a frame obey a key pressed late. All of the model's own is detached.
    """

    def __init__(self, denoiser: Denoiser, pace: StageConfig):
        super().__init__(denoiser, pace)
        self.rollout: Rollout | None = None

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if torch.rand(()) < self.pace.plain_share:
            return super().forward(batch)
        latents, actions = batch
        if self.rollout is None:
            self.rollout = Rollout(self.denoiser, len(latents), _compute_dtype(latents.device))
        rollout, start = self.rollout, self.rollout.start_frames
        seed = torch.randint(2**31, (len(latents),)).to(latents.device)
        rollout.reset(latents[:, :start], actions[:, :start], seed)
        errors, logs = [], {}
        for frame in range(start, start + self.pace.unroll):
            true = latents[:, frame : frame + self.denoiser.config.window]
            stale = self._stale(actions[:, : frame + 1]).to(latents.device)
            clean = torch.where(stale[:, None, None, None, None], rollout.window.clean, true)
            made = rollout.predict(actions[:, frame], clean)
            errors.append(weighted_error(made, true, rollout.ladder))  # (b, w)
            head = rollout.step(actions[:, frame])
            if frame in (start, start + self.pace.unroll - 1):
                name = "own_first" if frame == start else "own_last"
                logs[name] = (head - true[:, 0]).square().mean()
        error = torch.stack(errors)  # (steps, b, w)
        unused = 0 * self.denoiser.actions.null.sum()  # data parallelism wants a gradient for every weight
        return error.mean() + unused, logs | {"head_last": error[-1, :, 0].mean().detach()}

    def _stale(self, actions: Tensor) -> Tensor:
        """Actions up to now (b, t, k) → which windows keep their own estimates, bool (b,)."""
        lately = actions[:, -self.denoiser.config.window :]
        return (lately != lately[:, -1:]).any(-1).any(-1) & (torch.rand(len(actions)) < 0.5).to(actions.device)


def _compute_dtype(device: torch.device) -> torch.dtype:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


class DenoiserStage:
    """Trains the denoiser on cached latents; `stage=rollout` goes on from it with the model's own history."""

    def __init__(
        self, config: TrainConfig, device: torch.device, dtype: torch.dtype | None, rank: int, ranks: int
    ):
        self.config, self.device, self.dtype = config, device, dtype
        pace, out = config.pace(), Path(config.out)
        rolled = config.stage == "rollout"
        before = Checkpoint(out / ("denoiser.safetensors" if rolled else "autoencoder.safetensors"))
        if list(before.world.keys) != list(config.world.keys):
            said = (
                f"{before.path} was trained for {before.world.name}, whose keys {config.world.name} has not"
            )
            raise UserError(f"{said}; give another out=DIR, or world={before.world.name}.")
        self.model = ModelConfig(
            before.model.autoencoder, before.model.denoiser if rolled else config.model.denoiser
        )
        self.autoencoder = Autoencoder(self.model.autoencoder).to(device).eval().requires_grad_(False)
        before.load_into("autoencoder", self.autoencoder)
        train, held_out = split(find_recordings(config.data))
        key = weights_digest(self.autoencoder)
        length = max(shortest(self.model.denoiser) + (pace.unroll - 1 if rolled else 0), pace.clip)
        names = tuple(config.world.keys)
        path, recordings = Path(config.data) / f"latents-{key}", train + held_out
        if mine := recordings[rank::ranks]:
            LatentsCache.build(mine, self._encode, path, key, batch=64)
        if ranks > 1:
            torch.distributed.barrier()  # each process has encoded its share
        caches = [LatentsCache(path, key, part) for part in (train, held_out or train)]
        tail = length - self.model.denoiser.sink - self.model.denoiser.recent
        self.batches = Batches(
            Segments(caches[0], length, names), pace.batch, config.seed, rank, ranks, tail=tail
        )
        self.shown = Batches(Segments(caches[1], min(64, caches[1].longest()), names), 6, 0)
        denoiser = Denoiser(
            self.model.denoiser, len(names), *self.model.autoencoder.latent_shape(config.world)
        )
        if rolled:
            before.load_into("denoiser", denoiser)
        elif (
            rank == 0 and not (out / "denoiser.state.pt").exists()
        ):  # other processes get the first one's weights
            self._fit_motion(denoiser, caches[0], names)
        self.module = (RolloutLoss if rolled else PlainLoss)(denoiser, pace)

    def _fit_motion(self, denoiser: Denoiser, cache: LatentsCache, names: tuple[str, ...]) -> None:
        """Where training begins: the best linear guess, from some ten thousand true frames."""
        batches = Batches(Segments(cache, 1 + denoiser.config.window, names), 256, self.config.seed)
        clips = tqdm(range(FITTED // 256), desc="first guess", unit="batch", disable=None)
        denoiser.motion.fit((latents, actions[:, 1]) for latents, actions in (next(batches) for _ in clips))

    @torch.inference_mode()
    def _encode(self, frames: Tensor) -> Tensor:
        with autocast(self.device, self.dtype):
            return self.autoencoder.encode(frames.to(self.device)).cpu()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        self.batches.position = step
        latents, actions = next(self.batches)
        return latents.to(self.device, non_blocking=True), actions.to(self.device, non_blocking=True)

    @torch.no_grad()
    def picture(self, module: PlainLoss) -> np.ndarray:
        """Held-out games: every third true frame above the one that the model makes of the same start and
        keys.
        """
        module.eval()
        latents, actions = (x.to(self.device) for x in self.shown.segments.batch(self.shown.indices(0)))
        with autocast(self.device, self.dtype):
            rollout = Rollout(module.denoiser, len(latents), _compute_dtype(self.device))
            start = rollout.start_frames
            rollout.reset(
                latents[:, :start], actions[:, :start], torch.arange(len(latents), device=self.device)
            )
            made = torch.stack([rollout.step(action) for action in actions[:, start:].unbind(1)], 1)
            both = [decode_clip(self.autoencoder, x[:, ::5].float()) for x in (latents[:, start:], made)]
        rows = [rearrange(x, "b t c h w -> b t h w c").cpu().numpy() for x in both]
        return grid([row for pair in zip(*rows, strict=True) for row in pair])

    def save(self, path: Path, module: PlainLoss, about: dict) -> None:
        config = self.config
        modules = {"autoencoder": self.autoencoder, "denoiser": module.denoiser}
        save_checkpoint(path, modules, self.model, config.world, seed=config.seed, licence=LICENCE, **about)


def shortest(config: DenoiserConfig) -> int:
    """Frames of the shortest segment that holds a window and all that it looks at."""
    return config.sink + config.recent + config.window


def make_stage(config: TrainConfig, device: torch.device, dtype: torch.dtype | None, rank: int, ranks: int):
    """The stage that `config.stage` names, with its data open."""
    kind = AutoencoderStage if config.stage == "autoencoder" else DenoiserStage
    return kind(config, device, dtype, rank, ranks)
