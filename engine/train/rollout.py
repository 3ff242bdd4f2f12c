"""Self-generated history: games of the model's own, as play has them, and a loss on their windows."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.segments import Clip
from ..device import compute_dtype
from ..model.noise import jittered
from ..model.world_model import Generator
from ..rollout.rollout import Rollout
from ..stage_config import DistillStageConfig
from .denoiser import PlainLoss, least_frames


class Game(NamedTuple):
    """Some games under way, all of one age, and what they play."""

    rollout: Rollout
    clip: Clip
    frame: int  # the next one, counted from the clip's first
    end: int
    stood: Tensor  # (b, 1, c, y, x): the true frame that moved last
    shown: Tensor  # (b, 1, c, y, x): what the game showed then


class Windows(NamedTuple):
    """What the model has made of a window, and what was true."""

    made: Tensor  # (b, w, c, y, x), with gradients, under the keys held before
    right: Tensor  # (b, w): 1 where these were held in the end, too
    corrected: Tensor | None  # (b, 1, c, y, x): the leaving frame, sent back, if any game's is
    back: Tensor  # (b,): whose is
    true: Tensor  # (b, w, c, y, x)
    still: Tensor  # (b, w): 1 where the true game shows what it showed when it moved last
    shown: Tensor  # (b, 1, c, y, x): what the own one showed then
    action: Tensor  # (b, k), the true keys of the leaving frame


class RolloutLoss(PlainLoss):
    """`Rollout` plays recorded actions, and every window that it denoises on the way is held against the true
    frames, which the state keeps near; what else is asked of it is stage `distill`'s. All that went before a
    pass is detached.

    Games go on from iteration to iteration, in groups of different ages: what a game has cost to become old
    is not paid again for the few frames that are learnt from. A window is denoised under the keys held
    before; those of its frames under which other keys were held in the end are not learnt from. Leaving
    frames that are sent back are, under their true keys.
    """

    def __init__(self, generator: Generator, stage: DistillStageConfig):
        super().__init__(generator, stage)
        self.games: list[Game] = []

    def forward(self, clip: Clip, turn: int) -> tuple[Tensor, dict[str, Tensor]]:
        choice = random.Random(f"kind {turn}")
        if choice.random() < self.stage.teacher_forcing:
            length = min(least_frames(self.denoiser.config, self.stage), clip.latents.shape[1])
            first = choice.randint(0, clip.latents.shape[1] - length)
            return super().forward(_cut(clip, first, length), turn)
        self._renew(clip)
        errors, weights, logs = [], [], {}
        for number, game in enumerate(self.games):
            for _ in range(min(self.stage.unroll, game.end - game.frame)):
                error, weight, head, game = self._step(game)
                errors.append(error.flatten())
                weights.append(weight.flatten())
            self.games[number] = game
            age = game.frame - game.rollout.start_frames
            logs["own_old" if age > self.stage.game_frames // 2 else "own_young"] = head
        error, weight = torch.cat(errors), torch.cat(weights)
        return (error * weight).sum() / weight.sum().clamp_min(1), logs

    def _renew(self, clip: Clip) -> None:
        """Begins the games that are over anew, each group with its share of the clip; at the very first in
        steps of age, so that they do not all end at once.
        """
        groups = min(self.stage.game_groups, len(clip.latents))
        shares = [Clip(*parts) for parts in zip(*(part.tensor_split(groups) for part in clip), strict=True)]
        start = self.denoiser.config.sink_frames + self.denoiser.config.context_frames
        longest = clip.latents.shape[1] - self.denoiser.config.window_frames + 1
        if not self.games:
            lives = [(longest - start) * (number + 1) // groups for number in range(groups)]
            self.games = [
                self._begin(share, None, start + max(1, life))
                for share, life in zip(shares, lives, strict=True)
            ]
        for number, (game, share) in enumerate(zip(self.games, shares, strict=True)):
            if game.frame >= game.end:
                self.games[number] = self._begin(share, game.rollout, longest)

    def _step(self, game: Game) -> tuple[Tensor, Tensor, Tensor, Game]:
        """Plays the game's next frame → squared errors and their weights (b, w or more), that of what is
        shown, and the game after it.
        """
        rollout, clip, frame = game.rollout, game.clip, game.frame
        size = self.denoiser.config.window_frames
        true = clip.latents[:, frame : frame + size]
        still = self._alike(true, game.stood).to(true.dtype)
        begin = self.denoiser.config.action_history - 1 + frame
        actions = clip.actions[:, begin : begin + size]
        action, assumed = actions[:, 0], rollout.assumed_action(actions[:, 0])
        made = rollout.predict(assumed)
        right = (actions == assumed[:, None]).all(-1).to(made.dtype).cumprod(1)
        back, corrected = rollout.needs_renoise(action), None
        if rollout.correction:  # whether a game needs it is known to the device alone
            corrected = rollout.correct(made[:, :1].detach(), action)
        windows = Windows(made, right, corrected, back, true, still, game.shown, action)
        error, weight = self.judged(rollout, windows)
        head = rollout.advance(made.detach(), action, corrected is not None, corrected)
        stays = still[:, :1, None, None, None] > 0
        stood = torch.where(stays, game.stood, true[:, :1])
        shown = torch.where(stays, game.shown, head[:, None])
        game = game._replace(frame=frame + 1, stood=stood, shown=shown)
        return error, weight, (head - true[:, 0]).square().mean(), game

    def _alike(self, one: Tensor, other: Tensor) -> Tensor:
        """Whether true frames (b, t, c, y, x) show the same → (b, t)."""
        return (one - other).square().mean((2, 3, 4)) < self.stage.still

    def judged(self, rollout: Rollout, windows: Windows) -> tuple[Tensor, Tensor]:
        """Errors and weights, both (b, w) or with one more for frames that were sent back."""
        made, right, corrected, back, true, *_ = windows
        error = (made - true).square().mean((2, 3, 4))
        if corrected is None:
            return error, right
        again = (corrected - true[:, :1]).square().mean((2, 3, 4))
        return torch.cat([error, again], 1), torch.cat([right, back[:, None].to(right.dtype)], 1)

    def _begin(self, clip: Clip, rollout: Rollout | None, end: int) -> Game:
        """Games (in the memory of earlier ones, if given) right after true frames."""
        b, config = len(clip.latents), self.denoiser.config
        if rollout is None:
            dtype = compute_dtype(clip.latents.device)
            rollout = Rollout(self.generator, b, dtype)
        start, history = rollout.start_frames, config.action_history - 1
        has_state, states = self.known_states(clip)
        states = torch.where(has_state[:, None, None] > 0, states, torch.nan)[:, :start]
        seed = torch.randint(2**31, (b,)).to(clip.latents.device)
        actions = clip.actions[:, history : history + start]
        ladder = jittered(self.denoiser.ladder.expand(b, -1), self.stage.jitter)
        rollout.reset(clip.latents[:, :start], actions, seed, states if self.states else None, ladder)
        last = clip.latents[:, start - 1 : start]
        return Game(rollout, self._stopped(clip, start), start, end, last, last)

    def _stopped(self, clip: Clip, start: int) -> Clip:
        """The clip in which a share of the games, where the truth stands still under keys that have been held
        for as long as they count, from `start` on, stand so to its end. Recorded players hardly ever stand
        as long as people do.
        """
        history, n = self.denoiser.config.action_history, clip.latents.shape[1]
        same = self._alike(clip.latents[:, 1:], clip.latents[:, :-1])
        changes = F.pad((clip.actions[:, 1:] != clip.actions[:, :-1]).any(-1), (1, 0)).cumsum(1)
        stop = F.pad(same, (1, 0)) & (changes[:, history - 1 :] == changes[:, :n])
        stop &= torch.rand(len(stop), 1, device=stop.device) < self.stage.stop
        count = torch.arange(n, device=stop.device)
        stop &= count >= start
        first = torch.where(stop, count, n).amin(1, keepdim=True)
        number = torch.minimum(count, first)
        rows = torch.arange(len(stop), device=stop.device)[:, None]
        before = clip.actions[:, : history - 1]
        actions = torch.cat([before, clip.actions[:, history - 1 :][rows, number]], 1)
        return Clip(clip.latents[rows, number], actions, clip.states[rows, number])


def _cut(clip: Clip, first: int, length: int) -> Clip:
    """`length` frames from `first` on, with the keys before them."""
    before = clip.actions.shape[1] - clip.latents.shape[1]
    stop = first + length
    return Clip(
        clip.latents[:, first:stop], clip.actions[:, first : before + stop], clip.states[:, first:stop]
    )
