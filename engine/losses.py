"""What the stages minimise, each as one module that data parallelism can wrap."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from .config import StageConfig
from .denoiser import Denoiser, weighted_error
from .discriminator import Discriminator
from .motion import Guess, Motion
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
        self.discriminator = Discriminator(denoiser.keys, denoiser.shape[0], pace.judge)

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        # processes choose alike, as they wait for one another; by what is saved with the weights
        choice = random.Random(int(self.turns))
        self.turns += 1
        plain = choice.random() < self.pace.plain_share
        loss, logs = super().forward(batch) if plain else self._rolled(*batch, choice)
        idle = [self.denoiser.actions.null, *self.discriminator.parameters()]
        unused = 0 * sum(p.sum() for p in idle)  # data parallelism wants a gradient for every weight
        return loss + unused, logs

    def _rolled(
        self, latents: Tensor, actions: Tensor, choice: random.Random
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is learnt from `unroll` steps on the model's own frames. Half of the games have a lead of some
        steps: they are judged only, as the true frames have become those of another walk, and regression on
        these would teach their mean.
        """
        lead = choice.randint(0, self.pace.lead) if self.pace.adversarial and choice.random() < 0.5 else 0
        rollout, start = self._begin(latents, actions, lead)
        turn = choice.randint(0, 1)  # whose the first frame is
        found: dict[str, list[Tensor]] = {"error": [], "maker": [], "judge": []}
        off = []
        for frame in range(start, start + self.pace.unroll):
            true, action = latents[:, frame : frame + self.denoiser.config.window], actions[:, frame]
            guess = rollout.guess(action)
            judged = self.pace.adversarial > 0 and (frame - turn) % 2 == 1
            with torch.set_grad_enabled(judged):
                own = rollout.predict(action, guess=guess)
            if judged:
                hints = self._hints(guess, latents, actions, frame)
                maker, judge = self.discriminator.loss(own, true, *hints)
                found["maker"].append(maker)
                found["judge"].append(judge)
            elif not lead:
                made = rollout.predict(action, self._noised(true, actions[:, : frame + 1]), guess)
                spread = self.denoiser.config.spread
                found["error"].append(weighted_error(made, true, rollout.ladder, spread))  # (b, w)
            head = rollout.advance(own.detach(), action, guess)
            off.append((head - true[:, 0]).square().mean())
        parts = {name: torch.stack(values).mean() for name, values in found.items() if values}
        loss = sum(value * (self.pace.adversarial if name == "maker" else 1) for name, value in parts.items())
        return loss, {**parts, "own_first": off[0], "own_last": off[-1]}

    def _begin(self, latents: Tensor, actions: Tensor, lead: int) -> tuple[Rollout, int]:
        """Games that have gone on for `lead` frames behind true ones → these, and the number of the next."""
        if self.rollout is None:
            self.rollout = Rollout(self.denoiser, len(latents), compute_dtype(latents.device))
        rollout, start = self.rollout, self.rollout.start_frames
        seed = torch.randint(2**31, (len(latents),)).to(latents.device)
        rollout.reset(latents[:, :start], actions[:, :start], seed)
        for action in actions[:, start : start + lead].unbind(1):
            rollout.step(action)
        return rollout, start + lead

    def _hints(self, guess: Guess, latents: Tensor, actions: Tensor, frame: int) -> tuple[tuple, tuple]:
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
