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
from .sampler import jittered
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
    key pressed late. Held against a discriminator: the window as it is in play, all the model's own, or its
    leaving frame denoised alone, as when a key has changed; what it invents need not be the true frame, but
    must look like one. All that went before is detached.
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
        alone = self.denoiser.config.correction > 0 and choice.random() < self.pace.alone_share
        rollout, start = self._begin(latents, actions, lead)
        turn = choice.randint(0, 1)  # whose the first frame is
        found: dict[str, list[Tensor]] = {"error": [], "maker": [], "judge": []}
        off = []
        for frame in range(start, start + self.pace.unroll):
            true, action = latents[:, frame : frame + self.denoiser.config.window], actions[:, frame]
            judged = self.pace.adversarial > 0 and (frame - turn) % 2 == 1
            made, guess, own = drawn(rollout, action, alone, judged)
            if judged:
                hints = self._hints(guess, latents, actions, frame)
                maker, judge = self.discriminator.loss(made, true[:, : made.shape[1]], *hints)
                found["maker"].append(maker)
                found["judge"].append(judge)
            elif not lead:
                # what became of the window is known, and so are the keys
                noised = self._noised(true, actions[:, : frame + 1])
                made = rollout.predict(action, noised, rollout.guess(action))
                spread = self.denoiser.config.spread
                found["error"].append(weighted_error(made, true, rollout.ladder, spread))  # (b, w)
            head = rollout.advance(own, action, stale=False if alone else None)
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
        rollout.ladder = jittered(self.denoiser.ladder.expand(len(latents), -1), self.pace.jitter)
        for action in actions[:, start : start + lead].unbind(1):
            rollout.step(action)
        return rollout, start + lead

    def _hints(self, guess: Guess, latents: Tensor, actions: Tensor, frame: int) -> tuple[tuple, tuple]:
        """First guesses (b, t, c, y, x) and actions (b, t, k), of the model's window or its leaving frame and
        of the true one that begins at `frame`; what the guess goes by are the actions as play shows them.
        """
        motion, c, t = self.denoiser.motion, self.denoiser.config, guess.mean.shape[1]
        true_actions = actions[:, frame : frame + c.window]
        shown, _ = bind(true_actions, c.commit_position)
        idle = actions.new_zeros(len(actions), c.momentum, actions.shape[2])
        held = torch.cat([idle, actions[:, :frame]], 1)[:, -c.momentum :]
        true_guess = motion(latents[:, frame - 2 : frame], held, shown[:, :t])
        told = bind(self.rollout.window.actions, c.commit_position)[0]
        return (guess, true_guess), (told[:, :t], true_actions[:, :t])

    def _noised(self, true: Tensor, actions: Tensor) -> Tensor:
        """What is noised, (b, w, c, y, x), of true frames and the actions (b, t, k) up to now."""
        lately = actions[:, -self.denoiser.config.window :]
        changed = (lately != lately[:, -1:]).any(-1).any(-1)  # (b,)
        stale = changed & (torch.rand(len(actions)) < STALE).to(changed.device)
        return torch.where(stale[:, None, None, None, None], self.rollout.window.clean, true)


def drawn(rollout: Rollout, action: Tensor, alone: bool, gradient: bool) -> tuple[Tensor, Guess, Tensor]:
    """A step as it is played, up to `Rollout.advance`: the window, denoised before the keys (b, k) are known,
    or (`alone`) its leaving frame, denoised once more when they are → this (b, t, c, y, x), with gradients
    where wanted, its guess, and the window to go on with (b, w, c, y, x).
    """
    told = rollout.told(action)
    guess = rollout.guess(told)
    with torch.set_grad_enabled(gradient and not alone):
        own = made = rollout.predict(told, guess=guess)
    if alone:
        guess = rollout.guess(action).part(slice(1))
        with torch.set_grad_enabled(gradient):
            made = rollout.correct(own[:, :1], guess)
        own = torch.cat([made, own[:, 1:]], 1)
    return made, guess, own.detach()


def compute_dtype(device: torch.device) -> torch.dtype:
    """What keys and values are kept in: autocast's, where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
