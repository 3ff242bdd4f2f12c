"""Stage `denoiser`: trains the denoiser on noised windows of recorded frames."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import DenoiserConfig
from ..data.picture import grid
from ..data.segments import Batches, Clip
from ..device import autocast, compute_dtype
from ..model.autoencoder import decode_clip
from ..model.denoiser import Denoiser
from ..model.kv_cache import KVContext, KVRecorder
from ..model.networks import load_reader, load_states, make_denoiser
from ..model.noise import add_noise, training_sigma
from ..model.state import StateModel
from ..model.state_spec import state_features
from ..model.world_model import Generator, WorldModel
from ..rollout.rollout import Rollout
from ..stage_config import TRAINED, DenoiserStageConfig
from .latents_stage import LatentsStage

MADE = 64  # most frames of the games that are shown and measured
HORIZONS = (1, 8, 16, 64)  # frames after which they are measured
MEASURED = 16  # held-out games that are measured


def least_frames(sizes: DenoiserConfig, stage: DenoiserStageConfig) -> int:
    """Frames of a training segment: sink, context and a window, or `clip` where that is more."""
    return max(stage.clip, sizes.sink_frames + sizes.context_frames + sizes.window_frames)


class DenoiserLoss(nn.Module):
    """Squared error of the denoiser's clean estimates, as one module that data parallelism can wrap.

    One commit pass writes the keys and values of a segment's frames. Then windows are noised at random places
    of the segment, each with its own noise and levels, and denoised with sink and context as in play. A share
    of the windows (`single_share`) is a single frame at the level to which play sends a leaving frame back.
    Frames get the true keys and states, since how they would look under other keys is not recorded.
    """

    def __init__(self, generator: Generator, stage: DenoiserStageConfig):
        """Trains those weights of the generator that require gradients."""
        super().__init__()
        self.generator, self.stage = generator, stage

    @property
    def denoiser(self) -> Denoiser:
        return self.generator.denoiser

    @property
    def states(self) -> StateModel | None:
        return self.generator.states

    def forward(self, clip: Clip, turn: int) -> tuple[Tensor, dict[str, Tensor]]:
        """→ the loss () and figures to log. `turn`, the iteration's number, seeds the choice of what kind of
        iteration this is: on the host, so that none waits for its device, and the same in all processes.
        """
        choice = random.Random(turn)
        if choice.random() < self.stage.memoryless:
            return self._without_memory(clip)
        clip = Clip(*(part[: self.stage.memory_games] for part in clip))
        config, total = self.denoiser.config, clip.latents.shape[1]
        has_state, states = self.known_states(clip)
        history, sigma = self._noised_context(clip.latents)
        count = torch.arange(total, device=sigma.device)
        before = torch.cat([states[:, :1], states[:, :-1]], 1)
        condition = self._condition(clip.actions, states, before, has_state, 0 * count, sigma)
        recorder = KVRecorder()
        self.denoiser.commit(history, condition, 0, recorder, sigma)
        first, last = config.context_frames + config.sink_frames, total - config.window_frames
        errors, logs = [], {}
        for _ in range(self.stage.windows):
            start = choice.randint(first, last)
            single = config.correction > 0 and choice.random() < self.stage.single_share
            size = 1 if single else config.window_frames
            error = self._window_error(
                clip, states, has_state, history, sigma, start, size, self._context(recorder, start)
            )
            errors.append(error.mean())
            name = "single" if single else "head"
            logs[name] = error[:, 0].mean().detach()
            if not single:
                logs["far"] = error[:, -1].mean().detach()
        return torch.stack(errors).mean(), logs

    def _without_memory(self, clip: Clip) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one window a game that sees only the frame before it. That frame and the state hold
        most of what a window needs, and writing keys and values costs as much as two windows.
        """
        size, (has_state, states) = self.denoiser.config.window_frames, self.known_states(clip)
        history, sigma = self._noised_context(clip.latents)
        start = clip.latents.shape[1] - size
        error = self._window_error(clip, states, has_state, history, sigma, start, size, KVRecorder())
        return error.mean(), {"alone": error[:, 0].mean().detach()}

    def known_states(self, clip: Clip) -> tuple[Tensor, Tensor]:
        """→ has_state (b,), 1 where the network may use the states, and states (b, t, s), finite everywhere.
        In a share of the games (`stateless`) they are hidden, since some worlds and starts have none.
        """
        known = torch.isfinite(clip.states).all(-1).all(-1)
        if self.states is None:
            return 0.0 * known, clip.states
        states = torch.where(known[:, None, None], clip.states, self.states.scales.offset)
        shown = torch.rand(len(known), device=known.device) >= self.stage.stateless
        return (known & shown).float(), states

    def _noised_context(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (b, t, c, y, x) → the same with noise in a share of the games (`context_noise_share`), as
        generated frames are never perfect, and the noise levels (b, t).
        """
        b, t = latents.shape[:2]
        level = self.stage.context_noise * torch.rand(b, 1, device=latents.device)
        level = level * (torch.rand(b, 1, device=latents.device) < self.stage.context_noise_share)
        sigma = level.expand(b, t)
        return add_noise(latents, torch.randn_like(latents), sigma), sigma

    def _condition(
        self,
        actions: Tensor,
        states: Tensor,
        before: Tensor,
        has_state: Tensor,
        ahead: Tensor,
        prev_sigma: Tensor,
    ) -> Tensor:
        """actions (b, history - 1 + t, k), states (b, t, s), `before`: the states of the finished frames that
        these are made from (b, t, s), has_state (b,), ahead (t,) and prev_sigma (b, t) as in
        ConditionEncoder → conditions (b, t, width).
        """
        if self.states is None:
            features = actions.new_zeros(*states.shape[:2], self.denoiser.features)
        else:
            features = state_features(self.states.scales, states, before)
        has_state = has_state[:, None].expand(features.shape[:2])
        return self.denoiser.condition(actions, features, has_state, ahead, prev_sigma)

    def _context(self, recorder: KVRecorder, start: int) -> KVContext:
        """Keys and values for a window that begins at frame `start`: the segment's first frames as the sink,
        shifted to where play has it, and the `context_frames` before the window. Half of the batch gets
        another segment's sink: in play the sink is from long ago and shows another view.
        """
        c, transformer = self.denoiser.config, self.denoiser.transformer
        n, layers = transformer.tokens, []
        order = torch.arange(len(recorder.layers[0][0]), device=recorder.layers[0][0].device)
        half = len(order) // 2
        order = torch.cat([order[:half].roll(1), order[half:]])
        ring = slice((start - c.context_frames) * n, start * n)
        for k, v in recorder.layers:
            sink = transformer.positions.shift(
                k[order, : c.sink_frames * n], start - c.context_frames - c.sink_frames
            )
            layers.append(
                (torch.cat([sink, k[:, ring]], 1), torch.cat([v[order, : c.sink_frames * n], v[:, ring]], 1))
            )
        return KVContext(layers)

    def _window_error(
        self,
        clip: Clip,
        states: Tensor,
        has_state: Tensor,
        history: Tensor,
        history_sigma: Tensor,
        start: int,
        size: int,
        context: KVContext | KVRecorder,
    ) -> Tensor:
        """Mean squared error (b, size) of the clean estimates of frames start … start + size - 1. `history`
        (b, t, c, y, x) and `history_sigma` (b, t): all frames as the window sees those before it.
        """
        config, span = self.denoiser.config, slice(start, start + size)
        clean, b = clip.latents[:, span], len(clip.latents)
        if size == 1:
            level = torch.full((b, 1), config.correction, device=clean.device)
            sigma = level * (1 - self.stage.jitter * torch.rand_like(level))
        else:
            sigma = training_sigma(self.denoiser.ladder, b, self.stage.jitter, self.stage.lowest)
        noisy = add_noise(clean, torch.randn_like(clean), sigma)
        actions = clip.actions[:, start : start + size + config.action_history - 1]
        prev_sigma = history_sigma[:, start - 1 : start].expand(b, size)
        ahead = torch.arange(size, device=clean.device)
        before = states[:, start - 1 : start].expand(-1, size, -1)
        condition = self._condition(actions, states[:, span], before, has_state, ahead, prev_sigma)
        made = self.denoiser(noisy, sigma, history[:, start - 1 : start], condition, start, context)
        return (made - clean).square().mean((2, 3, 4))


class DenoiserStage(LatentsStage):
    """Trains the denoiser on cached latents."""

    def __init__(self, *given):
        super().__init__(*given)
        start = self.model.denoiser.sink_frames + self.model.denoiser.context_frames
        # held-out games, unless all are too short to go on after their start
        shown = next(cache for cache in reversed(self.caches) if cache.longest() > start)
        self.shown = Batches(self.segments(shown, min(start + MADE, shown.longest())), 6, 0)
        self.module = self.loss()

    def loss(self) -> DenoiserLoss:
        """The networks to train, and their loss, as one module."""
        return DenoiserLoss(self.generator(), self.config.stage_config())

    def generator(self) -> Generator:
        """The generator whose denoiser is to be trained. That starts with the weights of the checkpoint's
        denoiser if there is one, else of its scene.
        """
        denoiser = make_denoiser(self.model, self.config.world)
        if "denoiser" in self.before.modules or "denoiser" not in TRAINED[self.config.stage].makes:
            self.before.load_into("denoiser", denoiser)
        elif "scene" in self.before.modules:
            self.before.load_into("scene", denoiser.condition.scene)
        known = (load_states(self.before), load_reader(self.before))
        return Generator(denoiser, *(part and self.frozen(part) for part in known))

    def segment(self) -> tuple[int, int]:
        sizes = self.model.denoiser
        length = least_frames(sizes, self.config.stage_config())
        return length, length - sizes.sink_frames - sizes.context_frames

    def world_model(self, module: DenoiserLoss) -> WorldModel:
        return WorldModel(self.autoencoder, module.generator)

    @torch.no_grad()
    def play(self, generator: Generator, batches: Batches, position: int = 0) -> tuple[Tensor, Tensor]:
        """Plays games from true starts under the recorded keys → true and generated latents after the start,
        (b, t, c, y, x) each. `position`: number of the batch.
        """
        clip = batches.segments.batch(batches.indices(position)).to(self.device)
        actions = clip.actions[:, batches.segments.before :]
        b = len(clip.latents)
        with autocast(self.device, self.dtype):
            dtype = compute_dtype(self.device)
            rollout = Rollout(generator, b, dtype)
            start = rollout.start_frames
            states = clip.states[:, :start] if generator.states else None
            seed = torch.arange(b, device=self.device)
            rollout.reset(clip.latents[:, :start], actions[:, :start], seed, states)
            made = torch.stack([rollout.step(action) for action in actions[:, start:].unbind(1)], 1)
        return clip.latents[:, start:], made

    @torch.no_grad()
    def picture(self, module: DenoiserLoss) -> np.ndarray:
        """Held-out games in pairs of rows: every fifth true frame, and below it the one that the model
        generates from the same start and keys.
        """
        both = self.play(module.generator, self.shown)
        with autocast(self.device, self.dtype):
            both = [decode_clip(self.autoencoder, x[:, ::5].float()) for x in both]
        rows = [rearrange(x, "b t c h w -> b t h w c").cpu().numpy() for x in both]
        return grid([row for pair in zip(*rows, strict=True) for row in pair])

    def validate(self, module: DenoiserLoss) -> dict[str, float]:
        """Figures of generated games against the true ones from the same held-out start, at each horizon:
        `missed`, the mean squared error of latents (whose variance is 1); `detail`, the energy of their
        detail as a share of the true ones'; `psnr` of the decoded pictures.
        """
        batches = Batches(self.shown.segments, MEASURED, 1)
        true, made = self.play(module.generator, batches)
        scores = {}
        for t in (t for t in HORIZONS if t <= made.shape[1]):
            pair = torch.stack([true[:, t - 1], made[:, t - 1]], 1).float()
            with torch.no_grad(), autocast(self.device, self.dtype):
                pictures = decode_clip(self.autoencoder, pair).float()
            error = (pictures[:, 0] - pictures[:, 1]).square().mean((1, 2, 3)).clamp_min(1e-3)
            true_detail, detail = (_detail(part) for part in pair.unbind(1))
            scores[f"detail_{t}"] = float(detail / true_detail)
            scores[f"missed_{t}"] = float((pair[:, 0] - pair[:, 1]).square().mean())
            scores[f"psnr_{t}"] = float((10 * torch.log10(255**2 / error)).mean())
        return scores


def _detail(latents: Tensor) -> Tensor:
    """Mean square of what latents (n, c, y, x) lose when every 2 x 2 patch is averaged."""
    return latents.square().mean() - F.avg_pool2d(latents, 2).square().mean()
