"""The stage that a config names, with its data open. A new one: CONTRIBUTING.md, "A new stage"."""

from __future__ import annotations

import torch

from ..config import TrainConfig
from .autoencoder import AutoencoderStage
from .decoder import DecoderStage
from .denoiser import DenoiserStage
from .distill import DistillStage
from .state import StateStage


def make_stage(config: TrainConfig, device: torch.device, dtype: torch.dtype | None, rank: int, ranks: int):
    """One of the stages that are trained."""
    kinds = {
        "autoencoder": AutoencoderStage,
        "state": StateStage,
        "denoiser": DenoiserStage,
        "distill": DistillStage,
        "decoder": DecoderStage,
    }
    return kinds[config.stage](config, device, dtype, rank, ranks)
