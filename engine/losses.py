"""What the stages minimise, each as one module that data parallelism can wrap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import StageConfig
from .denoiser import Denoiser, weighted_error
from .motion import Motion
from .rollout import Rollout
from .window import bind

STALE = 0.5  # share of the windows with changed keys that keep the model's own estimates


class MotionLoss(nn.Module):
    """Moves the pictures of true clips as their keys say, as one module that data parallelism can wrap."""

    def __init__(self, motion: Motion, commit_position: int):
        super().__init__()
        self.motion, self.commit_position = motion, commit_position

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.motion.loss(*self.clip(*batch))

    def clip(self, latents: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A segment → last frames, their actions, those of the coming ones as bound in play, these."""
        now = self.motion.momentum
        shown, _ = bind(actions[:, now:], self.commit_position)
        return latents[:, now - 2 : now], actions[:, :now], shown, latents[:, now:]


class PlainLoss(nn.Module):
    """Flow matching on true frames, as one module that data parallelism can wrap."""

    def __init__(self, denoiser: Denoiser, pace: StageConfig):
        super().__init__()
        self.denoiser, self.pace = denoiser, pace

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.denoiser.loss(*batch, self.pace.windows)


class RolloutLoss(PlainLoss):
    """Self-generated history: `Rollout` plays recorded actions, and at each step a window that stands on the
    model's own frames is held against the true ones.

    The history is the model's own, so that it learns to go on from its own faults. What is noised is the
    true frame, as a denoiser that is regressed on what it cannot know learns to paint the mean of all that
    could be: flat colour. Only where keys changed under the frames in flight is it, in half of the games, the
    model's own stale estimate: this makes a frame obey a key pressed late. All of its own is detached.
    """

    def __init__(self, denoiser: Denoiser, pace: StageConfig):
        super().__init__(denoiser, pace)
        self.rollout: Rollout | None = None

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if torch.rand(()) < self.pace.plain_share:
            return super().forward(batch)
        latents, actions = batch
        if self.rollout is None:
            self.rollout = Rollout(self.denoiser, len(latents), compute_dtype(latents.device))
        rollout, start = self.rollout, self.rollout.start_frames
        seed = torch.randint(2**31, (len(latents),)).to(latents.device)
        rollout.reset(latents[:, :start], actions[:, :start], seed)
        errors, heads = [], []
        for frame in range(start, start + self.pace.unroll):
            true, action = latents[:, frame : frame + self.denoiser.config.window], actions[:, frame]
            guess = rollout.guess(action)
            made = rollout.predict(action, self._noised(true, actions[:, : frame + 1]), guess)
            errors.append(weighted_error(made, true, rollout.ladder, self.denoiser.config.spread))  # (b, w)
            with torch.no_grad():
                head = rollout.advance(rollout.predict(action, guess=guess), action, guess)
            heads.append((head - true[:, 0]).square().mean())
        logs = {"own_first": heads[0], "own_last": heads[-1], "head_last": errors[-1][:, 0].mean().detach()}
        unused = 0 * self.denoiser.actions.null.sum()  # data parallelism wants a gradient for every weight
        return torch.stack(errors).mean() + unused, logs

    def _noised(self, true: Tensor, actions: Tensor) -> Tensor:
        """What is noised, (b, w, c, y, x), of true frames and the actions (b, t, k) up to now."""
        lately = actions[:, -self.denoiser.config.window :]
        changed = (lately != lately[:, -1:]).any(-1).any(-1)  # (b,)
        stale = changed & (torch.rand(len(actions)) < STALE).to(changed.device)
        return torch.where(stale[:, None, None, None, None], self.rollout.window.clean, true)


def compute_dtype(device: torch.device) -> torch.dtype:
    """What keys and values are kept in: autocast's, where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
