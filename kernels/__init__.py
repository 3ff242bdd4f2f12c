"""The engine's tensor operations, installed as engine.kernels; imports nothing of engine."""

from .reference import attention, modulated_norm, qk_norm_rope, rotate

__all__ = ["attention", "modulated_norm", "qk_norm_rope", "rotate"]
