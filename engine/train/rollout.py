"""Stage `rollout`: windows on the model's own frames, as play has them."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from ..config import StageConfig
from ..data.segments import Clip
from ..device import compute_dtype
from ..model.denoiser import Denoiser
from ..model.noise import jittered
from ..model.state import StateModel
from ..model.state_reader import StateReader
from ..rollout.rollout import Rollout
from .denoiser import DenoiserStage, PlainLoss


class RolloutLoss(PlainLoss):
    """Self-generated history: `Rollout` plays recorded actions, and every window that it denoises on the way
    is held against the true frames, which the state keeps near. All that went before a pass is detached.

    A window is denoised under the keys held before; those of its frames under which other keys were held in
    the end are not learnt from. Leaving frames that are sent back are, under their true keys.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        states: StateModel | None,
        stage: StageConfig,
        reader: StateReader | None = None,
    ):
        super().__init__(denoiser, states, stage)
        self._reader = (reader,)  # in a tuple, as it is not trained here
        self.rollout: Rollout | None = None
        self.register_buffer("turns", torch.zeros((), dtype=torch.int64))  # iterations so far

    def forward(self, clip: Clip) -> tuple[Tensor, dict[str, Tensor]]:
        # processes choose alike, as they wait for one another; by what is saved with the weights
        choice = random.Random(int(self.turns))
        self.turns += 1
        if choice.random() < self.stage.teacher_forcing:
            return super().forward(clip)
        burn_in = choice.randint(0, self.stage.burn_in) if choice.random() < 0.5 else 0
        rollout, frame = self._begin(clip, burn_in)
        errors, weights, own = [], [], []
        for _ in range(self.stage.unroll):
            error, weight, head = self._step(rollout, clip, frame)
            errors.append(error)
            weights.append(weight)
            own.append(head)
            frame += 1
        error, weight = torch.cat(errors, 1), torch.cat(weights, 1)
        loss = (error * weight).sum() / weight.sum().clamp_min(1)
        logs = {"own_first": own[0], "own_last": own[-1]}
        return loss, ({"own_burnt_in": own[-1]} if burn_in > 16 else logs)

    def _step(self, rollout: Rollout, clip: Clip, frame: int) -> tuple[Tensor, Tensor, Tensor]:
        """Plays frame number `frame` → squared errors and their weights (b, w + 1), that of what is shown."""
        size = self.denoiser.config.window_frames
        true = clip.latents[:, frame : frame + size]
        begin = self.denoiser.config.action_history - 1 + frame
        actions = clip.actions[:, begin : begin + size]
        assumed = rollout.assumed_action(actions[:, 0])
        made = rollout.predict(assumed)
        error = (made - true).square().mean((2, 3, 4))
        right = (actions == assumed[:, None]).all(-1).to(error.dtype).cumprod(1)
        back = rollout.needs_renoise(actions[:, 0])
        corrected = None
        if rollout.correction and back.any():
            corrected = rollout.correct(made[:, :1].detach(), actions[:, 0])
            again = (corrected - true[:, :1]).square().mean((2, 3, 4))
            error, right = torch.cat([error, again], 1), torch.cat([right, back[:, None].float()], 1)
        head = rollout.advance(made.detach(), actions[:, 0], corrected=corrected)
        return error, right, (head - true[:, 0]).square().mean()

    def _begin(self, clip: Clip, burn_in: int) -> tuple[Rollout, int]:
        """Games that have gone on for `burn_in` frames behind true ones → these, and the next frame."""
        b, config = len(clip.latents), self.denoiser.config
        if self.rollout is None:
            dtype = compute_dtype(clip.latents.device)
            self.rollout = Rollout(self.denoiser, self.states, b, dtype, reader=self._reader[0])
        rollout, start, history = self.rollout, self.rollout.start_frames, config.action_history - 1
        has_state, states = self.known_states(clip)
        states = torch.where(has_state[:, None, None] > 0, states, torch.nan)[:, :start]
        seed = torch.randint(2**31, (b,)).to(clip.latents.device)
        actions = clip.actions[:, history:]
        rollout.reset(clip.latents[:, :start], actions[:, :start], seed, states if self.states else None)
        rollout.ladder = jittered(self.denoiser.ladder.expand(b, -1), self.stage.jitter)
        for action in actions[:, start : start + burn_in].unbind(1):
            rollout.step(action)
        return rollout, start + burn_in


class RolloutStage(DenoiserStage):
    """Goes on from the denoiser of the stage before on its own history."""

    def loss(self) -> RolloutLoss:
        return RolloutLoss(self._denoiser(), self.states, self.config.pace(), self.reader)

    def segment(self) -> tuple[int, int]:
        sizes, stage = self.model.denoiser, self.config.pace()
        start = sizes.sink_frames + sizes.context_frames
        length = start + stage.burn_in + stage.unroll + sizes.window_frames - 1
        return max(length, stage.clip), length - start
