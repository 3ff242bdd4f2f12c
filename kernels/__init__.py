"""The engine's tensor operations, installed as engine.kernels; imports nothing of engine."""

from .dispatch import gate_residual_norm_modulate
from .reference import attention, modulated_norm, qk_norm_rope, rotate

__all__ = ["attention", "gate_residual_norm_modulate", "modulated_norm", "qk_norm_rope", "rotate"]
