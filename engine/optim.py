"""The optimiser, its schedule and the moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .config import StageConfig


def make_optimiser(module: nn.Module, pace: StageConfig) -> torch.optim.AdamW:
    """AdamW; weight decay only on matrices, never on gains, biases and tables."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": pace.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=pace.learning_rate, betas=(0.9, 0.98), fused=True)


def learning_rate(pace: StageConfig, step: int, progress: float) -> float:
    """Linear warm-up over steps, flat, then linear decay over the run's last share; progress in [0, 1]."""
    warm = min(1.0, (step + 1) / max(1, pace.warmup))
    decay = min(1.0, (1 - progress) / max(1e-6, pace.decay_share))
    return pace.learning_rate * warm * max(0.0, decay)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of weights and buffers; short at first, to forget the start soon."""

    def average(kept: list[Tensor], new: list[Tensor], count: int | Tensor) -> None:
        share = max(1 - decay, 9 / (10 + float(count)))
        for old, fresh in zip(kept, new, strict=True):
            if old.is_floating_point():
                old.lerp_(fresh, share)
            else:
                old.copy_(fresh)

    return AveragedModel(module, multi_avg_fn=torch.no_grad()(average), use_buffers=True)
