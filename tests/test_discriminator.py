"""The discriminator: whose weights each loss moves, and that what cannot be known is drawn, not averaged."""

from __future__ import annotations

import torch
from torch import nn

from engine.config import StageConfig
from engine.discriminator import Discriminator
from engine.motion import Guess
from engine.optim import Optimiser


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape), torch.randn(shape)


def test_each_loss_moves_its_own_weights_only():
    torch.manual_seed(0)
    judge, made = Discriminator(3, 2, 8), torch.randn(3, 4, 2, 4, 8, requires_grad=True)
    guesses = [Guess(x, torch.rand(3, 4, 2, 4, 8) + 0.1) for x in pair(3, 4, 2, 4, 8)]
    maker, own = judge.loss(made, torch.randn(3, 4, 2, 4, 8), guesses, pair(3, 4, 3))
    maker.backward()
    assert made.grad.abs().sum() > 0 and all(p.grad is None for p in judge.parameters())
    made.grad = None
    own.backward()
    assert made.grad is None and all(p.grad.abs().sum() > 0 for p in judge.parameters())


def test_guess_and_keys_count_only_where_they_are_seen():
    torch.manual_seed(0)
    judge, (frames, missed), actions = Discriminator(3, 2, 8), pair(4, 2, 4, 8), torch.randn(4, 3)
    seen = torch.tensor([1.0, 0, 1, 0])
    given = judge(frames, missed, actions, seen)
    assert [score.shape[2:] for score in given] == [(4, 8), (2, 4), (1, 2)]
    for changed in (judge(frames, missed + 1, actions, seen), judge(frames, missed, actions + 1, seen)):
        for one, other in zip(given, changed, strict=True):
            alike = [torch.equal(*pair) for pair in zip(one, other, strict=True)]
            assert alike == [False, True, False, True]


def test_what_cannot_be_known_is_drawn():
    """True frames are stripes of either sign, which nothing foretells: their mean is grey. A maker of noise
    that is regressed on them makes grey; one that is judged makes stripes.
    """
    stripes = torch.tensor([1.0, -1.0]).repeat(6)  # (x,)
    spread = {}
    for judged in (False, True):
        torch.manual_seed(1)
        maker = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 1, 3, padding=1))
        both = nn.ModuleDict({"maker": maker, "discriminator": Discriminator(1, 1, 16)})
        optimiser = Optimiser(both, StageConfig(learning_rate=3e-3, weight_decay=0.0))
        for _ in range(400):
            sign = torch.randint(2, (16, 1, 1, 1, 1)) * 2.0 - 1
            true = (sign * stripes).expand(16, 1, 1, 8, 12)
            made = maker(torch.randn(16, 1, 8, 12))[:, None]
            guess = Guess(torch.zeros(16, 1, 1, 8, 12), torch.ones(16, 1, 1, 8, 12))
            idle = torch.zeros(16, 1, 1)
            loss = (made - true).square().mean()
            if judged:
                loss = sum(both["discriminator"].loss(made, true, (guess, guess), (idle, idle)))
            loss.backward()
            optimiser.step(3e-3)
            optimiser.zero_grad()
        # how much neighbours differ, which is 2 in true frames
        spread[judged] = (made[..., 1:] - made[..., :-1]).abs().mean().item()
    assert spread[False] < 0.2 and 0.8 < spread[True] < 3, spread
