"""The optimiser, its schedule and the moving average of the weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..stage_config import StageConfig


class Optimiser:
    """AdamW, and Muon (Jordan et al., 2024; torch.optim.Muon) for the matrices inside a transformer's layers.

    Muon's steps are scaled to the size of AdamW's (Liu et al., 2025), so that both use one learning rate.
    Weight decay applies to matrices and convolutions only, not to gains, biases and tables.
    """

    def __init__(self, module: nn.Module, stage: StageConfig):
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        inner = [p for name, p in trained.items() if stage.muon and ".layers." in name and p.ndim == 2]
        discriminator = [p for name, p in trained.items() if name.startswith("discriminator.")]
        other = [p for p in trained.values() if not any(p is q for q in inner + discriminator)]
        groups = _decayed(other, stage.weight_decay)
        how = {"lr": stage.learning_rate, "betas": tuple(stage.betas), "fused": True}
        if discriminator:
            groups += [
                group | {"times": stage.discriminator_rate}
                for group in _decayed(discriminator, stage.weight_decay)
            ]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, **how)]
        if inner:
            how = {"weight_decay": stage.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
            self.parts.append(torch.optim.Muon(inner, lr=stage.learning_rate, **how))

    def step(self, rate: float, finite: Tensor) -> None:
        """One step with learning rate `rate`, skipped on the device where `finite` (), bool, is False: the
        host does not have to wait for its value.
        """
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * group.get("times", 1.0)
            if isinstance(part, torch.optim.AdamW):
                part.found_inf = 1 - finite.float()  # how a gradient scaler asks AdamW to skip a step
                part.step()
            else:
                _step_where(finite, part)

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[dict]) -> None:
        for part, own in zip(self.parts, state, strict=True):
            part.load_state_dict(own)


def _decayed(weights: list[Tensor], decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: weights of two or more dimensions, which decay, and vectors, which do not."""
    return [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]


def learning_rate(stage: StageConfig, step: int, progress: float) -> float:
    """Learning rate at `step`: linear warm-up over `warmup` steps, constant, then linear decay to zero over
    the last `decay_share` of the run. `progress`: share of the run that is done, in [0, 1].
    """
    warm = min(1.0, (step + 1) / max(1, stage.warmup))
    decay = min(1.0, (1 - progress) / max(1e-6, stage.decay_share))
    return stage.learning_rate * warm * max(0.0, decay)


def _step_where(finite: Tensor, part: torch.optim.Optimizer) -> None:
    """A step of an optimiser that cannot skip one: where `finite` is False, weights and momentum are put back
    as they were.
    """
    weights = [p for group in part.param_groups for p in group["params"] if p.grad is not None]
    momentum = [x for p in weights for x in part.state[p].values() if torch.is_tensor(x)]
    moving = weights + momentum  # momentum that the step creates starts at zero and needs no copy
    before = [x.detach().clone() for x in moving]
    for p in weights:
        p.grad = torch.where(finite, p.grad, 0)
    part.step()
    with torch.no_grad():
        for x, old in zip(moving, before, strict=True):
            x.copy_(torch.where(finite, x, old))


class MovingAverage:
    """Exponential moving average of weights and buffers; its decay rises during the first updates, so that
    the initial weights are soon forgotten. torch's AveragedModel would read its count from the device at each
    update.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay = copy.deepcopy(module), decay

    @torch.no_grad()
    def update(self, module: nn.Module, count: int, finite: Tensor) -> None:
        """Averages in the module's current weights; `count`: how many updates there were before. Skipped on
        the device where `finite` (), bool, is False.
        """
        share = max(1 - self.decay, 9 / (10 + count)) if count else 1.0
        pairs = zip(self.module.state_dict().values(), module.state_dict().values(), strict=True)
        pairs = [(kept, torch.where(finite, new, kept)) for kept, new in pairs]
        moving = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([kept for kept, _ in moving], [new for _, new in moving], share)
        for kept, new in pairs:
            if not kept.is_floating_point():
                kept.copy_(new)
