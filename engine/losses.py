"""What the stages minimise, each as one module that data parallelism can wrap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import StageConfig
from .denoiser import Denoiser, weighted_error
from .motion import Motion
from .rollout import Rollout
from .window import bind


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
    """Self-generated history: `Rollout` plays recorded actions, and at every step a window that stands on the
    model's own frames is held against the true ones.

    The history is the model's own, so that it learns to go on from its own faults. What is noised is the true
    frame, as a denoiser that is regressed on what it cannot know learns to paint the mean of all that could
    be: flat colour. Only where keys changed under the frames in flight is it, in half of the games, the
    model's own stale estimate: this makes a frame obey a key pressed late. All of the model's own is
    detached.
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
        errors, logs = [], {}
        for frame in range(start, start + self.pace.unroll):
            true = latents[:, frame : frame + self.denoiser.config.window]
            stale = self._stale(actions[:, : frame + 1]).to(latents.device)
            clean = torch.where(stale[:, None, None, None, None], rollout.window.clean, true)
            guess = rollout.guess(actions[:, frame])
            made = rollout.predict(actions[:, frame], clean, guess)
            errors.append(weighted_error(made, true, rollout.ladder, self.denoiser.config.spread))  # (b, w)
            with torch.no_grad():
                head = rollout.advance(rollout.predict(actions[:, frame], guess=guess), actions[:, frame])
            if frame in (start, start + self.pace.unroll - 1):
                name = "own_first" if frame == start else "own_last"
                logs[name] = (head - true[:, 0]).square().mean()
        error = torch.stack(errors)  # (steps, b, w)
        unused = 0 * self.denoiser.actions.null.sum()  # data parallelism wants a gradient for every weight
        return error.mean() + unused, logs | {"head_last": error[-1, :, 0].mean().detach()}

    def _stale(self, actions: Tensor) -> Tensor:
        """Actions up to now (b, t, k) → which windows keep their own estimates, bool (b,)."""
        lately = actions[:, -self.denoiser.config.window :]
        return (lately != lately[:, -1:]).any(-1).any(-1) & (torch.rand(len(actions)) < 0.5).to(
            actions.device
        )


def compute_dtype(device: torch.device) -> torch.dtype:
    """What keys and values are kept in: autocast's, where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
