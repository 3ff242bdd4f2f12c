"""The optimiser, its schedule and the moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..stage_config import StageConfig


class Optimiser:
    """AdamW, and Muon (Jordan et al., 2024; torch.optim.Muon) for the matrices inside a transformer's layers.

    Muon's steps are scaled to AdamW's (Liu et al., 2025), so that both take one learning rate. Weight decay
    is only on matrices, never on gains, biases and tables.
    """

    def __init__(self, module: nn.Module, stage: StageConfig):
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        inner = [p for name, p in trained.items() if stage.muon and ".layers." in name and p.ndim == 2]
        judge = [p for name, p in trained.items() if name.startswith("discriminator.")]
        other = [p for p in trained.values() if not any(p is q for q in inner + judge)]
        groups = _decayed(other, stage.weight_decay)
        how = {"lr": stage.learning_rate, "betas": tuple(stage.betas), "fused": True}
        if judge:
            groups += [
                group | {"times": stage.discriminator_rate} for group in _decayed(judge, stage.weight_decay)
            ]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, **how)]
        if inner:
            how = {"weight_decay": stage.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
            self.parts.append(torch.optim.Muon(inner, lr=stage.learning_rate, **how))

    def step(self, rate: float) -> None:
        """One step with the learning rate `rate`."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * group.get("times", 1.0)
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[dict]) -> None:
        for part, own in zip(self.parts, state, strict=True):
            part.load_state_dict(own)


def _decayed(weights: list[Tensor], decay: float) -> list[dict[str, Any]]:
    """Groups of weights: matrices, which decay, and all others, which do not."""
    return [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]


def learning_rate(stage: StageConfig, step: int, progress: float) -> float:
    """Linear warm-up over steps, flat, then linear decay over the run's last share; progress in [0, 1]."""
    warm = min(1.0, (step + 1) / max(1, stage.warmup))
    decay = min(1.0, (1 - progress) / max(1e-6, stage.decay_share))
    return stage.learning_rate * warm * max(0.0, decay)


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of weights and buffers; short at first, to forget the start soon."""

    def average(kept: list[Tensor], new: list[Tensor], count: int | Tensor) -> None:
        share = max(1 - decay, 9 / (10 + float(count)))
        if kept[0].is_floating_point():  # what comes together is of one kind
            torch._foreach_lerp_(kept, new, share)
        else:
            torch._foreach_copy_(kept, new)

    return AveragedModel(module, multi_avg_fn=torch.no_grad()(average), use_buffers=True)
