"""Stages `evaluate` and `ablate`: the generated world held against the true one; figures and pictures."""

from .ablation import ablate
from .stage import evaluate

__all__ = ["ablate", "evaluate"]
