"""Stages `evaluate` and `ablate`: compare the generated world with the true one; figures and pictures."""

from .ablation import ablate
from .stage import evaluate

__all__ = ["ablate", "evaluate"]
