"""make_stage: from a stage's name to its class. How to add one: CONTRIBUTING.md, "A new stage"."""

from __future__ import annotations

import torch

from ..config import TrainConfig
from .autoencoder import AutoencoderStage
from .decoder import DecoderStage
from .denoiser import DenoiserStage
from .distill import DistillStage
from .state import StateStage


def make_stage(config: TrainConfig, device: torch.device, dtype: torch.dtype | None, rank: int, ranks: int):
    """The training stage that `config.stage` names, with its networks made and its data open."""
    kinds = {
        "autoencoder": AutoencoderStage,
        "state": StateStage,
        "denoiser": DenoiserStage,
        "distill": DistillStage,
        "decoder": DecoderStage,
    }
    return kinds[config.stage](config, device, dtype, rank, ranks)
