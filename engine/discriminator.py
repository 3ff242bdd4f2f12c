"""Discriminator: true frames told from made ones, so that what must be invented is drawn, not averaged."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .motion import Guess

BLIND = 0.3  # share of frames that are judged without the first guess at them
SLIP = 0.1  # standard deviation of the disturbance under which judgements must not change


class Discriminator(nn.Module):
    """Judges latents patch by patch at three sizes, each frame beside what its first guess misses and the
    held keys: what was seen before must stay, and move as told; what is new must look true.

    A regression cannot choose among the many frames that could come into view behind a wall and paints
    their mean; a judge that has seen true frames refuses the mean (Goodfellow et al., 2014; patches: Isola
    et al., 2017). Some frames are judged alone, as a guess from the model's own frames gives them away.
    """

    def __init__(self, keys: int, channels: int, width: int):
        super().__init__()
        given = 2 * channels + keys + 1
        sizes = (given, width, 2 * width, 2 * width)  # channels at full, half and a quarter of the resolution
        self.levels = nn.ModuleList()
        for level, (narrow, wide) in enumerate(zip(sizes, sizes[1:], strict=False)):
            first = nn.Conv2d(narrow, wide, 4, 2, 1) if level else nn.Conv2d(narrow, wide, 3, padding=1)
            second = nn.Conv2d(wide, wide, 3, padding=1)
            self.levels.append(nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2)))
        self.scores = nn.ModuleList(nn.Conv2d(wide, 1, 3, padding=1) for wide in sizes[1:])

    def forward(self, frames: Tensor, missed: Tensor, actions: Tensor, seen: Tensor) -> list[Tensor]:
        """Frames and what their first guesses miss (n, c, y, x), in units of the guesses' doubt, the actions
        that caused them (n, k), whether these two may be seen (n,) → scores (n, 1, y, x), (n, 1, y/2, x/2),
        (n, 1, y/4, x/4), higher for true.
        """
        told = torch.cat([actions, torch.ones_like(actions[:, :1])], 1)[..., None, None]
        hints = torch.cat([missed, told.expand(-1, -1, *frames.shape[2:])], 1)
        x = torch.cat([frames, hints * seen[:, None, None, None]], 1)
        x, scores = x.contiguous(memory_format=torch.channels_last), []
        for level, score in zip(self.levels, self.scores, strict=True):
            x = level(x)
            scores.append(score(x).float())
        return scores

    def loss(
        self,
        made: Tensor,
        true: Tensor,
        guess: tuple[Guess, Guess],
        actions: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Windows made and true (b, w, c, y, x); for either the first guesses, from what went before, and the
        actions (b, w, k) → the loss of the one who made them, which moves no weight of the judge, and that of
        the judge, which moves no other.

        Each made frame is compared with the true one in its place (Jolicoeur-Martineau, 2019). The judge
        pays for scores that change under a small disturbance, which stands in for the penalty on its
        gradient (Lin et al., 2025, APT; Huang et al., 2024, R3GAN) and needs no second derivative.
        """
        false, truth = (
            [x.flatten(0, 1) for x in (frames, (frames - mean) / doubt, told)]
            for frames, (mean, doubt), told in zip((made, true), guess, actions, strict=True)
        )
        seen = (torch.rand(len(false[0]), device=made.device) >= BLIND).float()
        frozen = {name: p.detach() for name, p in self.named_parameters()}
        judged = functional_call(self, frozen, (*false, seen))
        # one pass for the judge: true, made, and both disturbed
        frames, missed, told = (torch.cat([x, y.detach()]) for x, y in zip(truth, false, strict=True))
        slip = SLIP * torch.randn_like(frames)
        frames, missed = torch.cat([frames, frames + slip]), torch.cat([missed, missed + slip])
        scores = self(frames, missed, torch.cat([told, told]), seen.repeat(4))
        maker, judge = [], []
        for made_score, score in zip(judged, scores, strict=True):
            true_score, false_score, true_slipped, false_slipped = score.chunk(4)
            maker.append(F.softplus(true_score.detach() - made_score).mean())
            judge.append(F.softplus(false_score - true_score).mean())
            wobble = (true_slipped - true_score).square() + (false_slipped - false_score).square()
            judge.append(wobble.mean() / SLIP**2)
        return sum(maker) / len(maker), sum(judge) / len(maker)
