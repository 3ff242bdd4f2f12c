"""RolloutLoss: plays games with the model in training, just as play does, and learns from their windows."""

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
from .denoiser import DenoiserLoss, least_frames


class Game(NamedTuple):
    """A group of games of the same age: the model's rollout, and the recorded clip whose keys it plays.

    Frames are counted from the clip's first one.
    """

    rollout: Rollout
    clip: Clip
    stop_frame: Tensor  # (b,): from this frame on the true frame and the keys do not change any more
    known_frames: Tensor  # (b,): before this frame the truth is known; later ones are not learnt from
    frame: int  # the next frame to play
    end: int  # the frame at which the games are over
    true_reference: Tensor  # (b, 1, c, y, x): the latest true frame unlike the reference before it
    own_reference: Tensor  # (b, 1, c, y, x): the model's own frame at that time


class Windows(NamedTuple):
    """A denoised window of a group of games, and the truth beside it."""

    predicted: Tensor  # (b, w, c, y, x), with gradients, denoised under the keys held before
    valid: Tensor  # (b, w): 1 where those keys turned out to be the true ones and the truth is known
    corrected: Tensor | None  # (b, 1, c, y, x): the leaving frame, denoised again under its true keys
    renoised: Tensor  # (b,): in which games that one replaces the predicted frame
    true: Tensor  # (b, w, c, y, x)
    still: Tensor  # (b, w): 1 where the true frame looks like `Game.true_reference`
    own_reference: Tensor  # (b, 1, c, y, x): as in Game
    action: Tensor  # (b, k): the true keys of the leaving frame


