"""Stage `evaluate`: the generated world held against the true one, with figures and pictures."""

from .stage import evaluate

__all__ = ["evaluate"]
