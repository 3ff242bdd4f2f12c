"""What the stages minimise, each as one module that data parallelism can wrap."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from .config import StageConfig
from .denoiser import Denoiser, weighted_error
from .discriminator import Discriminator
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
    """Self-generated history: `Rollout` plays recorded actions, and the windows that stand on the model's own
    frames are learnt from, in turns of two kinds.

    Held against the true frames: what is noised is the true frame, as a denoiser that is regressed on what it
    cannot know learns to paint the mean of all that could be: flat colour. Only where keys changed under the
    frames in flight is it, in half of the games, the model's own stale estimate: this makes a frame obey a
    key pressed late. Held against a discriminator: the window as it is in play, all the model's own; what it
    invents need not be the true frame, but must look like one. All that went before is detached.
    """

    def __init__(self, denoiser: Denoiser, pace: StageConfig):
        super().__init__(denoiser, pace)
        self.rollout: Rollout | None = None
        self.register_buffer("turns", torch.zeros((), dtype=torch.int64))  # iterations so far
        self.discriminator = Discriminator(
            denoiser.keys, denoiser.shape[0], pace.judge, denoiser.config.spread
        )

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        idle = [self.denoiser.actions.null, *self.discriminator.parameters()]
        unused = 0 * sum(p.sum() for p in idle)  # data parallelism wants a gradient for every weight
        # processes choose alike, as they wait for one another; from what is saved with the weights
        choice = random.Random(int(self.turns))
        self.turns += 1
        if choice.random() < self.pace.plain_share:
            loss, logs = super().forward(batch)
            return loss + unused, logs
        latents, actions = batch
        if self.rollout is None:
            self.rollout = Rollout(self.denoiser, len(latents), compute_dtype(latents.device))
        rollout, start = self.rollout, self.rollout.start_frames
        seed = torch.randint(2**31, (len(latents),)).to(latents.device)
        rollout.reset(latents[:, :start], actions[:, :start], seed)
        lead = choice.randint(0, self.pace.lead) if choice.random() < 0.5 else 0
        for frame in range(start, start + lead):
            rollout.step(actions[:, frame])
        start += lead
        errors, maker, judge, heads = [], [], [], []
        turn = choice.randint(0, 1)  # whose it is at the first frame
        for frame in range(start, start + self.pace.unroll):
            span = slice(frame, frame + self.denoiser.config.window)
            true, action = latents[:, span], actions[:, frame]
            guess = rollout.guess(action)
            if self.pace.adversarial and (frame - turn) % 2:
                made = rollout.predict(action, guess=guess)
                losses = self.discriminator.loss(made, true, *self._hints(guess, latents, actions, frame))
                maker.append(losses[0])
                judge.append(losses[1])
            else:
                made = rollout.predict(action, self._noised(true, actions[:, : frame + 1]), guess)
                spread = self.denoiser.config.spread
                errors.append(weighted_error(made, true, rollout.ladder, spread))  # (b, w)
                with torch.no_grad():
                    made = rollout.predict(action, guess=guess)
            head = rollout.advance(made.detach(), action, guess)
            heads.append((head - true[:, 0]).square().mean())
        error = torch.stack(errors).mean()
        logs = {"error": error, "own_first": heads[0], "own_last": heads[-1]}
        loss = error + unused
        if maker:
            maker, judge = torch.stack(maker).mean(), torch.stack(judge).mean()
            loss, logs = loss + self.pace.adversarial * maker + judge, logs | {"maker": maker, "judge": judge}
        return loss, logs

    def _hints(self, guess: Tensor, latents: Tensor, actions: Tensor, frame: int) -> tuple[tuple, tuple]:
        """First guesses (b, w, c, y, x) and actions (b, w, k), of the model's window and of the true one that
        begins at `frame`; what the guess goes by are the actions as play shows them.
        """
        motion, c = self.denoiser.motion, self.denoiser.config
        true_actions = actions[:, frame : frame + c.window]
        shown, _ = bind(true_actions, c.commit_position)
        idle = actions.new_zeros(len(actions), c.momentum, actions.shape[2])
        held = torch.cat([idle, actions[:, :frame]], 1)[:, -c.momentum :]
        true_guess = motion(latents[:, frame - 2 : frame], held, shown)
        return (guess, true_guess), (bind(self.rollout.window.actions, c.commit_position)[0], true_actions)

    def _noised(self, true: Tensor, actions: Tensor) -> Tensor:
        """What is noised, (b, w, c, y, x), of true frames and the actions (b, t, k) up to now."""
        lately = actions[:, -self.denoiser.config.window :]
        changed = (lately != lately[:, -1:]).any(-1).any(-1)  # (b,)
        stale = changed & (torch.rand(len(actions)) < STALE).to(changed.device)
        return torch.where(stale[:, None, None, None, None], self.rollout.window.clean, true)


def compute_dtype(device: torch.device) -> torch.dtype:
    """What keys and values are kept in: autocast's, where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