class RolloutLoss(DenoiserLoss):
    """Squared error of the windows that `Rollout` denoises while it plays recorded actions. DistillLoss
    overrides `window_errors`. Gradients flow through one pass; everything before it is detached.

    Games are continued from iteration to iteration, in groups of different ages, so that old games are
    learnt from without being played from their start each time. A window is denoised before the true keys
    are known; its frames from the first wrong key on are not learnt from. A leaving frame that is sent back
    and denoised under its true keys is.
    """

    def __init__(self, generator: Generator, stage: DistillStageConfig):
        super().__init__(generator, stage)
        self.games: list[Game] = []
        self.still_game: Game | None = None

    @property
    def start_frames(self) -> int:
        """True frames that a game begins with."""
        return self.denoiser.config.sink_frames + self.denoiser.config.context_frames

    @property
    def all_games(self) -> list[Game]:
        """`games`, followed by `still_game` where there is one."""
        return self.games + ([self.still_game] if self.still_game else [])

    def forward(self, clip: Clip, turn: int) -> tuple[Tensor, dict[str, Tensor]]:
        choice = random.Random(f"kind {turn}")
        if choice.random() < self.stage.teacher_forcing:
            length = min(least_frames(self.denoiser.config, self.stage), clip.latents.shape[1])
            first = choice.randint(0, clip.latents.shape[1] - length)
            return super().forward(_cut(clip, first, length), turn)
        self._restart(clip)
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
                self.still_game = game
                logs["own_still"] = head
                continue
            self.games[number] = game
            age = game.frame - game.rollout.start_frames
            logs["own_old" if age > self.stage.game_frames // 2 else "own_young"] = head
        error, weight = torch.cat(errors), torch.cat(weights)
        return (error * weight).sum() / weight.sum().clamp_min(1), logs

    def _restart(self, clip: Clip) -> None:
        """Replaces the games that are over by new ones on this clip, each group with its share of the batch.
        The very first games get different lengths, so that later they do not all end at once.
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
        old = self.still_game
        if self.stage.still_games and (old is None or old.frame >= old.end):
            self.still_game = self._begin_still(clip, old and old.rollout)

    def _step(self, game: Game) -> tuple[Tensor, Tensor, Tensor, Game]:
        """Plays the game's next frame → errors and weights as `window_errors` has them, the mean squared
        error of the finished frame (), and the game after it.
        """
        rollout, clip, frame = game.rollout, game.clip, game.frame
        size = self.denoiser.config.window_frames
        window = torch.arange(frame, frame + size, device=game.stop_frame.device)
        at = torch.minimum(window, game.stop_frame[:, None])  # (b, w)
        rows = torch.arange(len(at), device=at.device)[:, None]
        true = clip.latents[rows, at]
        still = self._alike(true, game.true_reference).to(true.dtype)
        actions = clip.actions[rows, self.denoiser.config.action_history - 1 + at]
        action, assumed = actions[:, 0], rollout.assumed_action(actions[:, 0])
        predicted = rollout.predict(assumed)
        valid = (actions == assumed[:, None]).all(-1) & (frame + size <= game.known_frames)[:, None]
        valid = valid.to(predicted.dtype).cumprod(1)
        renoised, corrected = rollout.needs_renoise(action), None
        if rollout.correction:  # always: only the device knows whether a game needs it
            corrected = rollout.correct(predicted[:, :1].detach(), action)
        windows = Windows(predicted, valid, corrected, renoised, true, still, game.own_reference, action)
        error, weight = self.window_errors(rollout, windows)
        head = rollout.advance(predicted.detach(), action, corrected is not None, corrected)
        return error, weight, (head - true[:, 0]).square().mean(), self._after(game, true[:, :1], head)

    @torch.no_grad()
    def _skip(self, game: Game) -> Game:
        """Plays a frame that is not learnt from, at a third of the cost → the game after it."""
        rows = torch.arange(len(game.stop_frame), device=game.stop_frame.device)
        at = game.stop_frame.clamp(max=game.frame)
        action = game.clip.actions[rows, self.denoiser.config.action_history - 1 + at]
        head = game.rollout.step(action, renoise=game.rollout.correction > 0)
        return self._after(game, game.clip.latents[rows, at][:, None], head)

    def _after(self, game: Game, true: Tensor, head: Tensor) -> Game:
        """The game after its frame `head` (b, c, y, x), where the true one is (b, 1, c, y, x)."""
        alike = self._alike(true, game.true_reference)[..., None, None, None]
        true_reference = torch.where(alike, game.true_reference, true)
        own_reference = torch.where(alike, game.own_reference, head[:, None])
        return game._replace(frame=game.frame + 1, true_reference=true_reference, own_reference=own_reference)

    def _alike(self, one: Tensor, other: Tensor) -> Tensor:
        """True frames (b, t, c, y, x), twice → bool (b, t): whether they show the same."""
        return (one - other).square().mean((2, 3, 4)) < self.stage.still_threshold

    def window_errors(self, rollout: Rollout, windows: Windows) -> tuple[Tensor, Tensor]:
        """→ the squared errors of a window and their weights, both (b, w), or (b, w + 1) with the corrected
        frame's where there is one.
        """
        predicted, valid, corrected, renoised, true, *_ = windows
        error = (predicted - true).square().mean((2, 3, 4))
        if corrected is None:
            return error, valid
        again = (corrected - true[:, :1]).square().mean((2, 3, 4))
        return torch.cat([error, again], 1), torch.cat([valid, renoised[:, None].to(valid.dtype)], 1)

    def _begin(self, clip: Clip, rollout: Rollout | None, end: int) -> Game:
        """New games that start from the clip's first frames, in the memory of `rollout` if given. In a share
        of them the true game, once it stands still, never moves again: recorded players hardly ever stand
        still for as long as people do.
        """
        n, first = clip.latents.shape[1], self._first_still(clip)
        stop = torch.where(torch.rand(len(first), device=first.device) < self.stage.stop_share, first, n)
        return self._begin_game(clip, stop, torch.full_like(stop, n), rollout, end)

    def _begin_still(self, clip: Clip, rollout: Rollout | None) -> Game:
        """`still_games` new games of `still_frames` generated frames: those of the batch that stand still the
        soonest, and then never move again. If one never stands still, its truth is known only as far as its
        clip goes.
        """
        n, first = clip.latents.shape[1], self._first_still(clip)
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

    def _first_still(self, clip: Clip) -> Tensor:
        """(b,): the first frame after the start that looks like the one before it, while the keys have not
        changed for all of `action_history`; the clip's length where there is none.
        """
        history, n = self.denoiser.config.action_history, clip.latents.shape[1]
        same = self._alike(clip.latents[:, 1:], clip.latents[:, :-1])
        changes = F.pad((clip.actions[:, 1:] != clip.actions[:, :-1]).any(-1), (1, 0)).cumsum(1)
        stands = F.pad(same, (1, 0)) & (changes[:, history - 1 :] == changes[:, :n])
        count = torch.arange(n, device=stands.device)
        return torch.where(stands & (count >= self.start_frames), count, n).amin(1)

    def resume_state(self) -> list[dict]:
        """All games, as plain values and tensors."""
        return [
            game._asdict() | {"rollout": game.rollout.state(), "clip": game.clip._asdict()}
            for game in self.all_games
        ]

    def load_resume_state(self, saved: list[dict]) -> None:
        """Continues the games of `resume_state`; KeyError or RuntimeError if other networks made them."""
        device = self.denoiser.ladder.device
        games = []
        for values in saved:
            rollout = Rollout(self.generator, len(values["stop_frame"]), values["rollout"]["buffer"].dtype)
            rollout.load_state(values["rollout"])
            parts = {"rollout": rollout, "clip": Clip(**values["clip"]).to(device)}
            parts |= {name: x.to(device) for name, x in values.items() if torch.is_tensor(x)}
            games.append(Game(**values | parts))
        self.still_game = games.pop() if games and self.stage.still_games else None
        self.games = games


def _cut(clip: Clip, first: int, length: int) -> Clip:
    """Frames first … first + length - 1 of a clip, with the keys before them."""
    before = clip.actions.shape[1] - clip.latents.shape[1]
    stop = first + length
    return Clip(
        clip.latents[:, first:stop], clip.actions[:, first : before + stop], clip.states[:, first:stop]
    )
