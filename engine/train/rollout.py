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
    stop: Tensor  # (b,): the clip's frame from which on true game and keys stay as they are
    known: Tensor  # (b,): the frame up to which that is what is true
    frame: int  # the next one, counted from the clip's first
    end: int
    stood: Tensor  # (b, 1, c, y, x): the true frame that moved last
    shown: Tensor  # (b, 1, c, y, x): what the game showed then


class Windows(NamedTuple):
    """What the model has made of a window, and what was true."""

    made: Tensor  # (b, w, c, y, x), with gradients, under the keys held before
    right: Tensor  # (b, w): 1 where these were held in the end, too, and what is true is known
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
        self.still: Game | None = None

    @property
    def start_frames(self) -> int:
        return self.denoiser.config.sink_frames + self.denoiser.config.context_frames

    @property
    def all_games(self) -> list[Game]:
        """`games`, and behind them the one group that stands still."""
        return self.games + ([self.still] if self.still else [])

    def forward(self, clip: Clip, turn: int) -> tuple[Tensor, dict[str, Tensor]]:
        choice = random.Random(f"kind {turn}")
        if choice.random() < self.stage.teacher_forcing:
            length = min(least_frames(self.denoiser.config, self.stage), clip.latents.shape[1])
            first = choice.randint(0, clip.latents.shape[1] - length)
            return super().forward(_cut(clip, first, length), turn)
        self._renew(clip)
        errors, weights, logs = [], [], {}
        for number, game in enumerate(self.all_games):
            still = number == len(self.games)
            for _ in range(self.stage.still_skip if still else 0):
                game = self._skip(game)
            for _ in range(self.stage.unroll if still else min(self.stage.unroll, game.end - game.frame)):
                error, weight, head, game = self._step(game)
                errors.append(error.flatten())
                weights.append(weight.flatten())
            if still:
                self.still = game
                logs["own_still"] = head
                continue
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
        start = self.start_frames
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
        if self.stage.still_games and (self.still is None or self.still.frame >= self.still.end):
            self.still = self._begin_still(clip, self.still and self.still.rollout)

    def _step(self, game: Game) -> tuple[Tensor, Tensor, Tensor, Game]:
        """Plays the game's next frame → squared errors and their weights (b, w or more), that of what is
        shown, and the game after it.
        """
        rollout, clip, frame = game.rollout, game.clip, game.frame
        size = self.denoiser.config.window_frames
        at = torch.minimum(torch.arange(frame, frame + size, device=game.stop.device), game.stop[:, None])
        rows = torch.arange(len(at), device=at.device)[:, None]
        true = clip.latents[rows, at]
        actions = clip.actions[rows, self.denoiser.config.action_history - 1 + at]
        action, assumed = actions[:, 0], rollout.assumed_action(actions[:, 0])
        made = rollout.predict(assumed)
        right = (actions == assumed[:, None]).all(-1) & (frame + size <= game.known)[:, None]
        right = right.to(made.dtype).cumprod(1)
        back, corrected = rollout.needs_renoise(action), None
        if rollout.correction:  # whether a game needs it is known to the device alone
            corrected = rollout.correct(made[:, :1].detach(), action)
        still = self._alike(true, game.stood).to(true.dtype)
        windows = Windows(made, right, corrected, back, true, still, game.shown, action)
        error, weight = self.judged(rollout, windows)
        head = rollout.advance(made.detach(), action, corrected is not None, corrected)
        return error, weight, (head - true[:, 0]).square().mean(), self._after(game, true[:, :1], head)

    @torch.no_grad()
    def _skip(self, game: Game) -> Game:
        """Plays a frame that is not learnt from, at a third of the cost."""
        rows, at = torch.arange(len(game.stop), device=game.stop.device), game.stop.clamp(max=game.frame)
        action = game.clip.actions[rows, self.denoiser.config.action_history - 1 + at]
        head = game.rollout.step(action, renoise=game.rollout.correction > 0)
        return self._after(game, game.clip.latents[rows, at][:, None], head)

    def _after(self, game: Game, true: Tensor, head: Tensor) -> Game:
        """The game when it has shown `head` (b, c, y, x) where `true` (b, 1, c, y, x) was to be seen."""
        stays = self._alike(true, game.stood)[..., None, None, None]
        stood = torch.where(stays, game.stood, true)
        shown = torch.where(stays, game.shown, head[:, None])
        return game._replace(frame=game.frame + 1, stood=stood, shown=shown)

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
        """Games (in the memory of earlier ones, if given) right after true frames. A share of them, where the
        truth stands still, stand so to their end: recorded players hardly ever stand as long as people do.
        """
        n, first = clip.latents.shape[1], self._stands(clip)
        stop = torch.where(torch.rand(len(first), device=first.device) < self.stage.stop, first, n)
        return self._begin_game(clip, stop, torch.full_like(stop, n), rollout, end)

    def _begin_still(self, clip: Clip, rollout: Rollout | None) -> Game:
        """Those of the clip that come to stand still first, and stand so for `still_frames`. What others
        among them would show when their clip is over is not known, nor learnt from.
        """
        n, first = clip.latents.shape[1], self._stands(clip)
        chosen = first.argsort(stable=True)[: self.stage.still_games]
        clip, stop = Clip(*(part[chosen] for part in clip)), first[chosen]
        end = self.start_frames + self.stage.still_frames
        known = torch.where(stop < n, end + n, n)
        return self._begin_game(clip, stop, known, rollout, end)

    def _begin_game(self, clip: Clip, stop: Tensor, known: Tensor, rollout: Rollout | None, end: int) -> Game:
        b, config = len(clip.latents), self.denoiser.config
        rollout = rollout or Rollout(self.generator, b, compute_dtype(clip.latents.device))
        start, history = rollout.start_frames, config.action_history - 1
        has_state, states = self.known_states(clip)
        states = torch.where(has_state[:, None, None] > 0, states, torch.nan)[:, :start]
        seed = torch.randint(2**31, (b,)).to(clip.latents.device)
        actions = clip.actions[:, history : history + start]
        ladder = jittered(self.denoiser.ladder.expand(b, -1), self.stage.jitter)
        rollout.reset(clip.latents[:, :start], actions, seed, states if self.states else None, ladder)
        last = clip.latents[:, start - 1 : start]
        stop = stop.clamp(max=clip.latents.shape[1] - 1)
        return Game(rollout, clip, stop, known, start, end, last, last)

    def _stands(self, clip: Clip) -> Tensor:
        """(b,): the first frame after the start at which the truth stands still under keys that have been
        held for as long as they count; the clip's length where there is none.
        """
        history, n = self.denoiser.config.action_history, clip.latents.shape[1]
        same = self._alike(clip.latents[:, 1:], clip.latents[:, :-1])
        changes = F.pad((clip.actions[:, 1:] != clip.actions[:, :-1]).any(-1), (1, 0)).cumsum(1)
        stands = F.pad(same, (1, 0)) & (changes[:, history - 1 :] == changes[:, :n])
        count = torch.arange(n, device=stands.device)
        return torch.where(stands & (count >= self.start_frames), count, n).amin(1)

    def under_way(self) -> list[dict]:
        """The games, as plain values and tensors."""
        return [
            game._asdict() | {"rollout": game.rollout.state(), "clip": game.clip._asdict()}
            for game in self.all_games
        ]

    def take_up(self, under_way: list[dict]) -> None:
        """Goes on with games of another time."""
        device = self.denoiser.ladder.device
        games = []
        for told in under_way:
            rollout = Rollout(self.generator, len(told["stop"]), told["rollout"]["buffer"].dtype)
            rollout.load_state(told["rollout"])
            clip = Clip(**told["clip"]).to(device)
            parts = {name: told[name].to(device) for name in ("stop", "known", "stood", "shown")}
            games.append(Game(**told | parts | {"rollout": rollout, "clip": clip}))
        self.still = games.pop() if games and self.stage.still_games else None
        self.games = games


def _cut(clip: Clip, first: int, length: int) -> Clip:
    """`length` frames from `first` on, with the keys before them."""
    before = clip.actions.shape[1] - clip.latents.shape[1]
    stop = first + length
    return Clip(
        clip.latents[:, first:stop], clip.actions[:, first : before + stop], clip.states[:, first:stop]
    )
